"""Losses, tokens and retrieval by the language of the rows, in training and in validation.

Letters: R rows of this process, L languages of a dataset, Q queries.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ml_embed.config import Task
from ml_embed.data.batch import ContrastiveBatch
from ml_embed.evaluation.metrics import METRICS, values_of_ranks
from ml_embed.losses.objective import LossTerms

LOSSES: Mapping[Task, tuple[str, ...]] = {
    "retrieval": ("hard", "in_batch"),
    "clustering": ("hard",),
    "classification": ("hard",),
    "similarity": (),
}
"""Of each task, the losses that are sums over rows."""
_COUNT = " rows"
"""Follows the name of what is summed over rows, for how many rows these are."""

Sums = dict[str, dict[str, float]]
"""code -> name -> sum over rows of that language"""


@dataclass(frozen=True)
class LanguageValues:
    """The rows of one language in a global batch, or in several of them."""

    samples: int
    tokens: int
    hard: float
    """sum of the rows' losses; so is `in_batch`"""
    in_batch: float


def own_sums(terms: LossTerms, batch: ContrastiveBatch) -> Tensor:
    """(3, L) float64: hard losses, in-batch losses and tokens of this process's rows by language.

    (3, 0) where the data says no languages.
    """
    if terms.of_samples is None or batch.language_numbers is None:
        return batch.sample_weights.new_zeros((3, 0), dtype=torch.float64)
    losses = terms.of_samples.double() * (batch.sample_weights > 0)  # without fillers
    values = torch.cat([losses, batch.row_tokens.double()[None]])  # (3, R)
    return values.new_zeros((3, len(batch.languages))).index_add_(1, batch.language_numbers, values)


def language_values(
    languages: Sequence[str], samples: np.ndarray, sums: Iterable[float]
) -> dict[str, LanguageValues]:
    """By language, from the (L,) rows of each and the (3, L) `own_sums` of all processes, flat."""
    hard, in_batch, tokens = np.fromiter(sums, np.float64).reshape(3, -1).tolist()
    return {
        code: LanguageValues(count, round(tokens[i]), hard[i], in_batch[i])
        for i, (code, count) in enumerate(zip(languages, samples.tolist(), strict=True))
        if count
    }


def add_counts(sums: Sums, values: Mapping[str, LanguageValues]) -> None:
    """Add how many samples and tokens there are."""
    for code, own in values.items():
        _add(sums.setdefault(code, {}), {"samples": own.samples, "tokens": own.tokens})


def add_losses(sums: Sums, task: Task, values: Mapping[str, LanguageValues]) -> None:
    """Add those losses of a dataset's rows that its task has."""
    for code, own in values.items():
        for loss in LOSSES[task]:
            added = {loss: getattr(own, loss), loss + _COUNT: own.samples}
            _add(sums.setdefault(code, {}), added)


def add_ranks(sums: Sums, languages: Sequence[str], numbers: Tensor, ranks: Tensor) -> None:
    """Add what retrieval found: each query's language, (Q,) places in `languages`, and rank."""
    values, numbers = values_of_ranks(ranks.cpu()), numbers.cpu()
    for number in numbers.unique().tolist():
        chosen = (numbers == number).numpy()
        added: dict[str, float] = {}
        for metric in METRICS:
            own = values[metric][chosen]
            added |= {metric: float(own.sum()), metric + _COUNT: len(own)}
        _add(sums.setdefault(languages[number], {}), added)


def _add(into: dict[str, float], added: Mapping[str, float]) -> None:
    for name, value in added.items():
        into[name] = into.get(name, 0) + value


def means_of(sums: Sums, loss_prefix: str) -> dict[str, float]:
    """Means over all rows of a language that have the loss or metric; what is counted stays a sum.

    Args:
        sums: see there.
        loss_prefix: what the names of losses begin with.
    Returns:
        "language/<code>/<name>" -> number.
    """
    values: dict[str, float] = {}
    for code, own in sorted(sums.items()):
        for name, value in own.items():
            if name.endswith(_COUNT):
                continue
            is_loss = name in LOSSES["retrieval"]
            shown = f"language/{code}/{loss_prefix if is_loss else ''}{name}"
            count = own.get(name + _COUNT)
            values[shown] = value if count is None else value / count
    return values
