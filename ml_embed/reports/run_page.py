"""A run as one self-contained HTML page: its curves, and the cuts to choose from.

The curves are those of metrics.jsonl; the cuts are shown as they were evaluated and as validation
measured them.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ml_embed.errors import UserError
from ml_embed.evaluation.costs import COSTS_FILE, Costs
from ml_embed.evaluation.metrics import METRICS
from ml_embed.files.atomic import atomic_file
from ml_embed.files.digests import bytes_digest
from ml_embed.files.json_file import parse_json
from ml_embed.files.paths import numbered_folders
from ml_embed.model_folders.cut import Cut
from ml_embed.model_folders.sizes import BYTES_PER_COMPONENT, cut_parameters
from ml_embed.notices import warn
from ml_embed.reports.charts import Point, line_chart
from ml_embed.reports.choices import choices_section, cube_points, read_evaluation
from ml_embed.reports.languages import PREFIX, languages_section
from ml_embed.reports.page import page
from ml_embed.reports.tables import Result, mean_chance, number_text

AXES = ("rank", "depth", "dim")
Line = Mapping[str, Any]
Curves = Mapping[str, Sequence[Point]]
"""name -> points"""
Chart = tuple[str, Curves, str]
"""title, curves, what the y axis shows"""


def grid_values(line: Line) -> dict[tuple[str, Cut], dict[str, float]]:
    """(dataset, cut) -> {metric: value} of a validation line; empty for a run without a grid."""
    values: dict[tuple[str, Cut], dict[str, float]] = defaultdict(dict)
    for key, value in line.items():
        dataset, metric, name = ["", "", *key.rsplit("/", 2)][-3:]
        cut = Cut.of_name(name)
        if cut is not None and metric in METRICS and not dataset.startswith("Avg/"):
            values[dataset, cut][metric] = value
    return dict(values)


def grid_curves(lines: Sequence[Line], metric: str) -> dict[str, dict[str, list[Point]]]:
    """For each axis that has several values: {"rank 64": (step, mean over datasets) points, …}.

    Every cut would be too many lines, so the other two axes stand at the largest of theirs.
    """
    points: dict[Cut, list[Point]] = defaultdict(list)
    for line in lines:
        of_cut: dict[Cut, list[float]] = defaultdict(list)
        for (_, cut), values in grid_values(line).items():
            of_cut[cut].append(values[metric])
        for cut, found in of_cut.items():
            points[cut].append((line["step"], sum(found) / len(found)))
    if not points:
        return {}
    largest = Cut(*(max(getattr(cut, axis) for cut in points) for axis in AXES))
    curves = {}
    for axis in AXES:
        varied = {
            f"{axis} {getattr(cut, axis)}": points[cut]
            for cut in sorted(points)
            if dataclasses.replace(cut, **{axis: getattr(largest, axis)}) == largest
        }
        if len(varied) > 1:
            curves[axis] = varied
    return curves


def grid_result(resolved: Mapping[str, Any], lines: Sequence[Line]) -> tuple[int, Result] | None:
    """The newest validation's step and numbers, in the form of `evaluate_cube`'s.

    The whole model is among the cuts. None for a run without a grid.
    """
    measured = [line for line in lines if grid_values(line)]
    if not measured or "layer_parameters" not in resolved:
        return None
    newest = measured[-1]
    values = grid_values(newest)
    whole = Cut(max(resolved["ranks"], default=0), max(resolved["exits"]), max(resolved["dims"]))
    for dataset in {dataset for dataset, _ in values}:
        values[dataset, whole] = {metric: newest[f"{dataset}/{metric}"] for metric in METRICS}
    rows = [
        vars(cut)
        | {"dataset": dataset, "bytes_per_vector": BYTES_PER_COMPONENT * cut.dim}
        | {"parameters": run_parameters(resolved, cut), **metrics}
        for (dataset, cut), metrics in sorted(values.items())
    ]
    return newest["step"], {"rows": rows}


def run_parameters(resolved: Mapping[str, Any], cut: Cut) -> int:
    """Parameters of a cut of a run's model, from its resolved.json."""
    per_rank = resolved["embedding_parameters"] // max(resolved["ranks"], default=1)
    return cut_parameters(cut, per_rank, resolved["layer_parameters"], max(resolved["dims"]))


EVALUATION_FILE = "evaluation.json"
SHOWN = ("world_size", "global_batch_size", "total_steps", "parameters", "exits", "dims", "ranks")


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
    resolved_file = run_dir / "resolved.json"
    resolved = _read_json(resolved_file) if resolved_file.is_file() else {}
    name = run_dir.resolve().name
    parts = [f"<h1>{escape(name)}</h1>", _summary(resolved, lines), _curves(lines, metric)]
    parts.append(languages_section(resolved, lines))
    path = _evaluation_file(run_dir, evaluation)
    if path is not None:
        parts.append(_evaluated(path, metric))
    validated = grid_result(resolved, lines)
    if validated is not None:
        parts.append(_validated(*validated, metric))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(output) as partial:
            partial.write_text(page(f"{name} - training report", parts), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{output} cannot be written ({error.strerror}); choose another --output"
        ) from None


def _evaluation_file(run_dir: Path, given: Path | None) -> Path | None:
    if given is not None:
        return given / EVALUATION_FILE if given.is_dir() else given
    places = (run_dir / EVALUATION_FILE, run_dir / "evaluation" / EVALUATION_FILE)
    return next((place for place in places if place.is_file()), None)


def _evaluated(path: Path, metric: str) -> str:
    """What can be chosen from, as scripts/evaluate.py and scripts/choose_cut.py measured it."""
    result = read_evaluation(path, metric)
    chance = number_text(mean_chance(result, metric), 3)
    source = f"mean over test sets, chance is {chance}"
    costs = Costs.load(place) if (place := path.with_name(COSTS_FILE)).is_file() else None
    if costs and not any(point.cost for point in cube_points(result, metric, costs)):
        warn(f"{place} is of another model than {path} and left out")
        costs = None
    return choices_section(result, metric, metric, source, result["model"], costs)


def _validated(step: int, result: Result, metric: str) -> str:
    """What can be chosen from, as validation measured it during training."""
    source = f"mean over the datasets' held-out rows after step {step}"
    title = f"{metric} on held-out rows"
    return choices_section(result, metric, title, source, "this run's model folders")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, but for a last one that is still being written.

    Damaged ones are named and left out.

    Raises:
        UserError: there is none.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give a run folder, output_dir/experiment_id"
        ) from None
    _compare_with_states(path, content)
    lines = []
    whole = content.split(b"\n")[:-1]  # what follows the last line end is not whole
    for number, line in enumerate(whole, start=1):
        try:
            lines.append(_metrics_line(line))
        except (ValueError, TypeError, KeyError) as error:
            warn(f"{path}, line {number} is damaged and left out ({error!r}); the others are shown")
    if not lines:
        raise UserError(f"{path} has no lines yet; wait for the first log line of the run")
    return lines


def _compare_with_states(path: Path, content: bytes) -> None:
    """Warn where the metrics are not as they were when the newest resume state was saved."""
    for step, folder in numbered_folders(path.parent / "resume")[-1:]:
        try:
            state = _read_json(folder / "state.json")
            as_saved = bytes_digest(content[: state["metrics_bytes"]]) == state["metrics_digest"]
        except UserError as error:
            warn(f"{error}; the page is made without it")
            continue
        except (TypeError, KeyError):  # of another version
            continue
        if not as_saved:
            warn(f"{path} has changed since the state of step {step} was saved")


def _metrics_line(line: bytes) -> dict[str, Any]:
    """Raises ValueError, TypeError or KeyError for what is no line of a run."""
    values = parse_json(line)
    for name in ("step", "tokens") if values["split"] == "train" else ("step",):
        if not isinstance(values[name], int):
            raise ValueError(f"{name} is no whole number")
    return values


def _read_json(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
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
    return number_text(value)


def _curves(lines: list[dict[str, Any]], metric: str) -> str:
    boxes = []
    for title, series, label in _charts(lines, metric):
        picture = line_chart(series, "optimizer step", label, logarithmic=label == "norm")
        if picture:
            boxes.append(f"<div><h3>{title}</h3>{picture}</div>")
    return f'<h2>Training</h2><div class="charts">{"".join(boxes)}</div>'


def _charts(lines: list[dict[str, Any]], metric: str) -> list[Chart]:
    train, valid = (
        _series(line for line in lines if line["split"] == split) for split in ("train", "valid")
    )
    grid = grid_curves(lines, metric).items()

    def one(name: str, key: str) -> Curves:
        return {name: train.get(key, ())}

    return [
        ("Loss, the whole objective", one("training", "loss"), "loss"),
        ("Distillation term", one("training", "distillation_loss"), "mean squared error"),
        ("Validation: mean loss", {"validation": valid.get("loss", ())}, "loss"),
        ("Validation: nDCG@10", _by_dataset(valid, "ndcg@10"), "nDCG@10"),
        ("Validation: Spearman's correlation", _by_dataset(valid, "spearman"), "correlation"),
        ("Validation: recall@1", _by_dataset(valid, "recall@1"), "recall@1"),
        *((f"Validation grid: {metric} by {axis}", curves, metric) for axis, curves in grid),
        ("Training: loss over hard negatives", _by_dataset(train, "training_loss_hard"), "loss"),
        ("Training: in-batch loss", _by_dataset(train, "training_loss_in_batch"), "loss"),
        ("Training: similarity loss", _by_dataset(train, "training_loss_similarity"), "loss"),
        ("Validation: loss over hard negatives", _by_dataset(valid, "valid_loss_hard"), "loss"),
        ("Validation: in-batch loss", _by_dataset(valid, "valid_loss_in_batch"), "loss"),
        ("Validation: similarity loss", _by_dataset(valid, "valid_loss_similarity"), "loss"),
        ("Throughput", one("real tokens", "tokens_per_second"), "tokens per second"),
        ("Gradient norm before clipping", one("training", "grad_norm"), "norm"),
        ("Learning rate", one("training", "learning_rate"), "learning rate"),
    ]


def _by_dataset(series: Curves, metric: str) -> Curves:
    return {
        name.split("/")[0]: series[name] for name in sorted(series) if name.endswith(f"/{metric}")
    }


def _series(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Name -> (step, value) points, without means over a task's datasets, and by language."""
    series: dict[str, list[Point]] = defaultdict(list)
    for line in lines:
        for name, value in line.items():
            if isinstance(value, int | float) and not name.startswith(("Avg/", PREFIX)):
                series[name].append((line["step"], value))
    return series
