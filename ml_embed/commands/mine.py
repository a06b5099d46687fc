"""Mine hard negatives for raw data with any embedding model, and write the raw layout with them.

For each row: the nearest documents of its own dataset (all passages and negatives), without the
query's own passages and text; the first few are dropped, too high scores too, and the best of the
rest are kept. The defaults are the published ones. An interrupted run is continued by the same
command.

Each query is compared with each document, on a GPU if there is one. For corpora where that takes
too long, --search ann looks only where near documents are likely. Before it searches it prints the
share of the true nearest that it finds (mining.json has it too); if that is too low, stop it and
start again with a higher --nprobe: the vectors of an unfinished dataset are kept.
"""

import argparse
import json
from typing import TYPE_CHECKING

from ml_embed.commands import flags
from ml_embed.errors import UserError, exit_on_user_error
from ml_embed.files.paths import check_writable, home_path
from ml_embed.notices import bars_wanted, parse_command

if TYPE_CHECKING:
    from ml_embed.recipe.ann import Approximation


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = flags.new_parser(__doc__)
    flags.add_model(parser, "a model of this project, or any that sentence-transformers reads")
    parser.add_argument(
        "--input", type=home_path, required=True, metavar="DIR", help="folder of raw data"
    )
    flags.add_output(parser, "folder for the data with negatives")
    parser.add_argument(
        "--top", type=int, default=100, help="nearest documents looked at (default 100)"
    )
    parser.add_argument(
        "--skip", type=int, default=5, help="of those, the nearest that are dropped (default 5)"
    )
    parser.add_argument(
        "--max-score", type=float, default=0.8, help="cosine a negative stays below (default 0.8)"
    )
    parser.add_argument(
        "--max-ratio",
        type=float,
        default=0.95,
        help="share of the positive's cosine it stays below (default 0.95)",
    )
    parser.add_argument(
        "--count", type=int, default=24, help="negatives of a row at most (default 24)"
    )
    parser.add_argument(
        "--keep-if-in-top",
        type=int,
        default=0,
        metavar="N",
        help="drop rows whose passage is not among the N nearest of their query (default 0: none)",
    )
    parser.add_argument(
        "--search",
        choices=("exact", "ann"),
        default="exact",
        help="exact (default), or ann: approximate, on the CPU "
        "with faiss, for datasets of 100,000 documents and more",
    )
    parser.add_argument(
        "--nprobe", type=int, help="with --search ann: cells a query looks into (default 64)"
    )
    parser.add_argument(
        "--code-bits",
        type=int,
        help="with --search ann: bits per dimension of a document in memory: 8, 4 or 2 (default 4)",
    )
    flags.add_prompts(parser, "model")
    flags.add_device(parser)
    flags.add_overwrite(
        parser,
        "replace datasets that were mined otherwise, and remove those that --input no longer has",
    )
    flags.add_verify(parser)
    return parse_command(parser, arguments)


def _approximation(args: argparse.Namespace) -> "Approximation | None":
    """The settings of the approximate search, checked; None for the exact one."""
    from ml_embed.recipe.ann import Approximation

    given = {
        name: value
        for name in ("nprobe", "code_bits")
        if (value := getattr(args, name)) is not None
    }
    if args.search == "ann":
        approximation = Approximation(**given)
        approximation.check()
        return approximation
    if given:
        raise UserError(
            f"--{next(iter(given)).replace('_', '-')} is for --search ann; the exact search has no "
            "such setting"
        )
    return None


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    from ml_embed.distributed.launch import launched

    with launched(args.device):
        mine(args)


def mine(args: argparse.Namespace) -> None:
    """This process's part of the work; the first one prints the result."""
    from ml_embed.distributed.collectives import compute_on_all_processes, process_index
    from ml_embed.inference.text_models import TextModel, load_text_model
    from ml_embed.model_folders.seal import verify_model
    from ml_embed.prepare.raw import list_raw_datasets
    from ml_embed.recipe.mining import Filter, MiningOptions, mine_folder

    def prepare() -> tuple[TextModel, MiningOptions]:
        rule = Filter(
            args.top, args.skip, args.max_score, args.max_ratio, args.count, args.keep_if_in_top
        )
        rule.check()
        approximation = _approximation(args)
        check_writable(args.output)  # mistakes show before a model is loaded
        list_raw_datasets(args.input)
        if args.verify:
            verify_model(args.model)
        options = MiningOptions(
            args.input,
            args.output,
            rule,
            args.query_prompt,
            args.passage_prompt,
            approximation,
            args.overwrite,
        )
        return load_text_model(args.model, args.device), options

    summary = mine_folder(*compute_on_all_processes(prepare), progress=bars_wanted())
    if process_index() == 0:
        print(json.dumps({"output": str(args.output), **summary}, ensure_ascii=False))
