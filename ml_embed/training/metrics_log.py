"""What a run reports: metrics.jsonl, accelerate's trackers, and the sums behind a log line."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ml_embed.config import Task
from ml_embed.files.atomic import append_whole
from ml_embed.files.digests import bytes_digest
from ml_embed.notices import warn
from ml_embed.training.by_language import (
    LanguageValues,
    Sums,
    add_counts,
    add_losses,
    means_of,
)


@dataclass
class Window:
    """Sums over the optimizer steps since the last log line; saved with a resume state."""

    steps: int = 0
    seconds: float = 0.0
    """of training, with checkpoints, without validation and the time between two launches"""
    loss: float = 0.0
    grad_norm: float = 0.0
    distillation: float = 0.0
    self_distillation: float = 0.0
    tokens: int = 0
    encoded_tokens: int = 0
    masked_by_document: int = 0
    masked_by_margin: float = 0.0
    dataset_steps: dict[str, int] = field(default_factory=dict)
    hard: dict[str, float] = field(default_factory=dict)
    in_batch: dict[str, float] = field(default_factory=dict)
    similarity: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    languages: Sums = field(default_factory=dict)
    exits: dict[str, float] = field(default_factory=dict)
    """of the last step that was looked at (`exit_statistics`); no sums"""

    def add(self, dataset: str, task: Task, step: "StepValues", seconds: float) -> None:
        self.steps += 1
        self.seconds += seconds
        self.loss += step.total
        self.grad_norm += step.grad_norm
        self.distillation += step.distillation
        self.self_distillation += step.self_distillation
        self.tokens += step.tokens
        self.encoded_tokens += step.encoded_tokens
        self.masked_by_document += step.masked_by_document
        self.masked_by_margin += step.masked_by_margin
        self.dataset_steps[dataset] = self.dataset_steps.get(dataset, 0) + 1
        self.tasks[dataset] = task
        if task == "similarity":
            self.similarity[dataset] = self.similarity.get(dataset, 0.0) + step.similarity
        else:
            self.hard[dataset] = self.hard.get(dataset, 0.0) + step.hard
        if task == "retrieval":
            self.in_batch[dataset] = self.in_batch.get(dataset, 0.0) + step.in_batch
        add_counts(self.languages, step.languages)
        add_losses(self.languages, task, step.languages)

    def summary(self) -> dict[str, float]:
        """Means over the window, and sums of what is counted.

        A dataset without a step in the window has no entry. "Avg/<task>/…" are means over the
        task's datasets, each counting the same; "language/<code>/…" are means over all rows of a
        language that have the loss.
        """
        values = {
            "loss": self.loss / self.steps,
            "grad_norm": self.grad_norm / self.steps,
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "encoded_tokens": self.encoded_tokens,
            "masked_by_document": self.masked_by_document,
            # pairs at the margin's edge count in part
            "masked_by_margin": round(self.masked_by_margin),
            "distillation_loss": self.distillation / self.steps,
            "self_distillation_loss": self.self_distillation / self.steps,
        }
        for metric, totals in (
            ("training_loss_hard", self.hard),
            ("training_loss_in_batch", self.in_batch),
            ("training_loss_similarity", self.similarity),
        ):
            means = {name: total / self.dataset_steps[name] for name, total in totals.items()}
            values |= {f"{name}/{metric}": mean for name, mean in means.items()}
            for task in dict.fromkeys(self.tasks.values()):
                of_task = [mean for name, mean in means.items() if self.tasks.get(name) == task]
                if of_task:
                    values[f"Avg/{task}/{metric}"] = sum(of_task) / len(of_task)
        return values | means_of(self.languages, "training_loss_") | self.exits

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class StepValues:
    """One optimizer step, over all processes."""

    total: float
    hard: float
    in_batch: float
    similarity: float
    distillation: float
    self_distillation: float
    tokens: int
    encoded_tokens: int
    masked_by_document: int
    """pairs of a query and a document, see `ml_embed.losses.false_negatives.MaskedLogits`"""
    masked_by_margin: float
    grad_norm: float
    stop_requested: bool
    languages: Mapping[str, LanguageValues]
    """by code; empty if the data says none"""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.total) and math.isfinite(self.grad_norm)


class MetricsLog:
    """Appends lines to metrics.jsonl (first process only) and sends them to the trackers.

    A train line's rate is its "tokens" over its "seconds" (`Window.seconds`). Without a validation
    between two train lines, the difference of their "time" is the second's "seconds".
    """

    def __init__(
        self,
        path: Path,
        accelerator: Accelerator,
        *,
        optional: Mapping[str, bool],
        keep_bytes: int = 0,
        keep_digest: str | None = None,
    ):
        """
        Args:
            optional: numbers that only some runs have -> whether this one has them.
            keep_bytes: length of the file when the state that is resumed from was saved; what
                follows is dropped.
            keep_digest: of these bytes then; what differs is said, and kept as it is.
        """
        self._accelerator = accelerator
        self._path = path
        self._left_out = {name for name, has in optional.items() if not has}
        if accelerator.is_main_process:
            path.touch()
            os.truncate(path, min(keep_bytes, path.stat().st_size))
            if keep_digest not in (None, bytes_digest(path.read_bytes())):
                warn(
                    f"{path} has changed since the state was saved; its lines are kept as they are"
                )

    def force_to_disk(self) -> dict[str, Any]:
        """What a state says of metrics.jsonl, which is safe from a power cut. First process only.

        Returns:
            metrics_bytes and metrics_digest, of all that is in it.
        """
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
            content = file.read()
        return {"metrics_bytes": len(content), "metrics_digest": bytes_digest(content)}

    def train(
        self, step: int, epoch: float, learning_rate: float, window: Window
    ) -> dict[str, Any]:
        """Write the line of a window; returns its values."""
        line = {"split": "train", "step": step, "epoch": epoch, "learning_rate": learning_rate}
        line |= {k: v for k, v in window.summary().items() if k not in self._left_out}
        self._write(line)
        return line

    def valid(self, step: int, epoch: float, values: dict[str, float]) -> None:
        self._write({"split": "valid", "step": step, "epoch": epoch, **values})

    def _write(self, line: dict[str, Any]) -> None:
        if self._accelerator.is_main_process:
            stamped = line | {"time": time.time()}
            append_whole(
                self._path, json.dumps(stamped, ensure_ascii=False, allow_nan=False) + "\n"
            )
        prefix = "valid/" if line["split"] == "valid" else ""
        values = {
            k if "/" in k else prefix + k: v for k, v in line.items() if k not in ("split", "step")
        }
        self._accelerator.log(values, step=line["step"])
