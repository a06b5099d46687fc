"""Intervals of what was measured on queries: the paired bootstrap over queries, and Holm's rule.

Models are compared on the same queries, so each resample draws queries, not models' results.

Letters: M models (or cuts), Q queries of a test set, B resamples.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ml_embed.files.arrays import blocks

RESAMPLES = 10_000
SHARE = 0.95
"""of resamples that an interval holds"""
AT_ONCE = 500
"""Resamples at a time: 4 MB of counts for 1,000 queries."""
ROUNDING = 1e-12
"""Differences of means below this are none."""

Statistic = Callable[[np.ndarray], np.ndarray]
"""(..., M) means over queries, and then over test sets -> (...)"""


@dataclass(frozen=True)
class Interval:
    """A number, and where SHARE of its resamples lie."""

    value: float
    low: float
    high: float
    p: float
    """twice the share of resamples on the other side of 0, at most 1"""

    def to_list(self) -> list[float]:
        """[value, low, high], as JSON."""
        return [self.value, self.low, self.high]


@dataclass(frozen=True)
class Resamples:
    """What models achieve on the queries as they are, and on queries drawn again and again."""

    means: np.ndarray
    """(M,)"""
    drawn: np.ndarray
    """(B, M)"""

    def of(self, models: Sequence[int]) -> "Resamples":
        """Of some of the models, in this order."""
        return Resamples(self.means[list(models)], self.drawn[:, list(models)])

    def interval(self, statistic: Statistic) -> Interval:
        """The percentile interval of a statistic of the means; all NaN where it has no value.

        Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), 13.3.
        """
        value, drawn = float(statistic(self.means)), statistic(self.drawn)
        drawn = drawn[np.isfinite(drawn)]
        if not (np.isfinite(value) and len(drawn)):
            return Interval(*[float("nan")] * 4)
        tail = (1 - SHARE) / 2
        low, high = np.quantile(drawn, [tail, 1 - tail])
        beyond = min(np.count_nonzero(drawn <= ROUNDING), np.count_nonzero(drawn >= -ROUNDING))
        # The queries as they are count as one more resample, so that no p is 0.
        return Interval(value, float(low), float(high), min(1, 2 * (1 + beyond) / (1 + len(drawn))))


def resample(
    values: Sequence[np.ndarray],
    weights: Sequence[float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    queries: Sequence[Hashable] | None = None,
) -> Resamples:
    """Means over queries, and over queries that are drawn again within each test set.

    Args:
        values: (M, Q) of each test set: what each model achieves at each query.
        weights: what each test set counts; None is all the same.
        queries: which ones each test set asks: those of equal ones are drawn together, in the
            order of their columns. None is others in each.
    """
    rng = np.random.default_rng(seed)
    together: dict[Hashable, list[int]] = {}
    for place, own in enumerate(queries or range(len(values))):
        together.setdefault(own, []).append(place)
    return Resamples(
        np.average([own.mean(axis=1) for own in values], axis=0, weights=weights),
        np.concatenate(
            [
                _resampled(values, weights, together.values(), rng, part)
                for part in blocks(resamples, AT_ONCE)
            ]
        ),
    )


def bootstrap(
    values: Sequence[np.ndarray], statistic: Statistic, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The interval of one statistic, e.g. the `difference` of the first two models.

    Args:
        values: as for `resample`; each test set counts the same.
    """
    return resample(values, None, resamples, seed).interval(statistic)


def _resampled(
    values: Sequence[np.ndarray],
    weights: Sequence[float] | None,
    together: Iterable[Sequence[int]],
    rng: np.random.Generator,
    part: slice,
) -> np.ndarray:
    """(b, M) means of as many resamples as the part is long."""
    size = part.stop - part.start
    means = np.empty((len(values), size, len(values[0])))
    for places in together:
        queries = values[places[0]].shape[1]
        counts = rng.multinomial(queries, np.full(queries, 1 / queries), size)  # (b, Q)
        for place in places:
            means[place] = counts @ values[place].T / queries
    return np.average(means, axis=0, weights=weights)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several tests, adjusted so that one false alarm among all is as rare as said.

    Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure (1979). NaN is no test.
    """
    adjusted = np.full(len(p_values), np.nan)
    order = [i for i in np.argsort(p_values) if np.isfinite(p_values[i])]  # smallest first
    highest = 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * p_values[i]))
        adjusted[i] = highest
    return adjusted.tolist()


def difference(means: np.ndarray) -> np.ndarray:
    """A `Statistic`: the first of two models less the second."""
    return means[..., 0] - means[..., 1]


def interaction(means: np.ndarray) -> np.ndarray:
    """A `Statistic`: q(r, l, d) - q(r) q(l) q(d), q the share of the uncut quality that is kept.

    0 says that the losses of the three axes multiply, below 0 that they do more than that. NaN
    where the uncut model has no quality; an interval leaves such resamples out.

    Args:
        means: (..., 5) of the cut, its rank alone, its depth alone, its dim alone, and uncut.
    """
    uncut = means[..., 4:]
    kept = means[..., :4] / np.where(uncut > 0, uncut, np.nan)
    return kept[..., 0] - kept[..., 1:].prod(axis=-1)
