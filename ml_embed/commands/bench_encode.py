"""Measure Embedder.encode on the CPU, against sentence-transformers' encode of the same model."""

import argparse
import tempfile
from pathlib import Path

from ml_embed.errors import exit_on_user_error
from ml_embed.notices import parse_command


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=200, help="texts to encode (default 200)")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each (default 3)")
    args = parse_command(parser, arguments)

    from ml_embed.benchmarks.encoding import report_encoding

    with tempfile.TemporaryDirectory() as folder:
        report_encoding(Path(folder), args.texts, args.repeats)
