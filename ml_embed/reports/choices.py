"""The part of a run's page to choose a cut from: quality and costs of every cut.

A picture of quality over size, a table of the cuts that no other one beats, and tables of all.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ml_embed.model_folders.cut import Cut, table_name
from ml_embed.reports.charts import scatter_chart
from ml_embed.reports.tables import MEANING, Result, mean_metric, number_text, sizes

LIGHT, DARK = (247, 251, 255), (33, 113, 181)  # of table cells: worst to best


@dataclass(frozen=True)
class CubePoint:
    """A cut, what it costs, and how good it is."""

    cut: Cut
    parameters: int
    bytes_per_vector: int
    quality: float
    """mean of a metric over test sets"""

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


def cube_points(result: Result, metric: str) -> list[CubePoint]:
    """Each cut of an evaluated cube, sorted."""
    rows_of: dict[Cut, list[dict[str, Any]]] = defaultdict(list)
    for row in result["rows"]:
        rows_of[Cut.of_row(row)].append(row)
    return [
        CubePoint(
            cut, rows[0]["parameters"], rows[0]["bytes_per_vector"], mean_metric(rows, metric)
        )
        for cut, rows in sorted(rows_of.items())
    ]


def best_choices(points: Sequence[CubePoint]) -> list[CubePoint]:
    """The points that no other one beats."""
    return [point for point in points if not any(other.beats(point) for other in points)]


def choices_section(result: Result, metric: str, title: str, source: str, model: str) -> str:
    """The part of the page to choose a cut from.

    Args:
        source: what the numbers are means over.
        model: what the cuts can be made of.
    """
    points = cube_points(result, metric)
    deepest = max(point.cut.depth for point in points)
    groups: dict[str, list[tuple[float, float, str]]] = {
        f"dim {dim}": [] for dim in sizes(result, "dim")
    }
    for point in points:
        quality, parameters, latency, size = _facts(point, deepest)
        text = (
            f"{point.cut}: {quality}, {parameters} parameters, {latency} of the latency, "
            f"{size} bytes per vector"
        )
        groups[f"dim {point.cut.dim}"].append((point.parameters, point.quality, text))
    tables = [_rank_table(points, rank) for rank in sizes(result, "rank")]
    return (
        f"<h2>What to choose from: {escape(title)}</h2>"
        f'<p class="note">{escape(metric)}: {escape(MEANING[metric])}; {escape(source)}. '
        f"Every point is a model that can be cut out of {escape(model)} without training.</p>"
        '<div class="charts"><div><h3>Quality and size</h3>'
        f"{scatter_chart(groups, 'parameters', metric)}</div>"
        f"<div><h3>Best for their cost</h3>{_choices(points, deepest)}</div></div>"
        f'<h3>All of it</h3><div class="cubes">{"".join(tables)}</div>'
    )


def _facts(point: CubePoint, deepest: int) -> tuple[str, str, str, str]:
    """Quality, parameters, latency relative to the deepest, bytes per vector."""
    return (
        number_text(point.quality, 3),
        number_text(point.parameters, short=True),
        f"{number_text(100 * point.cut.depth / deepest, 0)} %",
        number_text(point.bytes_per_vector),
    )


def _choices(points: Sequence[CubePoint], deepest: int) -> str:
    names = ("model", "parameters", "relative latency", "bytes per vector", "quality")
    lines = ["".join(f"<th>{name}</th>" for name in names)]
    for point in sorted(best_choices(points), key=lambda point: -point.quality):
        quality, *costs = _facts(point, deepest)
        facts = "".join(f"<td>{fact}</td>" for fact in (*costs, quality))
        lines.append(f"<th>{point.cut}</th>{facts}")
    note = "No other cut is at most as large, deep and long as one of these, and better. "
    note += "Latency is that of the layers run, relative to the deepest."
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<p class="note">{note}</p><table>{table}</table>'


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
