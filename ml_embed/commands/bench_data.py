"""Measure opening a corpus and building batches, against a naive version.

The naive version keeps lists of ids and a dict of string ids, and pads its batches.
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
        "--documents",
        type=int,
        default=100_000,
        help="documents of the corpus opened (default 100000)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=20,
        help="turns of each version, a group of batches each (default 20)",
    )
    parser.add_argument(
        "--skip-naive-opening",
        action="store_true",
        help="it takes about 1 kB of memory per document",
    )
    args = parse_command(parser, arguments)

    from ml_embed.benchmarks.data import report_data

    with tempfile.TemporaryDirectory() as folder:
        report_data(Path(folder), args.documents, args.repeats, not args.skip_naive_opening)
