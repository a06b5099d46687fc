"""A run by the languages of its data: what was drawn of each, and how losses and retrieval went."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ml_embed.reports.charts import Point, line_chart
from ml_embed.reports.tables import number_text

PREFIX = "language/"
"""How the names of numbers by language begin in metrics.jsonl: language/<code>/<name>."""
CHARTED = 7
"""languages with curves: those with most samples; as many as there are colours"""
CHARTS = {
    "training_loss_hard": "Training: loss over hard negatives",
    "training_loss_in_batch": "Training: in-batch loss",
    "valid_loss_hard": "Validation: loss over hard negatives",
    "valid_loss_in_batch": "Validation: in-batch loss",
    "ndcg@10": "Validation: nDCG@10",
}
COLUMNS = ("rows", "samples", "share", "tokens", *CHARTS)


def languages_section(resolved: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    """A table of all languages and curves of the largest ones; "" where the data says none."""
    series = _by_language(lines)
    if not series:
        return ""
    sums = {
        code: {name: sum(value for _, value in own.get(name, ())) for name in ("samples", "tokens")}
        for code, own in series.items()
    }
    largest = sorted(series, key=lambda code: (-sums[code]["samples"], code))
    rows = {code: own["rows"] for code, own in (resolved.get("languages") or {}).items()}
    total = sum(own["samples"] for own in sums.values())
    cells = []
    for code in largest:
        drawn = sums[code]["samples"]
        values = [rows.get(code), drawn, f"{drawn / total:.2%}" if total else None]
        values += [sums[code]["tokens"]]
        values += [series[code][name][-1][1] if name in series[code] else None for name in CHARTS]
        shown = "".join(f"<td>{'' if v is None else _text(v)}</td>" for v in values)
        cells.append(f"<tr><th>{escape(code)}</th>{shown}</tr>")
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in ("", *COLUMNS))
    return (
        f"<h2>Languages</h2><p>Samples and tokens that were trained on, and the newest losses and "
        f"nDCG@10.</p><table><tr>{head}</tr>{''.join(cells)}</table>{_curves(series, largest)}"
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else number_text(value)


def _by_language(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Point]]]:
    """code -> name -> (step, value) points."""
    series: dict[str, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        for key, value in line.items():
            if key.startswith(PREFIX) and isinstance(value, int | float):
                code, _, name = key.removeprefix(PREFIX).rpartition("/")
                series[code][name].append((line["step"], value))
    return series


def _curves(series: Mapping[str, Mapping[str, list[Point]]], largest: Sequence[str]) -> str:
    boxes = []
    for name, title in CHARTS.items():
        curves = {code: series[code].get(name, []) for code in largest[:CHARTED]}
        picture = line_chart(curves, "optimizer step", "nDCG@10" if "ndcg" in name else "loss")
        if picture:
            boxes.append(f"<div><h3>{title}, by language</h3>{picture}</div>")
    return f'<div class="charts">{"".join(boxes)}</div>'
