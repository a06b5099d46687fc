"""Choose a cut: measure what each costs here, and show the best ones that keep within your limits.

Quality is taken from an evaluation. For each of its ranks and depths a new process encodes texts,
one at a time. That gives the latency (median over texts) and the memory (the most that was held
beyond what importing this package takes). The numbers are written to costs.json beside the
evaluation, where the next call finds them, and the run's page shows them (scripts/report.py).
"""

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ml_embed.commands import flags
from ml_embed.errors import UserError, exit_on_user_error
from ml_embed.files.paths import check_writable, home_path
from ml_embed.model_folders.cut import Cut
from ml_embed.notices import bars_wanted, parse_command
from ml_embed.reports.tables import MEANING

if TYPE_CHECKING:
    from ml_embed.evaluation.costs import Costs
    from ml_embed.reports.choices import CubePoint

UNITS = {
    "memory": {"kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "latency": {"us": 1e-6, "ms": 1e-3, "s": 1.0},
}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = flags.new_parser(__doc__)
    flags.add_model(parser, "the model that was evaluated: a folder, or a name on the hub")
    parser.add_argument(
        "--evaluation",
        type=home_path,
        required=True,
        metavar="PATH",
        help="evaluation.json of scripts/evaluate.py, or its folder",
    )
    parser.add_argument("--memory", metavar="SIZE", help="at most this, e.g. 200MB (default any)")
    parser.add_argument("--latency", metavar="TIME", help="at most this, e.g. 20ms (default any)")
    parser.add_argument(
        "--texts",
        type=home_path,
        metavar="FILE",
        help="texts like those you will encode: a text per line (.txt), or rows (default: "
        "articles of the embedded corpus)",
    )
    parser.add_argument(
        "--column",
        default="text",
        help="of rows in --texts: which one holds the texts (default %(default)s)",
    )
    flags.add_cut(parser, many=True, default="all evaluated")
    parser.add_argument(
        "--metric", choices=list(MEANING), default="ndcg@10", help="of quality (%(default)s)"
    )
    flags.add_device(parser)
    flags.add_overwrite(parser, "measure these cuts again if they were before")
    flags.add_verify(parser)
    return parse_command(parser, arguments)


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    limits = {name: amount(name, getattr(args, name)) for name in UNITS}
    from ml_embed.reports.choices import best_choices, choices_table, cube_points, read_evaluation

    file = args.evaluation / "evaluation.json" if args.evaluation.is_dir() else args.evaluation
    result = read_evaluation(file, args.metric)
    evaluated = [point for point in cube_points(result, args.metric) if is_wanted(point.cut, args)]
    costs = measure(args, file, evaluated)
    points = [p for p in cube_points(result, args.metric, costs) if is_wanted(p.cut, args)]
    fitting = within(points, limits["memory"], limits["latency"])
    print(f"{args.metric}: {MEANING[args.metric]}; mean over the test sets of {file}")
    print(f"latency and memory: {costs.texts} texts, one at a time, on {costs.device}\n")
    print(f"{choices_table(fitting)}\n\nthe best of them:")
    print(export_command(args.model, best_choices(fitting)[0]))


def measure(args: argparse.Namespace, file: Path, evaluated: Sequence["CubePoint"]) -> "Costs":
    """What evaluated cuts cost, measured where costs.json beside the evaluation does not say it."""
    from ml_embed.evaluation.costs import COSTS_FILE, measure_costs
    from ml_embed.files.atomic import write_json
    from ml_embed.files.model_source import find_model_folder
    from ml_embed.model_folders.read import ModelFolder
    from ml_embed.model_folders.seal import verify_model
    from ml_embed.model_folders.sizes import parameters_of

    if not evaluated:
        raise UserError(f"{file} has no cut of the --rank, --depth and --dim that are given")
    check_writable(file.parent, "--evaluation")
    texts = read_texts(args.texts, args.column)
    if args.verify:
        verify_model(args.model)
    config = ModelFolder.open(find_model_folder(args.model)).config
    if any(parameters_of(config, point.cut) != point.parameters for point in evaluated):
        raise UserError(f"{file} is an evaluation of another model than {args.model}")
    place, cuts = file.with_name(COSTS_FILE), [point.cut for point in evaluated]
    known = known_costs(place, args.overwrite)
    costs = measure_costs(
        args.model, cuts, texts, args.device, known, bars_wanted(), again=args.overwrite
    )
    write_json(place, costs.to_json())
    return costs


def known_costs(place: Path, overwrite: bool) -> "Costs | None":
    """What was measured before; with `overwrite` a damaged file counts as none."""
    from ml_embed.evaluation.costs import Costs

    if not place.is_file():
        return None
    try:
        return Costs.load(place)
    except UserError:
        if overwrite:  # it is what the error advises
            return None
        raise


def is_wanted(cut: Cut, args: argparse.Namespace) -> bool:
    """Whether a cut has the sizes that were asked for."""
    return all(
        getattr(args, axis) is None or getattr(cut, axis) in getattr(args, axis)
        for axis in ("rank", "depth", "dim")
    )


def amount(name: str, given: str | None) -> float:
    """Bytes or seconds; infinity for what is not given. Raises UserError for another unit."""
    if given is None:
        return float("inf")
    written = re.fullmatch(r"([\d.]+) *(\w+)", given)
    try:
        return float(written[1]) * UNITS[name][written[2]]  # type: ignore[index]
    except (TypeError, ValueError, KeyError):
        raise UserError(
            f"--{name} {given} must be a number with its unit: {', '.join(UNITS[name])}"
        ) from None


def read_texts(path: Path | None, column: str) -> list[str]:
    """Texts of a file that are not blank, or articles of the embedded corpus."""
    from ml_embed.prepare.records import column_texts
    from ml_embed.sample_data.corpus import load_articles

    if path is None:
        return load_articles()["text"].to_pylist()
    return [text for text in column_texts(path, column) if text.strip()]


def within(points: Sequence["CubePoint"], memory: float, latency: float) -> list["CubePoint"]:
    """The points that need no more bytes and seconds. Raises UserError if there are none."""
    costs = [point.cost for point in points if point.cost]
    fitting = [
        p for p in points if p.cost and p.cost.memory <= memory and p.cost.latency <= latency
    ]
    if not fitting:
        least = min(cost.memory for cost in costs), min(cost.latency for cost in costs)
        raise UserError(
            f"no cut keeps within these limits: the smallest needs {least[0] / 1e6:,.0f} MB, the "
            f"fastest {1000 * least[1]:.3g} ms; raise --memory or --latency"
        )
    return fitting


def export_command(model: str, point: "CubePoint") -> str:
    """The command that writes a cut as a model folder of its own."""
    sizes = {axis: size for axis, size in vars(point.cut).items() if size}  # rank 0 is no flag
    words = ["python", "scripts/export_model.py", "--model", model, "--output", "my_models/cut"]
    words += [word for axis, size in sizes.items() for word in (f"--{axis}", str(size))]
    return shlex.join(words + ["--allow-untrained"] * (not point.trained))
