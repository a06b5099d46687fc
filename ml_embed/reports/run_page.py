"""A run as one self-contained HTML page: curves from metrics.jsonl and the cube to choose from, as
it was evaluated and as validation measured it."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ml_embed.errors import UserError
from ml_embed.evaluation.cells import BYTES_PER_COMPONENT, Cell, cell_of_name
from ml_embed.evaluation.metrics import METRICS
from ml_embed.reports.charts import Point, line_chart, number_text, scatter_chart
from ml_embed.reports.tables import (
    MEANING,
    Result,
    mean_chance,
    mean_metric,
    model_name,
    rows_of_cell,
    sizes,
)

AXES = ("rank", "depth", "dim")
Line = Mapping[str, Any]


def grid_values(line: Line) -> dict[tuple[str, Cell], dict[str, float]]:
    """The numbers of a validation line by dataset and cell: {metric: value}; empty for a run
    without a grid."""
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
    """The newest validation's step and its numbers, like those of an evaluated cube; None for a run
    without a grid.

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
    """Parameters of a cut of a run's model: token factors (rank 0: the whole table), `depth`
    layers, one final norm."""
    table = resolved["embedding_parameters"]
    if rank:
        table = table // max(resolved["ranks"]) * rank
    return table + depth * resolved["layer_parameters"] + max(resolved["dims"])


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 76rem;
  padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
h3 { font-size: 1rem; margin: 0 0 .25rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1.5rem }
.charts > div { min-width: 0 } svg { width: 100%; height: auto; display: block }
svg text { font-size: 11px; fill: #444 }
.axis { stroke: #444 } .grid { stroke: #ddd; stroke-width: .7 }
.legend { margin: .25rem 0 0; font-size: 13px }
.legend span { margin-right: 1rem; white-space: nowrap }
.key { display: inline-block; width: 22px; height: 10px; margin-right: .35rem }
table { border-collapse: collapse; margin: .5rem 1.5rem 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child { text-align: left; white-space: nowrap }
.cubes { display: flex; flex-wrap: wrap } .note { color: #555; font-size: 14px; max-width: 52rem }
"""
SHOWN = ("world_size", "global_batch_size", "total_steps", "parameters", "exits", "dims", "ranks")
LIGHT, DARK = (247, 251, 255), (33, 113, 181)  # of table cells: worst to best


def write_report(
    run_dir: Path, output: Path, evaluation: Path | None = None, metric: str = "ndcg@10"
) -> None:
    """Write the page.

    Args:
        run_dir: output_dir/experiment_id of a run, finished or not.
        output: the .html file.
        evaluation: evaluation.json, or its folder; None takes it from the run folder if it is
            there.
        metric: which one is shown of an evaluation and of the validation grid.
    Raises:
        UserError: the run folder has no metrics, or a file is damaged.
    """
    lines = read_metrics(run_dir / "metrics.jsonl")
    resolved = (
        _read_json(run_dir / "resolved.json") if (run_dir / "resolved.json").is_file() else {}
    )
    if evaluation is None:
        evaluation = next(
            (f for f in (run_dir, run_dir / "evaluation") if (f / "evaluation.json").is_file()),
            None,
        )
    parts = [
        f"<h1>{escape(run_dir.resolve().name)}</h1>",
        _summary(resolved, lines),
        _curves(lines, metric),
    ]
    if evaluation is not None:
        path = evaluation / "evaluation.json" if evaluation.is_dir() else evaluation
        evaluated = _read_json(path)
        try:
            parts.append(_evaluated_cube(evaluated["model"], metric))
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise UserError(
                f"{path} is not what scripts/evaluate.py writes ({error!r}); evaluate again"
            ) from None
    validated = grid_result(resolved, lines)
    if validated is not None:
        step, result = validated
        source = f"mean over the datasets' held-out rows after step {step}"
        parts.append(
            _cube(result, metric, f"{metric} on held-out rows", source, "this run's model folders")
        )
    title = escape(f"{run_dir.resolve().name} - training report")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{output} cannot be written ({error.strerror}); choose another --output"
        ) from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that is being written is left out. Raises
    UserError."""
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give a run folder, output_dir/experiment_id"
        ) from None
    lines = []
    for number, line in enumerate(
        content.split("\n")[:-1], start=1
    ):  # what follows the last line end is not whole
        try:
            values = json.loads(line)
            values["split"], values["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}, line {number} is damaged ({error})") from None
        lines.append(values)
    if not lines:
        raise UserError(f"{path} has no lines yet; wait for the first log line of the run")
    return lines


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None


def _summary(resolved: Mapping[str, Any], lines: list[dict[str, Any]]) -> str:
    facts = {
        "last step logged": lines[-1]["step"],
        **{key: resolved[key] for key in SHOWN if key in resolved},
    }
    train = [line for line in lines if line["split"] == "train"]
    if train:
        facts["tokens trained on"] = sum(line["tokens"] for line in train)
        facts["last loss"] = train[-1]["loss"]
    rows = "".join(
        f"<tr><th>{escape(key.replace('_', ' '))}</th><td>{_fact(facts[key])}</td></tr>"
        for key in facts
    )
    return f"<table>{rows}</table>"


def _fact(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _curves(lines: list[dict[str, Any]], metric: str) -> str:
    train = _series(line for line in lines if line["split"] == "train")
    valid = _series(line for line in lines if line["split"] == "valid")
    by_suffix = {
        suffix: {
            name.split("/")[0]: points
            for name, points in sorted(source.items())
            if name.endswith(suffix)
        }
        for source, suffixes in (
            (train, ("/training_loss_hard", "/training_loss_in_batch")),
            (valid, ("/ndcg@10", "/recall@1", "/valid_loss_hard", "/valid_loss_in_batch")),
        )
        for suffix in suffixes
    }
    charts: list[tuple[str, Mapping[str, Sequence[Point]], str]] = [
        ("Loss, the whole objective", {"training": train.get("loss", ())}, "loss"),
        (
            "Distillation term",
            {"training": train.get("distillation_loss", ())},
            "mean squared error",
        ),
        ("Validation: mean loss", {"validation": valid.get("loss", ())}, "loss"),
        ("Validation: nDCG@10", by_suffix["/ndcg@10"], "nDCG@10"),
        ("Validation: recall@1", by_suffix["/recall@1"], "recall@1"),
        *(
            (f"Validation grid: {metric} by {axis}", curves, metric)
            for axis, curves in grid_curves(lines, metric).items()
        ),
        ("Training: loss over hard negatives", by_suffix["/training_loss_hard"], "loss"),
        ("Training: in-batch loss", by_suffix["/training_loss_in_batch"], "loss"),
        ("Validation: loss over hard negatives", by_suffix["/valid_loss_hard"], "loss"),
        ("Validation: in-batch loss", by_suffix["/valid_loss_in_batch"], "loss"),
        ("Throughput", {"real tokens": train.get("tokens_per_second", ())}, "tokens a second"),
        ("Gradient norm before clipping", {"training": train.get("grad_norm", ())}, "norm"),
        ("Learning rate", {"training": train.get("learning_rate", ())}, "learning rate"),
    ]
    boxes = []
    for title, series, label in charts:
        picture = line_chart(series, "optimizer step", label, logarithmic=label == "norm")
        if picture:
            boxes.append(f"<div><h3>{title}</h3>{picture}</div>")
    return f'<h2>Training</h2><div class="charts">{"".join(boxes)}</div>'


def _series(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Name -> (step, value) points; means over the datasets of a task ("Avg/...") are left to the
    trackers."""
    series: dict[str, list[Point]] = defaultdict(list)
    for line in lines:
        for name, value in line.items():
            if isinstance(value, int | float) and not name.startswith("Avg/"):
                series[name].append((line["step"], value))
    return series


def _evaluated_cube(result: Result, metric: str) -> str:
    source = f"mean over test sets, chance is {mean_chance(result, metric):.3f}"
    return _cube(result, metric, metric, source, result["model"])


def _cube(result: Result, metric: str, title: str, source: str, model: str) -> str:
    """`source`: what the numbers are means over; `model`: what the cells can be cut out of."""
    points = cube_points(result, metric)
    deepest = max(point["depth"] for point in points)
    groups: dict[str, list[tuple[float, float, str]]] = {
        f"dim {dim}": [] for dim in sizes(result, "dim")
    }
    for point in points:
        text = (
            f"{model_name(point['rank'], point['depth'], point['dim'])}: {point['quality']:.3f}, "
            f"{number_text(point['parameters'])} parameters, {100 * point['depth'] / deepest:.0f} "
            "% of the latency, "
            f"{point['bytes_per_vector']:,} bytes a vector"
        )
        groups[f"dim {point['dim']}"].append((point["parameters"], point["quality"], text))
    tables = [_cells(result, rank, metric) for rank in sizes(result, "rank")]
    return (
        f"<h2>What to choose from: {escape(title)}</h2>"
        f'<p class="note">{escape(metric)}: {escape(MEANING[metric])}; {escape(source)}. '
        "Every point is a model that "
        f"can be cut out of {escape(model)} without training.</p>"
        '<div class="charts"><div><h3>Quality and size</h3>'
        f"{scatter_chart(groups, 'parameters', metric)}</div>"
        f"<div><h3>Best for their cost</h3>{_choices(points, deepest)}</div></div>"
        f'<h3>All of it</h3><div class="cubes">{"".join(tables)}</div>'
    )


def cube_points(result: Result, metric: str) -> list[dict[str, Any]]:
    """Each cell of an evaluated cube: rank, depth, dim, parameters, bytes_per_vector, quality."""
    points = []
    for rank in sizes(result, "rank"):
        for depth in sizes(result, "depth"):
            for dim in sizes(result, "dim"):
                rows = rows_of_cell(result, rank, depth, dim)
                if rows:
                    costs = {key: rows[0][key] for key in ("parameters", "bytes_per_vector")}
                    quality = mean_metric(rows, metric)
                    points.append(
                        {"rank": rank, "depth": depth, "dim": dim, **costs, "quality": quality}
                    )
    return points


def best_choices(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points that no other one beats: at most as large, deep and long, and better (or as good
    and cheaper)."""

    def costs(point: Mapping[str, Any]) -> tuple[int, int, int]:
        return point["parameters"], point["depth"], point["dim"]

    def beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        cheaper = all(a <= b for a, b in zip(costs(one), costs(other), strict=True))
        strictly = one["quality"] > other["quality"] or (
            one["quality"] == other["quality"] and costs(one) != costs(other)
        )
        return cheaper and strictly

    return [point for point in points if not any(beats(other, point) for other in points)]


def _choices(points: list[dict[str, Any]], deepest: int) -> str:
    names = ("model", "parameters", "relative latency", "bytes a vector", "quality")
    head = f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"
    rows = "".join(
        f"<tr><th>{model_name(p['rank'], p['depth'], p['dim'])}</th>"
        f"<td>{number_text(p['parameters'])}</td>"
        f"<td>{100 * p['depth'] / deepest:.0f} "
        f"%</td><td>{p['bytes_per_vector']:,}</td><td>{p['quality']:.3f}</td></tr>"
        for p in sorted(best_choices(points), key=lambda p: -p["quality"])
    )
    note = "No other cut is at most as large, deep and long as one of these, and better. "
    note += "Latency is that of the layers run, relative to the deepest."
    return f'<p class="note">{note}</p><table>{head}{rows}</table>'


def _cells(result: Result, rank: int, metric: str) -> str:
    """One table a rank: a line a depth, a column a vector length; darker is better."""
    values = [point["quality"] for point in cube_points(result, metric)]
    low, high = min(values), max(values)
    dims = sizes(result, "dim")
    lines = []
    for depth in sizes(result, "depth"):
        cells = []
        for dim in dims:
            rows = rows_of_cell(result, rank, depth, dim)
            quality = mean_metric(rows, metric) if rows else None
            cells.append(
                "<td></td>"
                if quality is None
                else _coloured(quality, (quality - low) / ((high - low) or 1))
            )
        lines.append(f"<tr><th>depth {depth}</th>{''.join(cells)}</tr>")
    corner = f"rank {rank}" if rank else "whole table"
    head = "".join(f"<th>dim {dim}</th>" for dim in dims)
    return f"<table><tr><th>{corner}</th>{head}</tr>{''.join(lines)}</table>"


def _coloured(value: float, share: float) -> str:
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(LIGHT, DARK, strict=True))
    ink = "#fff" if share > 0.6 else "#222"
    return f'<td style="background:rgb({red},{green},{blue});color:{ink}">{value:.3f}</td>'
