"""The part of a run's page to choose a cut from: quality and costs of every cut.

A picture of quality over size, a table of the cuts that no other one beats, and tables of all.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ml_embed.errors import UserError
from ml_embed.evaluation.costs import Cost, Costs
from ml_embed.files.json_file import read_json
from ml_embed.model_folders.cut import Cut, table_name
from ml_embed.reports.charts import scatter_chart
from ml_embed.reports.tables import (
    MEANING,
    Result,
    aligned,
    mean_chance,
    mean_metric,
    number_text,
    sizes,
)

LIGHT, DARK = (247, 251, 255), (33, 113, 181)  # of table cells: worst to best


@dataclass(frozen=True)
class CubePoint:
    """A cut, what it costs, and how good it is."""

    cut: Cut
    parameters: int
    bytes_per_vector: int
    quality: float
    """mean of a metric over test sets"""
    trained: bool = True
    cost: Cost | None = None
    """as measured; None = it was not"""

    @property
    def costs(self) -> tuple[int, int, int]:
        """What is paid for it on the three axes."""
        return self.parameters, self.cut.depth, self.cut.dim

    def beats(self, other: "CubePoint") -> bool:
        """Whether it is at most as large, deep and long, and better, or as good and cheaper."""
        if any(own > its for own, its in zip(self.costs, other.costs, strict=True)):
            return False
        equal = self.quality == other.quality and self.costs != other.costs
        return self.quality > other.quality or equal


def read_evaluation(path: Path, metric: str) -> Result:
    """The model's part of what scripts/evaluate.py wrote.

    Raises:
        UserError: the file is missing or damaged, or holds something else.
    """
    remedy = "evaluate again with scripts/evaluate.py"
    values = read_json(path, remedy)
    try:
        result = values["model"]
        cube_points(result, metric), mean_chance(result, metric), result["model"] + ""
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise UserError(
            f"{path} is not what scripts/evaluate.py writes ({error!r}); evaluate again"
        ) from None
    return result


def cube_points(result: Result, metric: str, costs: Costs | None = None) -> list[CubePoint]:
    """Each cut of an evaluated cube, sorted, with what it costs where that was measured."""
    rows_of: dict[Cut, list[dict[str, Any]]] = defaultdict(list)
    for row in result["rows"]:
        rows_of[Cut.of_row(row)].append(row)
    return [
        CubePoint(
            cut,
            rows[0]["parameters"],
            rows[0]["bytes_per_vector"],
            mean_metric(rows, metric),
            rows[0].get("trained", True),
            None if costs is None else costs.of(cut, rows[0]["parameters"]),
        )
        for cut, rows in sorted(rows_of.items())
    ]


def best_choices(points: Sequence[CubePoint]) -> list[CubePoint]:
    """The points that no other one beats, the best one first and, of equal ones, the cheapest."""
    unbeaten = [point for point in points if not any(other.beats(point) for other in points)]
    return sorted(unbeaten, key=lambda point: (-point.quality, point.costs))


def choices_table(points: Sequence[CubePoint]) -> str:
    """The best of these cuts as text."""
    best = best_choices(points)
    facts = [_facts(point, points) for point in best]
    columns = {name: [of_point[name] for of_point in facts] for name in facts[0]}
    return aligned("model", [str(point.cut) for point in best], columns)


def choices_section(
    result: Result, metric: str, title: str, source: str, model: str, costs: Costs | None = None
) -> str:
    """The part of the page to choose a cut from.

    Args:
        source: what the numbers are means over.
        model: what the cuts can be made of.
        costs: what they cost, where that was measured.
    """
    points = cube_points(result, metric, costs)
    groups: dict[str, list[tuple[float, float, str]]] = {
        f"dim {dim}": [] for dim in sizes(result, "dim")
    }
    for point in points:
        facts = _facts(point, points)
        quality = facts.pop("quality")
        text = ", ".join(f"{fact} {name}" for name, fact in facts.items())
        text = f"{point.cut}: {quality}, {text}"
        groups[f"dim {point.cut.dim}"].append((point.parameters, point.quality, text))
    tables = [_rank_table(points, rank) for rank in sizes(result, "rank")]
    return (
        f"<h2>What to choose from: {escape(title)}</h2>"
        f'<p class="note">{escape(metric)}: {escape(MEANING[metric])}; {escape(source)}. '
        f"Every point is a model that can be cut out of {escape(model)} without training.</p>"
        '<div class="charts"><div><h3>Quality and size</h3>'
        f"{scatter_chart(groups, 'parameters', metric)}</div>"
        f"<div><h3>Best for their cost</h3>{_choices(points, costs)}</div></div>"
        f'<h3>All of it</h3><div class="cubes">{"".join(tables)}</div>'
    )


def _facts(point: CubePoint, points: Sequence[CubePoint]) -> dict[str, str]:
    """What a cut costs, then its quality; the columns are the same for all of the points."""
    if any(other.cost for other in points):
        cost = point.cost
        measured = {
            "latency": f"{1000 * cost.latency:.3g} ms" if cost else "",
            "memory": f"{cost.memory / 1e6:,.0f} MB" if cost else "",
        }
    else:
        share = point.cut.depth / max(other.cut.depth for other in points)
        measured = {"of the latency": f"{number_text(100 * share, 0)} %"}
    return {
        "parameters": number_text(point.parameters, short=True),
        **measured,
        "bytes per vector": number_text(point.bytes_per_vector),
        "quality": number_text(point.quality, 3),
    }


def _choices(points: Sequence[CubePoint], costs: Costs | None) -> str:
    note = "No other cut is at most as large, deep and long as one of these, and better. "
    if costs is None:
        note += "Latency is that of the layers run, relative to the deepest."
    else:
        note += (
            f"Latency and memory were measured on {costs.device} ({costs.threads} threads), one "
            f"text at a time: the median over {costs.texts} texts, and the most that was held."
        )
    best = [(point, _facts(point, points)) for point in best_choices(points)]
    lines = ["".join(f"<th>{name}</th>" for name in ("model", *best[0][1]))]
    for point, facts in best:
        lines.append(f"<th>{point.cut}</th>" + "".join(f"<td>{f}</td>" for f in facts.values()))
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<p class="note">{escape(note)}</p><table>{table}</table>'


def _rank_table(points: Sequence[CubePoint], rank: int) -> str:
    """One line per depth, one column per vector length; darker is better over all ranks."""
    quality = {point.cut: point.quality for point in points}
    low, high = min(quality.values()), max(quality.values())
    depths, dims = (sorted({getattr(cut, axis) for cut in quality}) for axis in ("depth", "dim"))
    lines = []
    for depth in depths:
        found = [quality.get(Cut(rank, depth, dim)) for dim in dims]
        cells = [
            "<td></td>" if value is None else _coloured(value, (value - low) / ((high - low) or 1))
            for value in found
        ]
        lines.append(f"<tr><th>depth {depth}</th>{''.join(cells)}</tr>")
    head = "".join(f"<th>dim {dim}</th>" for dim in dims)
    corner = f"<th>{table_name(rank)}</th>"
    return f"<table><tr>{corner}{head}</tr>{''.join(lines)}</table>"


def _coloured(value: float, share: float) -> str:
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(LIGHT, DARK, strict=True))
    ink = "#fff" if share > 0.6 else "#222"
    return (
        f'<td style="background:rgb({red},{green},{blue});color:{ink}">{number_text(value, 3)}</td>'
    )
