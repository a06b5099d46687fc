"""The validation grid in a run's report: its cells over time, and its newest numbers as a cube to choose from."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ml_embed.charts import Point
from ml_embed.cube import BYTES_PER_COMPONENT
from ml_embed.evaluation import METRICS
from ml_embed.nesting import Cell, cell_of_name
from ml_embed.report import Result

AXES = ("rank", "depth", "dim")
Line = Mapping[str, Any]


def grid_values(line: Line) -> dict[tuple[str, Cell], dict[str, float]]:
    """The numbers of a validation line by dataset and cell: {metric: value}; empty for a run without a grid."""
    values: dict[tuple[str, Cell], dict[str, float]] = defaultdict(dict)
    for key, value in line.items():
        dataset, metric, name = ["", "", *key.rsplit("/", 2)][-3:]
        cell = cell_of_name(name)
        if cell is not None and metric in METRICS and not dataset.startswith("Avg/"):
            values[dataset, cell][metric] = value
    return dict(values)


def grid_curves(lines: Sequence[Line], metric: str) -> dict[str, dict[str, list[Point]]]:
    """For each axis that has several values: {"rank 64": (step, mean over datasets) points, …}.

    Every cell would be too many lines, so the other two axes stand at the largest of theirs.
    """
    points: dict[Cell, list[Point]] = defaultdict(list)
    for line in lines:
        of_cell: dict[Cell, list[float]] = defaultdict(list)
        for (_, cell), values in grid_values(line).items():
            of_cell[cell].append(values[metric])
        for cell, found in of_cell.items():
            points[cell].append((line["step"], sum(found) / len(found)))
    if not points:
        return {}
    largest = tuple(max(cell[place] for cell in points) for place in range(len(AXES)))
    curves = {}
    for place, axis in enumerate(AXES):
        varied = {
            f"{axis} {cell[place]}": points[cell]
            for cell in sorted(points)
            if all(cell[other] == largest[other] for other in range(len(AXES)) if other != place)
        }
        if len(varied) > 1:
            curves[axis] = varied
    return curves


def grid_result(resolved: Mapping[str, Any], lines: Sequence[Line]) -> tuple[int, Result] | None:
    """The newest validation's step and its numbers, like those of an evaluated cube; None for a run without a grid.

    The whole model is among the cells. Vectors count as float32.
    """
    measured = [line for line in lines if grid_values(line)]
    if not measured or "layer_parameters" not in resolved:
        return None
    newest = measured[-1]
    values = grid_values(newest)
    whole = (max(resolved["ranks"], default=0), max(resolved["exits"]), max(resolved["dims"]))
    for dataset in {dataset for dataset, _ in values}:
        values[dataset, whole] = {metric: newest[f"{dataset}/{metric}"] for metric in METRICS}
    rows = [
        dict(zip(AXES, cell, strict=True))
        | {"dataset": dataset, "bytes_per_vector": BYTES_PER_COMPONENT * cell[2]}
        | {"parameters": cut_parameters(resolved, *cell[:2]), **metrics}
        for (dataset, cell), metrics in sorted(values.items())
    ]
    return newest["step"], {"rows": rows}


def cut_parameters(resolved: Mapping[str, Any], rank: int, depth: int) -> int:
    """Parameters of a cut of a run's model: token factors (rank 0: the whole table), `depth` layers, one final norm."""
    table = resolved["embedding_parameters"]
    if rank:
        table = table // max(resolved["ranks"]) * rank
    return table + depth * resolved["layer_parameters"] + max(resolved["dims"])
