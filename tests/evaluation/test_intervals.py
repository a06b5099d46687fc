"""The paired bootstrap against resampling written out, and against a normal distribution."""

import math

import numpy as np
import pytest

from ml_embed.evaluation.intervals import bootstrap, difference, interaction


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
    assert not found.tells_apart
    better = np.stack([np.maximum(own, np.arange(200) % 10 == 0), own])
    assert bootstrap([better], difference).tells_apart


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
