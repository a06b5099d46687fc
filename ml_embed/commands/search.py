"""Search a corpus with a model, or any cut of it: the texts nearest to each text that is given.

Texts are given as arguments, or line by line on stdin. The model's saved prompts "query" and
"document" are put before them and before the corpus' texts, if it has them.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from ml_embed.errors import UserError, exit_on_user_error
from ml_embed.files.digests import add_verify_flag
from ml_embed.files.paths import home_path
from ml_embed.model_folders.cut import add_cut_flags
from ml_embed.notices import bars_wanted, parse_command

CORPUS = Path("runs/quickstart/raw/names.parquet")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="what to search for")
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_NAME",
        help="a trained model or any Qwen3 backbone: a folder, or a name on the hub",
    )
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
        "--top", type=int, default=5, metavar="N", help="texts to show (default %(default)s)"
    )
    add_cut_flags(parser, many=False, default="the largest")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default the first GPU, else the CPU)")
    add_verify_flag(parser)
    args = parse_command(parser, arguments)
    if args.top < 1:
        raise UserError(f"--top is {args.top}; it must be at least 1")
    return args


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
