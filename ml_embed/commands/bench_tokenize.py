"""Measure tokenizing a file, with reading and writing, against the tokenizers library alone.

Both take the same texts, none of which occurs twice. A naive version tokenizes text by text.
"""

import tempfile
from pathlib import Path

from ml_embed.commands import flags
from ml_embed.errors import exit_on_user_error
from ml_embed.notices import parse_command


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = flags.new_parser(__doc__)
    parser.add_argument(
        "--rows", type=int, default=10_000, help="of 9 texts, 3.5 kB, each (default 10000)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default 3)")
    args = parse_command(parser, arguments)

    from ml_embed.benchmarks.tokenizing import report_tokenizing

    with tempfile.TemporaryDirectory() as folder:
        report_tokenizing(Path(folder), args.rows, args.repeats)
