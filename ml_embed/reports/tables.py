"""An evaluated cube as tables that a newcomer can read."""

from collections.abc import Iterable, Mapping
from typing import Any

from ml_embed.model_folders.cut import Cut, table_name

Result = dict[str, Any]
"""what `evaluate_cube` returns"""
MEANING = {
    "recall@1": "how often the right passage is ranked first",
    "mrr@10": "mean of 1 / rank of the right passage, 0 beyond rank 10",
    "ndcg@10": "mean of 1 / log2(1 + rank) of the right passage, 0 beyond rank 10",
}


def contamination_table(report: Mapping[str, Any]) -> str:
    """What `contamination_report` found: rows of the data, and how much of the benchmark."""
    whole = {_place(row): row for row in report["benchmark"]}
    rows = report["matches"]
    columns = {name: [row[name] for row in rows] for name in ("task", "language", "role")}
    columns |= {name: [number_text(row[name]) for row in rows] for name in ("exact", "near")}
    parts = [whole[_place(row)] for row in rows]
    columns["of the benchmark"] = [f"{part['found']:,}/{part['texts']:,}" for part in parts]
    return aligned("data", [row["dataset"] for row in rows], columns)


def _place(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["task"], row["language"], row["role"]


def sizes(result: Result, axis: str) -> list[int]:
    """The values of "rank", "depth" or "dim" in a result, ascending."""
    return sorted({row[axis] for row in result["rows"]})


def rows_of_cut(result: Result, cut: Cut) -> list[dict[str, Any]]:
    """One row per test set."""
    return [row for row in result["rows"] if Cut.of_row(row) == cut]


def largest_cut(result: Result) -> Cut:
    """The least cut model looked at."""
    return Cut(*(sizes(result, axis)[-1] for axis in ("rank", "depth", "dim")))


def number_text(value: float, decimals: int | None = None, short: bool = False) -> str:
    """A number as every table, page and picture shows it.

    Args:
        decimals: digits after the point; None writes whole numbers exactly (1,234,567) and others
            to four digits (0.1235, 1e-05).
        short: large numbers with a letter, thousands, millions, billions: 45k, 1.2M, 3B.
    """
    if decimals is not None:
        return f"{value:.{decimals}f}"
    for limit, unit, letter in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if short and abs(value) >= limit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:,}" if isinstance(value, int) and not short else f"{value:.4g}"


def mean_metric(rows: Iterable[dict[str, Any]], metric: str) -> float:
    """Mean over test sets, each counting the same."""
    values = [row[metric] for row in rows]
    return sum(values) / len(values)


def mean_chance(result: Result, metric: str) -> float:
    """What a random order achieves, as the mean over test sets."""
    return mean_metric([row["chance"] for row in rows_of_cut(result, largest_cut(result))], metric)


def test_set_table(
    result: Result,
    baseline: Result | None,
    metric: str,
    others: Mapping[str, list[dict[str, Any]]],
) -> str:
    """One line per test set: chance, baselines if there are any, and the least cut model.

    `others`: name of a baseline that has no cuts -> a row per test set.
    """
    whole = largest_cut(result)
    after = rows_of_cut(result, whole)
    columns = {
        "queries": [number_text(row["queries"]) for row in after],
        "candidates": [number_text(row["candidates"], 0) for row in after],
        "chance": _with_mean([row["chance"][metric] for row in after]),
    }
    header = f"{metric}: {MEANING[metric]}.\nafter = {result['model']} ({whole})"
    for name, rows in others.items():
        columns[name] = _with_mean([row[metric] for row in rows])
    if baseline is not None:
        cut = largest_cut(baseline)
        columns["before"] = _with_mean([row[metric] for row in rows_of_cut(baseline, cut)])
        header += f"\nbefore = {baseline['model']} ({cut})"
    columns["after"] = _with_mean([row[metric] for row in after])
    names = [f"{row['dataset']} / {row['split']}" for row in after]
    return header + "\n\n" + aligned("test set", [*names, "mean"], columns)


def cube_tables(result: Result, metric: str) -> str:
    """Mean over test sets: one table per rank, with a line per depth and a column per dim."""
    depths, dims = sizes(result, "depth"), sizes(result, "dim")
    chance = number_text(mean_chance(result, metric), 3)
    parts = [f"mean {metric} by depth (lines) and vector length (columns); chance is {chance}"]
    for rank in sizes(result, "rank"):
        rows = [[rows_of_cut(result, Cut(rank, depth, dim)) for dim in dims] for depth in depths]
        columns = {"parameters": [number_text(line[0][0]["parameters"]) for line in rows]}
        columns |= {
            f"dim {dim}": [number_text(mean_metric(line[i], metric), 3) for line in rows]
            for i, dim in enumerate(dims)
        }
        parts.append(aligned(table_name(rank), [f"depth {depth}" for depth in depths], columns))
    return "\n\n".join(parts)


def _with_mean(values: list[float]) -> list[str]:
    return [number_text(value, 3) for value in (*values, sum(values) / len(values))]


def precision_table(result: Result, metric: str) -> str:
    """Mean over test sets of vectors in fewer bits: equal bytes stand together, the best first."""
    of_kind: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for row in result["precisions"]:
        kind = row["bytes_per_vector"], row["dim"], row["precision"]
        of_kind.setdefault(kind, []).append(row)
    lines = []
    for (size, dim, precision), rows in of_kind.items():
        rescored = mean_metric([row["rescored"] for row in rows], metric)
        lines.append((-size, -rescored, dim, precision, mean_metric(rows, metric)))
    columns: dict[str, list[str]] = {"bytes": [], metric: [], "rescored": []}
    for size, rescored, _, _, found in sorted(lines):
        for title, text in zip(
            columns,
            (number_text(-size), number_text(found, 3), number_text(-rescored, 3)),
            strict=True,
        ):
            columns[title].append(text)
    header = (
        f"mean {metric} by bytes of a vector, at the largest rank and depth; rescored = queries in "
        "float32\n\n"
    )
    names = [f"dim {dim}, {precision}" for _, _, dim, precision, _ in sorted(lines)]
    return header + aligned("vectors", names, columns)


def mixed_table(result: Result, baseline: Result | None, metric: str) -> str:
    """What queries of each language find in one corpus of all languages, at the largest cut."""
    rows = rows_by_language(result, largest_cut(result))
    columns = {name: [number_text(row[name]) for row in rows] for name in ("queries", "documents")}
    for where in ("within", "mixed"):
        columns[where] = _with_mean([row[where][metric] for row in rows])
    if baseline is not None:
        before = rows_by_language(baseline, largest_cut(baseline))
        columns["before, mixed"] = _with_mean([row["mixed"][metric] for row in before])
    columns["own@10"] = _with_mean([row["own_language@10"] for row in rows])
    columns["by chance"] = _with_mean([row["own_language_share"] for row in rows])
    header = (
        f"{metric} by language: within = among documents of the query's language, mixed = among "
        "those of all.\nown@10 = share of the query's language among the 10 nearest wrong "
        "documents; by chance = among all"
    )
    return f"{header}\n\n" + aligned("language", [*(r["language"] for r in rows), "mean"], columns)


def rows_by_language(result: Result, cut: Cut) -> list[dict[str, Any]]:
    return [row for row in result["languages"] if Cut.of_row(row) == cut]


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


def language_tables(summary: Mapping[str, Any]) -> str:
    """For each task with several languages: one line per language, one column per cut."""
    tables = []
    for task in dict.fromkeys(row["task"] for row in summary["rows"]):
        rows = [row for row in summary["rows"] if row["task"] == task]
        languages = rows[0]["languages"]
        if len(languages) < 2:
            continue
        columns = {"subsets": [str(of["subsets"]) for of in languages.values()]}
        for row in rows:
            scores = [number_text(of["score"], 4) for of in row["languages"].values()]
            columns[str(Cut.of_row(row))] = [*scores, number_text(row["score"], 4)]
        tables.append(aligned(task, [*languages, "task"], columns))
    return "\n\n".join(tables)


def summary_table(summary: Mapping[str, Any]) -> str:
    """One line per cut: parameters, the score of each task, and their mean."""
    scores = {(row["task"], Cut.of_row(row)): row["score"] for row in summary["rows"]}
    parameters = {Cut.of_row(row): row["parameters"] for row in summary["rows"]}
    tasks = list(dict.fromkeys(row["task"] for row in summary["rows"]))
    columns = {"parameters": [number_text(count) for count in parameters.values()]}
    for task in tasks:
        columns[task] = [number_text(scores[task, cut], 4) for cut in parameters]
    columns["mean"] = [
        number_text(sum(scores[task, cut] for task in tasks) / len(tasks), 4) for cut in parameters
    ]
    return aligned("cut", [str(cut) for cut in parameters], columns)
