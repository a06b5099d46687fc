"""Search a corpus with a model, or any cut of it: the texts nearest to each text that is given.

Texts are given as arguments, or line by line on stdin. The model's saved prompts "query" and
"document" are put before them and before the corpus' texts, if it has them.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from ml_embed.commands import flags
from ml_embed.errors import exit_on_user_error
from ml_embed.files.paths import home_path
from ml_embed.notices import bars_wanted, parse_command

CORPUS = Path("runs/quickstart/raw/names.parquet")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = flags.new_parser(__doc__)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="what to search for")
    flags.add_model(parser)
    parser.add_argument(
        "--corpus",
        type=home_path,
        default=CORPUS,
        metavar="FILE",
        help="a text per line (.txt), or rows (.csv, .tsv, .json, .jsonl, .parquet, .arrow) "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--column",
        default="passage",
        help="of rows: which one holds the texts (default %(default)s)",
    )
    parser.add_argument(
        "--top",
        action=flags.AtLeastOne,
        default=5,
        metavar="N",
        help="texts to show (default %(default)s)",
    )
    flags.add_cut(parser, many=False, default="the largest")
    flags.add_device(parser)
    flags.add_verify(parser)
    return parse_command(parser, arguments)


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    from ml_embed.inference.embedder import Embedder
    from ml_embed.inference.text_index import TextIndex
    from ml_embed.model_folders.seal import verify_model
    from ml_embed.prepare.records import column_texts

    if args.verify:
        verify_model(args.model)
    model = Embedder.from_pretrained(args.model, args.depth, args.dim, args.rank, args.device)
    texts = column_texts(args.corpus, args.column)
    index = TextIndex(model, texts, None if bars_wanted() else False)
    for text in args.texts or lines_given():
        print(text)
        for cosine, found in index.nearest(text, args.top):
            print(f"  {cosine:6.3f}  {found}")


def lines_given() -> Iterator[str]:
    """The lines of stdin that are not empty; on a terminal they are asked for."""
    while True:
        if sys.stdin.isatty():
            print("search for: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
