"""Average the weights of several checkpoints into one model folder.

The checkpoints differ in nothing but their weights: those of one run, or of runs with the same
start and settings. With --data, the metric of each of them and of the average is printed.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ml_embed.commands import flags
from ml_embed.errors import exit_on_user_error
from ml_embed.files.paths import home_path
from ml_embed.notices import bars_wanted, notice, parse_command

if TYPE_CHECKING:
    from ml_embed.model_folders.averaging import MeanFactors
    from ml_embed.model_folders.read import ModelFolder

METRICS = ("recall@1", "mrr@10", "ndcg@10")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = flags.new_parser(__doc__)
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        required=True,
        metavar="DIR_OR_NAME",
        help="two or more models: folders, or names on the hub",
    )
    flags.add_output(parser, "the new model folder")
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="X",
        help="how much each checkpoint counts (default all alike)",
    )
    parser.add_argument(
        "--data",
        type=home_path,
        metavar="PATH",
        help="a file or a folder of files as scripts/evaluate.py takes it: measure all of them",
    )
    flags.add_refactor(parser)
    flags.add_overwrite(parser)
    flags.add_verify(parser)
    return parse_command(parser, arguments)


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)

    from ml_embed.model_folders.averaging import Average
    from ml_embed.model_folders.read import ModelFolder
    from ml_embed.model_folders.seal import verify_model

    for model in args.checkpoints if args.verify else ():
        verify_model(model)
    average = Average.of(args.checkpoints, args.weights)
    average.check_output(args.output, args.overwrite)
    measured = {}
    if args.data is not None:  # before the long part, so that mistakes in the data come first
        for name, folder in zip(average.names, average.folders, strict=True):
            measured[name] = measure(folder, args.data)
    mean = average.write(args.output, args.overwrite, args.refactor)
    if mean is not None:
        tell_factors(mean)
    if args.data is not None:
        measured[str(args.output)] = measure(ModelFolder.open(args.output), args.data)
        print(table(measured))
    weights = dict(zip(average.names, average.shares, strict=True))
    print(json.dumps({"output": str(args.output), "weights": weights, "metrics": measured}))


def tell_factors(mean: "MeanFactors") -> None:
    """Say what became of the token factors."""
    if mean.as_they_are:
        notice("the token factors are averaged as they are")
    else:
        notice(f"the mean of the token tables is factorised anew; {mean.lost:.2g} of it is lost")


def measure(folder: "ModelFolder", data: Path) -> dict[str, float]:
    """Each metric of a whole model, the mean over the test sets."""
    from ml_embed.evaluation.cube import evaluate_cube
    from ml_embed.model_folders.cut import whole_cut
    from ml_embed.reports.tables import mean_metric

    cut = whole_cut(folder.record, folder.config)
    ranks = [cut.rank] if cut.rank else None
    result = evaluate_cube(folder.path, data, ranks, [cut.depth], [cut.dim], progress=bars_wanted())
    return {metric: mean_metric(result["rows"], metric) for metric in METRICS}


def table(measured: dict[str, dict[str, float]]) -> str:
    """A line for each model, the average last."""
    from ml_embed.reports.tables import aligned, number_text

    columns = {
        metric: [number_text(found[metric], 4) for found in measured.values()] for metric in METRICS
    }
    return aligned("model", list(measured), columns)
