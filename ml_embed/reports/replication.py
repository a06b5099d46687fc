"""A replication as tables and as a page with pictures.

A result is what `ml_embed.evaluation.replication.replicate` returns.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ml_embed.evaluation.comparing import ALL, BASELINE, LEVEL, MAIN, RECALL, UNCUT
from ml_embed.evaluation.intervals import SHARE
from ml_embed.evaluation.suites import RESOURCE_CLASSES
from ml_embed.files.atomic import atomic_file
from ml_embed.model_folders.cut import Cut
from ml_embed.reports.charts import interval_chart, scatter_chart
from ml_embed.reports.page import page
from ml_embed.reports.tables import Result, aligned, number_text

Row = Mapping[str, Any]
BELEBELE = (
    "Belebele's questions are the same in all languages, but mteb numbers them in each by itself: "
    "the intervals of means over languages may be too narrow."
)
Table = tuple[str, list[str], dict[str, list[str]]]
"""corner, names, columns"""


def replication_tables(result: Result) -> str:
    """A table per language, one of the groups of languages, and what the words mean."""
    parts = [aligned(*table) for table in _language_tables(result)]
    return "\n\n".join([*parts, aligned(*_macro_table(result)), *_notes(result)])


def write_page(result: Result, path: Path) -> None:
    """The same as one HTML file, with pictures."""
    asked = result["asked"]
    parts = [
        f"<h1>Replication: {escape(asked['model'])} on {escape(asked['suite'])}</h1>",
        *(f'<p class="note">{escape(note)}</p>' for note in _notes(result)),
        f"<h2>Kept quality and parameters</h2>{_kept_chart(result)}",
        f"<h2>Differences from the uncut model, by language</h2>{_difference_charts(result)}",
        "<h2>Groups of languages</h2>",
        _html(_macro_table(result)),
        "<h2>Languages</h2>",
        *map(_html, _language_tables(result)),
        "<h2>Data</h2>",
        _html(_data_table(result)),
    ]
    with atomic_file(path) as partial:
        partial.write_text(page("Replication", parts), encoding="utf-8")


def plan_table(plan: Result) -> str:
    """What a replication would load and compute."""
    tasks = plan["tasks"]
    names = [f"{task['task']}, {task['language']}" for task in tasks]
    columns = {
        "queries": [_count(task["queries"]) for task in tasks],
        "documents": [_count(task["documents"]) for task in tasks],
        "vectors": [_gigabytes(task["vector_bytes"]) for task in tasks],
        "scores known": [f"{task['known']} of {task['systems']}" for task in tasks],
        "data": [f"{task['path']} at {task.get('revision', task.get('digest'))}" for task in tasks],
    }
    cuts = aligned(
        "system",
        [*(str(Cut.of_row(cut)) for cut in plan["cuts"]), *plan["baselines"]],
        {
            "parameters": [number_text(cut["parameters"]) for cut in plan["cuts"]],
            "bytes per vector": [number_text(cut["bytes_per_vector"]) for cut in plan["cuts"]],
            "trained": ["yes" if cut["trained"] else "no" for cut in plan["cuts"]],
        },
    )
    largest = max((task["vector_bytes"] or 0 for task in tasks), default=0)
    return "\n\n".join(
        [
            aligned("task", names, columns),
            cuts,
            f"{plan['rows']} rows; vectors of one task and rank are on disk at a time, at most "
            f"{_gigabytes(largest)} as far as mteb says. Nothing was loaded or computed.",
        ]
    )


def _count(value: int | None) -> str:
    return "?" if value is None else number_text(value)


def _gigabytes(value: int | None) -> str:
    return "?" if value is None else f"{value / 1e9:.3g} GB"


def _language_tables(result: Result) -> list[Table]:
    tables = []
    for language in dict.fromkeys(row["language"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["language"] == language]
        columns = _score_columns(rows) | {
            "texts/s": [_or_empty(r["texts_per_second"]) for r in rows]
        }
        columns |= _comparison_columns(rows)
        tables.append((f"{language}, {rows[0]['queries']:,} queries", _names(rows), columns))
    return tables


def _macro_table(result: Result) -> Table:
    rows = result["macro"]
    groups = [f"{row['group']} ({len(row['languages'])})" for row in rows]
    names = [f"{group}: {name}" for group, name in zip(groups, _names(rows), strict=True)]
    return "mean over languages", names, _score_columns(rows) | _comparison_columns(rows)


def _names(rows: Iterable[Row]) -> list[str]:
    return [_name(row) for row in rows]


def _name(row: Row) -> str:
    if BASELINE in row:
        return row[BASELINE]
    return str(Cut.of_row(row)) + ("" if row["trained"] else " (not trained)")


def _score_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    return {
        "parameters": [_or_empty(row["parameters"]) for row in rows],
        "bytes": [_or_empty(row["bytes_per_vector"]) for row in rows],
        MAIN: [number_text(row[MAIN], 4) for row in rows],
        RECALL: [number_text(row[RECALL], 4) for row in rows],
        "of uncut": ["" if _none(row["ratio"]) else f"{row['ratio']:.1%}" for row in rows],
    }


def _comparison_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Against each reference the difference, its interval and the verdict; and the interaction."""
    references = dict.fromkeys(name for row in rows for name in row.get("against", {}))
    columns = {}
    for name in references:
        found = [row.get("against", {}).get(name) for row in rows]
        columns[f"- {name}"] = [_interval(of["difference"]) if of else "" for of in found]
        columns[f"than {name}"] = [of["verdict"] if of else "" for of in found]
    if any("interaction" in row for row in rows):
        columns["interaction"] = [_interval(row.get("interaction")) for row in rows]
    return columns


def _interval(values: Sequence[float] | None) -> str:
    if values is None or _none(values[0]):
        return ""
    value, low, high = values
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


def _none(value: float | None) -> bool:
    return value is None or math.isnan(value)


def _or_empty(value: float | None) -> str:
    return "" if value is None else number_text(value)


def _notes(result: Result) -> list[str]:
    model = result["model"]
    said: dict[str, dict[str, None]] = {}
    for task in result["tasks"]:
        said.setdefault(task["training_rows"], {})[task["task"]] = None
    training = "; ".join(f"{answer}: {', '.join(tasks)}" for answer, tasks in said.items())
    versions = ", ".join(f"{name} {of}" for name, of in result["versions"].items() if of)
    classes = "; ".join(f"{n}: {codes}" for n, codes in RESOURCE_CLASSES.items())
    return [
        f"{MAIN} and {RECALL} are mteb's, averaged over queries and then over tasks. Parentheses "
        f"hold {SHARE:.0%} of {result['resamples']:,} resamples of the queries (paired bootstrap, "
        f"seed {result['seed']}). Verdicts of a language are at {LEVEL:g} after Holm's rule over "
        "the languages of a cut; those of groups are without it. Interaction is q(rank, depth, "
        "dim) - q(rank) q(depth) q(dim), q the share of the uncut quality that is kept: where it "
        "is 0, the losses of the axes multiply.",
        *([BELEBELE] if result["asked"]["suite"] == "belebele" else []),
        f"Training rows of the tasks in the model's data, by the names that its folder gives: "
        f"{training}.",
        f"Model {result['asked']['model']}, content {model['revision']}, on {model['device']}, "
        f"{model['dtype']}, {model['threads']} threads; {versions}.",
        "Resource classes (Joshi et al. 2020, lang2tax.txt): " + classes + ".",
    ]


def _data_table(result: Result) -> Table:
    tasks = result["tasks"]
    return (
        "task",
        [f"{task['task']}, {task['language']}" for task in tasks],
        {
            "queries": [number_text(task["queries"]) for task in tasks],
            "documents": [number_text(task["documents"]) for task in tasks],
            "source": [
                f"{of['path']} {of.get('revision', '')}" for of in (t["source"] for t in tasks)
            ],
            "digest": [task["digest"] for task in tasks],
            "training rows": [task["training_rows"] for task in tasks],
        },
    )


def _html(table: Table) -> str:
    corner, names, columns = table
    head = "".join(f"<th>{escape(title)}</th>" for title in (corner, *columns))
    lines = [
        f"<th>{escape(name)}</th>"
        + "".join(f"<td>{escape(of[i]) if i < len(of) else ''}</td>" for of in columns.values())
        for i, name in enumerate(names)
    ]
    body = "".join(f"<tr>{line}</tr>" for line in (head, *lines))
    return f"<table>{body}</table>"


def _kept_chart(result: Result) -> str:
    """Share of the uncut quality over parameters, a colour for each group of languages."""
    groups: dict[str, list[tuple[float, float, str]]] = {}
    for row in result["macro"]:
        if BASELINE not in row and not _none(row["ratio"]):
            text = f"{_name(row)}: {row['ratio']:.1%}"
            groups.setdefault(row["group"], []).append((row["parameters"], row["ratio"], text))
    return scatter_chart(groups, "parameters", f"{MAIN} / uncut")


def _difference_charts(result: Result) -> str:
    """A picture per cut: each language's difference with its interval, the mean at the end."""
    charts = []
    rows = [row for row in result["rows"] if UNCUT in row.get("against", {})]
    for cut in sorted({Cut.of_row(row) for row in rows}):
        lines = {
            row["language"]: row["against"][UNCUT]["difference"]
            for row in rows
            if Cut.of_row(row) == cut
        }
        for row in result["macro"]:
            if BASELINE not in row and row["group"] == ALL and Cut.of_row(row) == cut:
                lines["mean"] = row["against"][UNCUT]["difference"]
        chart = interval_chart(lines, f"{MAIN} less that of the uncut model")
        charts.append(f"<div><h3>{escape(str(cut))}</h3>{chart}</div>")
    return f'<div class="charts">{"".join(charts)}</div>'
