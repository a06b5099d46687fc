"""Nested cuts beside models trained alone: the table, the page and the picture.

A result is what `ml_embed.benchmarks.dedicated.compare` returns.
"""

from html import escape
from pathlib import Path
from typing import Any

from ml_embed.evaluation.intervals import RESAMPLES, SHARE
from ml_embed.files.atomic import atomic_file
from ml_embed.model_folders.cut import Cut
from ml_embed.reports.page import page
from ml_embed.reports.plots import require_matplotlib
from ml_embed.reports.tables import Result, aligned, number_text

NOTE = (
    f"An interval holds {SHARE:.0%} of {RESAMPLES:,} resamples of the queries (paired bootstrap), "
    "within one seed; where it holds 0, the two cannot be told apart by these queries. The "
    "interaction is q(rank, depth, dim) - q(rank) q(depth) q(dim), q the share of the uncut "
    "quality that is kept: 0 says that the losses of the axes multiply."
)


def comparison_table(result: Result) -> str:
    """One line per cut: nested, alone, their difference, its range over seeds, mean intervals."""
    rows = result["rows"]
    columns = {
        "nested": [_three(row["nested"]) for row in rows],
        "alone": [_three(row["alone"]) for row in rows],
        "difference": [_signed(row["difference"]) for row in rows],
        "over seeds": [_range(*row["range"]) for row in rows],
        "within a seed": [_range(*_mean_limits(row, "difference")) for row in rows],
        "interaction": [_interaction(row) for row in rows],
    }
    return aligned(result["metric"], [str(Cut.of_row(row)) for row in rows], columns)


def write_page(result: Result, path: Path) -> None:
    """The same as HTML, with each seed's numbers."""
    names = ("cut", "seed", "nested", "alone", "difference", "interval", "interaction", "interval")
    lines = ["".join(f"<th>{name}</th>" for name in names)]
    for row in result["rows"]:
        lines += [_line(row, own) for own in row["seeds"]]
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    rates = "; ".join(f"{name}: {own['best']:g}" for name, own in result["learning_rates"].items())
    taught = " The nested run learned from the whole model alone." if result["taught"] else ""
    parts = [
        "<h1>Nested cuts beside models trained alone</h1>",
        f'<p class="note">{escape(result["metric"])} on {escape(result["data"])}.{taught}</p>',
        f'<p class="note">{escape(NOTE)}</p>',
        f"<table>{table}</table>",
        f'<p class="note">Learning rates: {escape(rates)}.</p>',
    ]
    with atomic_file(path) as partial:
        partial.write_text(page("Nested and alone", parts), encoding="utf-8")


def plot_comparison(result: Result, path: Path) -> None:
    """Write a picture of both at each cut, over seeds, as a .png file.

    Raises:
        UserError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = result["rows"]
    figure = Figure(figsize=(7, 0.5 * len(rows) + 1.4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for shift, name, colour in ((-0.12, "nested", "#0072B2"), (0.12, "alone", "#D55E00")):
        for place, row in enumerate(rows):
            values = [100 * own[name] for own in row["seeds"]]
            axis.plot([min(values), max(values)], [place + shift] * 2, color=colour, linewidth=1.5)
            axis.plot(
                100 * row[name], place + shift, "o", color=colour, label=name if not place else None
            )
    axis.set_yticks(range(len(rows)), [str(Cut.of_row(row)) for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel(
        f"{result['metric']} in %; lines are the range over {len(result['seeds'])} seeds"
    )
    axis.legend(frameon=False)
    figure.savefig(path)


def _line(row: dict[str, Any], own: dict[str, Any]) -> str:
    cells = [str(own["seed"]), _three(own["nested"]), _three(own["alone"])]
    for name in ("difference", "interaction"):
        cells += [_signed(own[name][0]), _range(*own[name][1:])] if name in own else ["", ""]
    return f"<th>{Cut.of_row(row)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells)


def _mean_limits(row: dict[str, Any], name: str) -> list[float]:
    """The mean over seeds of an interval's ends."""
    return [sum(own[name][end] for own in row["seeds"]) / len(row["seeds"]) for end in (1, 2)]


def _interaction(row: dict[str, Any]) -> str:
    if not all("interaction" in own for own in row["seeds"]):
        return ""
    mean = sum(own["interaction"][0] for own in row["seeds"]) / len(row["seeds"])
    return f"{_signed(mean)} ({_range(*_mean_limits(row, 'interaction'))})"


def _three(value: float) -> str:
    return number_text(value, 3)


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _range(low: float, high: float) -> str:
    return f"{low:+.3f} to {high:+.3f}"
