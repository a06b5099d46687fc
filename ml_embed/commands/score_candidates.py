"""Score passages and negatives of raw data with a cross-encoder, for training with `kd_loss`.

For each row: the model's score of the query with its passage (`pos_score`) and with each of its
negatives (`neg_scores`), written into the raw layout. Tokenize the output, and train with kd_loss
"kl" or "margin_mse". An interrupted run is continued by the same command.
"""

import argparse
import json

from ml_embed.commands import flags
from ml_embed.errors import exit_on_user_error
from ml_embed.files.paths import check_writable, home_path
from ml_embed.notices import bars_wanted, parse_command


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = flags.new_parser(__doc__)
    flags.add_model(
        parser,
        "a cross-encoder that sentence-transformers reads: its logits are the scores; or a "
        "trained model folder of this project: cosines divided by its temperature",
    )
    parser.add_argument(
        "--data", type=home_path, required=True, metavar="DIR", help="folder of raw data"
    )
    flags.add_output(parser, "folder for the data with scores")
    flags.add_prompts(parser, "model")
    flags.add_batch_size(parser, "pairs in a forward pass of a cross-encoder")
    flags.add_device(parser)
    parser.add_argument(
        "--replace-scores",
        action="store_true",
        help="write the model's scores where rows have others (else such files are refused)",
    )
    flags.add_overwrite(
        parser,
        "replace datasets that were scored otherwise, and remove those that --data no longer has",
    )
    flags.add_verify(parser)
    return parse_command(parser, arguments)


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    from ml_embed.distributed.launch import launched

    with launched(args.device):
        score(args)


def score(args: argparse.Namespace) -> None:
    """This process's part of the work; the first one prints the result."""
    from ml_embed.distributed.collectives import compute_on_all_processes, process_index
    from ml_embed.inference.pair_models import PairModel, load_pair_model
    from ml_embed.model_folders.seal import verify_model
    from ml_embed.prepare.raw import list_raw_datasets
    from ml_embed.recipe.scoring import ScoringOptions, score_folder

    def prepare() -> tuple[PairModel, ScoringOptions]:
        check_writable(args.output)  # mistakes show before a model is loaded
        list_raw_datasets(args.data)
        if args.verify:
            verify_model(args.model)
        options = ScoringOptions(
            args.data,
            args.output,
            args.query_prompt,
            args.passage_prompt,
            args.replace_scores,
            args.overwrite,
        )
        return load_pair_model(args.model, args.device, args.batch_size), options

    summary = score_folder(*compute_on_all_processes(prepare), progress=bars_wanted())
    if process_index() == 0:
        print(json.dumps({"output": str(args.output), **summary}, ensure_ascii=False))
