"""Keeps the best validation of a run in mind: which model is kept in best/, and when a run ends."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_embed.data.loader import Validation
from ml_embed.errors import UserError
from ml_embed.model_folders.cut import Cube
from ml_embed.training.validation import metric_names


@dataclass
class Best:
    """The best value of `keep_best` so far; saved with a resume state."""

    metric: str | None
    """name of a number of validation; None = nothing is kept"""
    value: float | None = None
    step: int = 0
    """after which it was reached"""
    without_gain: int = 0
    """validations since then"""

    @classmethod
    def continued(cls, metric: str | None, saved: Mapping[str, Any] | None) -> "Best":
        """As a resume state saved it, if it was about the same number; else anew."""
        if saved is None or saved["metric"] != metric:
            return cls(metric)
        return cls(**saved)

    def add(self, values: Mapping[str, float], step: int) -> bool:
        """Take note of a validation; whether it is better than all before."""
        if self.metric is None:
            return False
        value = values.get(self.metric)
        if value is None:
            raise UserError(
                f"keep_best: validation after step {step} gave no {self.metric!r}; it gives "
                f"{', '.join(sorted(values))}"
            )
        if self.value is None or (value < self.value if self._lower else value > self.value):
            self.value, self.step, self.without_gain = value, step, 0
            return True
        self.without_gain += 1
        return False

    @property
    def _lower(self) -> bool:
        """Whether less is better."""
        return self.metric is not None and "loss" in self.metric.rsplit("/", 1)[-1]

    def is_over(self, patience: int) -> bool:
        """Whether the run has gone on for long enough without a gain; never with patience 0."""
        return 0 < patience <= self.without_gain

    def reason_to_end(self, step: int) -> str:
        return (
            f"ended after step {step}: the last {self.without_gain} validations gave no better "
            f"{self.metric} than {self.value:.4f} after step {self.step}; that model is in best/"
        )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def check_metric(metric: str | None, held_out: Validation, grid: Cube | None) -> None:
    """Raise UserError if validation with that data and grid gives no number of that name."""
    if metric is None or metric in (names := metric_names(held_out, grid)):
        return
    near = difflib.get_close_matches(metric, names, n=3, cutoff=0.3) or names[:3]
    raise UserError(
        f"keep_best: validation gives no number {metric!r}; did you mean one of "
        f"{', '.join(map(repr, near))}?"
    )
