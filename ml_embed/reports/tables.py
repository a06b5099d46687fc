"""An evaluated cube as tables that a newcomer can read."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


Result = dict[str, Any]
MEANING = {
    "recall@1": "how often the right passage is ranked first",
    "mrr@10": "mean of 1 / rank of the right passage, 0 beyond rank 10",
    "ndcg@10": "mean of 1 / log2(1 + rank) of the right passage, 0 beyond rank 10",
}


def sizes(result: Result, axis: str) -> list[int]:
    """The values of "rank", "depth" or "dim" in a result, ascending."""
    return sorted({row[axis] for row in result["rows"]})


def rows_of_cell(result: Result, rank: int, depth: int, dim: int) -> list[dict[str, Any]]:
    """One row a test set."""
    return [
        row
        for row in result["rows"]
        if (row["rank"], row["depth"], row["dim"]) == (rank, depth, dim)
    ]


def largest_cell(result: Result) -> tuple[int, int, int]:
    """rank, depth, dim of the least cut model looked at."""
    return sizes(result, "rank")[-1], sizes(result, "depth")[-1], sizes(result, "dim")[-1]


def mean_metric(rows: Iterable[dict[str, Any]], metric: str) -> float:
    """Mean over test sets, each counting the same."""
    values = [row[metric] for row in rows]
    return sum(values) / len(values)


def mean_chance(result: Result, metric: str) -> float:
    """What a random order achieves, as the mean over test sets."""
    return mean_metric(
        [row["chance"] for row in rows_of_cell(result, *largest_cell(result))], metric
    )


def model_name(rank: int, depth: int, dim: int) -> str:
    table = f"rank {rank}" if rank else "whole token table"
    return f"depth {depth}, dim {dim}, {table}"


def test_set_table(result: Result, baseline: Result | None, metric: str) -> str:
    """One line a test set: chance, before (if there is a baseline), after, of the least cut
    models."""
    cell = largest_cell(result)
    after = rows_of_cell(result, *cell)
    names = [f"{row['dataset']} / {row['split']}" for row in after]
    columns: dict[str, list[str]] = {
        "queries": [str(row["queries"]) for row in after],
        "candidates": [f"{row['candidates']:.0f}" for row in after],
        "chance": _with_mean([row["chance"][metric] for row in after]),
    }
    header = f"{metric}: {MEANING[metric]}.\nafter = {result['model']} ({model_name(*cell)})"
    if baseline is not None:
        whole = largest_cell(baseline)
        columns["before"] = _with_mean([row[metric] for row in rows_of_cell(baseline, *whole)])
        header += f"\nbefore = {baseline['model']} ({model_name(*whole)})"
    columns["after"] = _with_mean([row[metric] for row in after])
    return header + "\n\n" + aligned("test set", [*names, "mean"], columns)


def cube_tables(result: Result, metric: str) -> str:
    """Mean over test sets: one table a rank, with a line a depth and a column a vector length."""
    blocks = [
        f"mean {metric} by depth (lines) and vector length (columns); chance is "
        f"{mean_chance(result, metric):.3f}"
    ]
    for rank in sizes(result, "rank"):
        depths, dims = sizes(result, "depth"), sizes(result, "dim")
        columns = {
            f"dim {dim}": [
                f"{mean_metric(rows_of_cell(result, rank, depth, dim), metric):.3f}"
                for depth in depths
            ]
            for dim in dims
        }
        parameters = [
            rows_of_cell(result, rank, depth, dims[0])[0]["parameters"] for depth in depths
        ]
        columns = {"parameters": [f"{count:,}" for count in parameters]} | columns
        table = f"rank {rank}" if rank else "whole token table"
        blocks.append(aligned(table, [f"depth {depth}" for depth in depths], columns))
    return "\n\n".join(blocks)


def _with_mean(values: list[float]) -> list[str]:
    return [f"{value:.3f}" for value in (*values, sum(values) / len(values))]


def aligned(corner: str, names: list[str], columns: dict[str, list[str]]) -> str:
    """Names to the left, numbers to the right; a short column leaves its last cells empty."""
    left = max(map(len, (corner, *names)))
    widths = {title: max(map(len, (title, *cells))) for title, cells in columns.items()}
    lines = [corner.ljust(left) + "".join(f"  {title:>{width}}" for title, width in widths.items())]
    for i, name in enumerate(names):
        cells = (columns[title][i] if i < len(columns[title]) else "" for title in widths)
        lines.append(
            name.ljust(left)
            + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths.values(), strict=True))
        )
    return "\n".join(lines)


def summary_table(summary: Mapping[str, Any]) -> str:
    """A line a cut: parameters, the score of each task, and their mean."""
    rows = summary["rows"]
    cuts = list(dict.fromkeys((row["rank"], row["depth"], row["dim"]) for row in rows))
    scores = {(row["task"], row["rank"], row["depth"], row["dim"]): row["score"] for row in rows}
    parameters = {(row["rank"], row["depth"], row["dim"]): row["parameters"] for row in rows}
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = {"parameters": [f"{parameters[cut]:,}" for cut in cuts]}
    columns |= {task: [f"{scores[task, *cut]:.4f}" for cut in cuts] for task in tasks}
    columns["mean"] = [
        f"{sum(scores[task, *cut] for task in tasks) / len(tasks):.4f}" for cut in cuts
    ]
    return aligned("cut", [model_name(*cut) for cut in cuts], columns)
