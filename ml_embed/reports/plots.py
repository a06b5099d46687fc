"""The quality of a cube as a picture: depth by vector length, one panel per rank."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from ml_embed.errors import UserError
from ml_embed.model_folders.cut import Cut, table_name
from ml_embed.reports.tables import (
    Result,
    largest_cut,
    mean_chance,
    mean_metric,
    number_text,
    rows_of_cut,
    sizes,
)

COLOURS = "cividis"  # made to look the same with and without colour-blindness, and in grey
CELL_INCHES = (0.62, 0.46)


def require_matplotlib() -> None:
    """Raises UserError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "the picture needs matplotlib, which is not installed; pip install 'ml-embed[plot]'"
        )


def plot_cube(
    result: Result, path: Path, metric: str = "recall@1", baseline: Result | None = None
) -> None:
    """Write a heat map of the mean of a metric over test sets, in percent, as a .png file.

    A baseline stands to the left as "before", in the same colours. The scale begins at chance.

    Raises:
        UserError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    panels = _panels(result, metric, baseline)
    chance = 100 * mean_chance(result, metric)
    highest = max(np.nanmax(grid) for _, grid in panels)
    scale = Normalize(chance, max(highest, chance + 1))
    depths, dims = sizes(result, "depth"), sizes(result, "dim")

    # Not pyplot: it would keep the figure, and look for a screen.
    width = len(panels) * (CELL_INCHES[0] * len(dims) + 0.35) + 1.6
    figure = Figure(
        figsize=(max(width, 5.5), CELL_INCHES[1] * len(depths) + 2.0), layout="constrained", dpi=150
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, grid) in zip(axes, panels, strict=True):
        image = _draw_panel(axis, grid, scale, depths, dims)
        axis.set_title(title, fontsize=10)
    axes[0].set_ylabel("depth (decoder layers)")
    figure.supxlabel("vector length (dimensions)", fontsize=10)
    test_sets = len(rows_of_cut(result, largest_cut(result)))
    over = f"mean over {test_sets} test sets" if test_sets > 1 else "one test set"
    figure.suptitle(f"{metric} in %, {over} (chance {number_text(chance, 1)} %)", fontsize=12)
    _draw_scale(figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02), scale, chance)
    figure.savefig(path)


def _panels(result: Result, metric: str, baseline: Result | None) -> list[tuple[str, np.ndarray]]:
    """Title and grid of each panel."""
    panels = [(_title(result, rank), _grid(result, rank, metric)) for rank in sizes(result, "rank")]
    if baseline is None:
        return panels
    rank = largest_cut(baseline).rank
    before = "before\n" + _title(baseline, rank), _grid(baseline, rank, metric, like=result)
    return [before, *(("after\n" + title, grid) for title, grid in panels)]


def _draw_scale(bar: Any, scale: Any, chance: float) -> None:
    """Ticks that begin at "chance", and leave it space."""
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    space = 0.06 * (scale.vmax - scale.vmin)
    ticks = [tick for tick in bar.get_ticks() if chance + space < tick <= scale.vmax]
    bar.set_ticks([chance, *ticks], labels=["chance", *(number_text(tick, 0) for tick in ticks)])


def _title(result: Result, rank: int) -> str:
    cut = dataclasses.replace(largest_cut(result), rank=rank)
    parameters = number_text(rows_of_cut(result, cut)[0]["parameters"], short=True)
    return f"{table_name(rank)}\n{parameters} parameters at depth {cut.depth}"


def _grid(result: Result, rank: int, metric: str, like: Result | None = None) -> np.ndarray:
    """(depths, dims) percent, at the sizes of `like`; NaN where the result has no such cut."""
    like = like or result
    grid = np.full((len(sizes(like, "depth")), len(sizes(like, "dim"))), np.nan)
    for i, depth in enumerate(sizes(like, "depth")):
        for j, dim in enumerate(sizes(like, "dim")):
            rows = rows_of_cut(result, Cut(rank, depth, dim))
            if rows:
                grid[i, j] = 100 * mean_metric(rows, metric)
    return grid


def _draw_panel(axis: Any, grid: np.ndarray, scale: Any, depths: list[int], dims: list[int]) -> Any:
    image = axis.imshow(grid, cmap=COLOURS, norm=scale, origin="lower", aspect="auto")
    axis.set_xticks(range(len(dims)), labels=dims)
    axis.set_yticks(range(len(depths)), labels=depths)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    # White lines between cells.
    axis.set_xticks(np.arange(len(dims) - 1) + 0.5, minor=True)
    axis.set_yticks(np.arange(len(depths) - 1) + 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="minor", length=0)
    for (i, j), value in np.ndenumerate(grid):
        if not np.isnan(value):
            colour = "black" if scale(value) > 0.55 else "white"
            axis.text(
                j, i, number_text(value, 1), ha="center", va="center", color=colour, fontsize=9
            )
    return image
