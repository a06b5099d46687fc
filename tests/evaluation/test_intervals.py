"""The paired bootstrap against resampling written out and a normal distribution; Holm's rule."""

import math

import numpy as np
import pytest

from ml_embed.evaluation.intervals import (
    bootstrap,
    difference,
    holm,
    interaction,
    resample,
)


@pytest.fixture(scope="module")
def values():
    """Two test sets of unlike sizes, five models."""
    rng = np.random.default_rng(3)
    return [(rng.random((5, queries)) < 0.6).astype(float) for queries in (40, 90)]


def test_an_interval_is_that_of_resampling_by_hand(values):
    rng, drawn = np.random.default_rng(8), []
    for _ in range(4000):
        means = []
        for own in values:
            chosen = rng.integers(0, own.shape[1], own.shape[1])
            means.append([np.mean([model[q] for q in chosen]) for model in own[:2]])
        first, second = np.mean(means, axis=0)
        drawn.append(first - second)
    found = bootstrap([own[:2] for own in values], difference)
    first, second = (np.mean([own[model].mean() for own in values]) for model in (0, 1))
    assert found.value == pytest.approx(first - second)
    assert found.low == pytest.approx(np.quantile(drawn, 0.025), abs=0.012)
    assert found.high == pytest.approx(np.quantile(drawn, 0.975), abs=0.012)


def test_pairs_are_drawn_together():
    """Two models that succeed at the same queries differ by nothing, whichever are drawn."""
    own = (np.random.default_rng(0).random(200) < 0.5).astype(float)
    found = bootstrap([np.stack([own, own])], difference)
    assert (found.value, found.low, found.high) == (0, 0, 0)
    better = np.stack([np.maximum(own, np.arange(200) % 10 == 0), own])
    assert bootstrap([better], difference).low > 0


def test_test_sets_of_the_same_queries_are_drawn_together():
    """The first and the third ask the same, and are as hard there; against drawing by hand."""
    rng, drawn = np.random.default_rng(2), []
    shared, other = rng.random(60), rng.random(40)
    values = [shared + rng.normal(0, 0.1, 60), other, shared + rng.normal(0, 0.1, 60)]
    for _ in range(4000):
        same, own = rng.integers(0, 60, 60), rng.integers(0, 40, 40)
        by_set = [values[0][same].mean(), values[1][own].mean(), values[2][same].mean()]
        drawn.append(np.mean(by_set))
    low, high = np.quantile(drawn, [0.025, 0.975])
    sets = [own[None] for own in values]

    def width(queries: list[str] | None) -> float:
        found = resample(sets, queries=queries).interval(lambda means: means[..., 0])
        return found.high - found.low

    assert width(["a", "b", "a"]) == pytest.approx(high - low, rel=0.05)
    assert width(None) == width(["a", "b", "c"]) < 0.85 * (high - low)


def test_its_width_is_that_of_the_standard_error():
    own = (np.random.default_rng(1).random(2000) < 0.3).astype(float)
    found = bootstrap([own[None]], lambda means: means[..., 0])
    error = own.std() / math.sqrt(len(own))
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_interaction_is_zero_where_losses_multiply():
    whole = 0.8
    means = np.array([0.5 * 0.9 * 0.7, 0.5, 0.9, 0.7, 1.0]) * whole
    assert interaction(means) == pytest.approx(0)
    means[0] += 0.1 * whole
    assert interaction(np.stack([means, means])) == pytest.approx([0.1, 0.1])


def test_test_sets_count_as_they_are_told_to(values):
    means = [own.mean(axis=1) for own in values]
    found = resample(values, weights=[3, 1], resamples=50)
    assert found.means == pytest.approx((3 * means[0] + means[1]) / 4)
    assert resample(values, resamples=50).means == pytest.approx((means[0] + means[1]) / 2)


def test_p_is_that_of_a_normal_distribution_and_agrees_with_the_interval():
    rng = np.random.default_rng(4)
    for shift in (0.0, 0.04, 0.07, 0.15):
        own = rng.normal(shift, 0.5, 300)
        found = bootstrap([np.stack([own, np.zeros(300)])], difference)
        z = own.mean() / (own.std() / math.sqrt(300))
        assert found.p == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.02)
        assert (found.low > 0 or found.high < 0) == (found.p < 0.05)
    nothing = bootstrap([np.zeros((2, 30))], difference)
    assert (nothing.p, nothing.low, nothing.high) == (1, 0, 0)


def test_a_statistic_without_a_value_has_no_interval():
    """Such as shares of a quality that is 0."""
    found = bootstrap([np.zeros((5, 30))], interaction)
    assert all(map(math.isnan, (found.value, found.low, found.high, found.p)))


def naive_holm(p_values: list[float], level: float) -> list[bool]:
    """As it is told: reject the smallest at level / m, the next at level / (m - 1), and so on; stop
    at the first that is kept."""
    rejected = [False] * len(p_values)
    for place, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[i] > level / (len(p_values) - place):
            break
        rejected[i] = True
    return rejected


def test_holm_is_the_procedure_written_out():
    rng = np.random.default_rng(5)
    seen = set()
    for _ in range(300):
        p_values = (rng.random(rng.integers(1, 8)) ** 3 * 0.2).tolist()
        adjusted = holm(p_values)
        for level in (0.01, 0.05, 0.2):
            rejected = naive_holm(p_values, level)
            assert [p <= level for p in adjusted] == rejected
            seen.add((any(rejected), all(rejected)))
    assert len(seen) == 3, "none, some and all"
    assert holm([0.03, float("nan"), 0.02])[1] != holm([0.03, 0.02])[1]
    assert holm([0.03, float("nan"), 0.02])[::2] == pytest.approx([0.04, 0.04])
    assert holm([]) == []
