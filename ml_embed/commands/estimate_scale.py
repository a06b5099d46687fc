"""Estimate what large runs take: memory, time and storage for every size of Qwen3."""

import argparse

from ml_embed.commands import flags
from ml_embed.errors import UserError, exit_on_user_error
from ml_embed.notices import parse_command


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="H100", metavar="NAME", help="default %(default)s")
    parser.add_argument(
        "--share-of-peak",
        type=float,
        default=0.4,
        metavar="X",
        help="of the FLOP/s in the GPU's data sheet that is reached (default %(default)s, a guess)",
    )
    for name, count, what in (
        ("documents", 300_000_000, "documents that are tokenized and encoded"),
        ("samples", 60_000_000, "samples of one pass of training"),
        ("document-tokens", 250, "tokens of a document, on average"),
    ):
        parser.add_argument(
            f"--{name}",
            action=flags.AtLeastOne,
            default=count,
            metavar="N",
            help=f"{what} (default {count:,})",
        )
    args = parse_command(parser, arguments)
    if not 0 < args.share_of_peak <= 1:
        raise UserError(f"--share-of-peak is {args.share_of_peak}; it must be above 0, up to 1")

    from ml_embed.benchmarks.common import print_table
    from ml_embed.training.cost import GPUS
    from ml_embed.training.scale import Corpus, tables

    if args.gpu not in GPUS:
        raise UserError(f"--gpu: {args.gpu!r} is not known; take one of {', '.join(GPUS)}")
    corpus = Corpus(args.documents, args.samples, args.document_tokens)
    for table in tables(args.gpu, GPUS[args.gpu], corpus, args.share_of_peak):
        print(f"**{table.title}**\n")
        print_table(table.header, table.rows)
        print()
