"""Intervals of what was measured on queries: the paired bootstrap over queries.

Models are compared on the same queries, so each resample draws queries, not models' results.

Letters: M models (or cuts), Q queries of a test set, B resamples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ml_embed.files.arrays import blocks

RESAMPLES = 10_000
SHARE = 0.95
"""of resamples that an interval holds"""
AT_ONCE = 500
"""Resamples at a time: 4 MB of counts for 1,000 queries."""

Statistic = Callable[[np.ndarray], np.ndarray]
"""(..., M) means over queries, and then over test sets -> (...)"""


@dataclass(frozen=True)
class Interval:
    """A number, and where SHARE of its resamples lie."""

    value: float
    low: float
    high: float

    @property
    def tells_apart(self) -> bool:
        """Whether 0 is outside: a difference that chance in the queries does not explain."""
        return self.low > 0 or self.high < 0


def bootstrap(
    values: Sequence[np.ndarray], statistic: Statistic, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The percentile interval of a statistic of means over queries.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), 13.3.

    Args:
        values: (M, Q) of each test set: what each model achieves at each query. Queries are drawn
            within a test set, and each test set counts the same.
        statistic: e.g. the difference of the first two models.
    """
    means = np.mean([own.mean(axis=1) for own in values], axis=0)  # (M,)
    rng = np.random.default_rng(seed)
    drawn = np.concatenate(
        [statistic(_resampled(values, rng, part)) for part in blocks(resamples, AT_ONCE)]
    )
    tail = (1 - SHARE) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return Interval(float(statistic(means)), float(low), float(high))


def _resampled(values: Sequence[np.ndarray], rng: np.random.Generator, part: slice) -> np.ndarray:
    """(b, M) means of as many resamples as the part is long."""
    size = part.stop - part.start
    means = []
    for own in values:
        queries = own.shape[1]
        counts = rng.multinomial(queries, np.full(queries, 1 / queries), size)  # (b, Q)
        means.append(counts @ own.T / queries)
    return np.mean(means, axis=0)


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
