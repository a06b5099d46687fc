"""Ranks and metrics against plain Python; the cube of a small model against one cell at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ml_embed.evaluation import (
    chance_metrics,
    metrics_of_ranks,
    ranks_of_positives,
    ranks_of_scores,
    retrieval_metrics,
)


def naive_metrics(scores: list[list[float]], positive: list[int]) -> dict[str, float]:
    """Sort each row; no ties."""
    reciprocal = gain = first = 0.0
    for row, right in zip(scores, positive, strict=True):
        order = sorted(range(len(row)), key=lambda column: -row[column])
        rank = order.index(right) + 1
        first += rank == 1
        if rank <= 10:
            reciprocal += 1 / rank
            gain += 1 / math.log2(rank + 1)
    count = len(scores)
    return {"recall@1": first / count, "mrr@10": reciprocal / count, "ndcg@10": gain / count}


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**31))
def test_metrics_are_those_of_sorting(queries, documents, seed):
    generator = np.random.default_rng(seed)
    # A permutation: no two scores of a row are within the tie tolerance.
    scores = np.stack([generator.permutation(documents) for _ in range(queries)]) / documents
    positive = generator.integers(0, documents, queries)
    assert retrieval_metrics(scores, positive) == pytest.approx(naive_metrics(scores.tolist(), positive.tolist()))


def test_a_constant_model_does_not_win():
    vectors = torch.nn.functional.normalize(torch.full((101, 96), 0.3) + 0.1, dim=1)
    ranks = ranks_of_positives(vectors[:50], vectors, torch.arange(50), chunk=7)
    assert torch.equal(ranks, torch.full((50,), 51.0, dtype=torch.float64))
    assert metrics_of_ranks(ranks) == {"recall@1": 0.0, "mrr@10": 0.0, "ndcg@10": 0.0}
    assert torch.equal(ranks_of_scores(vectors[:50] @ vectors.T, torch.arange(50)), ranks)


def test_a_model_of_nan_ranks_last():
    vectors = torch.full((20, 8), torch.nan)
    assert ranks_of_positives(vectors[:3], vectors, torch.arange(3)).tolist() == [20.0] * 3
    assert ranks_of_scores(vectors[:3], torch.zeros(3)).tolist() == [8.0] * 3


def test_ties_count_half():
    scores = torch.tensor([[0.5, 0.9, 0.5, 0.5, 0.1], [0.2, 0.2, 0.1, -torch.inf, -torch.inf]])
    assert ranks_of_scores(scores, torch.tensor([0, 1])).tolist() == [3.0, 1.5]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_do_not_change_ranks(chunk):
    queries, documents = unit(37, 24), unit(90, 24, seed=1)
    documents[40:60] = documents[:20]  # exact ties
    positive = torch.arange(37) * 2
    expected = ranks_of_scores(queries @ documents.T, positive)
    assert torch.equal(ranks_of_positives(queries, documents, positive, chunk), expected)
    assert expected.frac().any()


def test_excluded_pairs_do_not_compete():
    queries, documents = unit(5, 8), unit(30, 8, seed=1)
    positive = torch.tensor([3, 4, 5, 6, 7])
    pairs = torch.tensor([(q, d) for q in range(5) for d in range(0, 30, 1 + q) if d != positive[q]])
    scores = queries @ documents.T
    scores[pairs[:, 0], pairs[:, 1]] = -torch.inf
    expected = ranks_of_scores(scores, positive)
    assert torch.equal(ranks_of_positives(queries, documents, positive, 4, pairs), expected)
    assert not torch.equal(expected, ranks_of_positives(queries, documents, positive))


def test_chance_is_the_mean_over_all_ranks():
    sizes = [2, 2, 5, 30]
    every_rank = [metrics_of_ranks(np.arange(1, size + 1)) for size in sizes]
    for name, value in chance_metrics(sizes).items():
        assert value == pytest.approx(sum(metrics[name] for metrics in every_rank) / len(sizes))
    assert chance_metrics([4])["recall@1"] == 0.25


def test_no_queries_give_nan():
    assert all(math.isnan(value) for value in metrics_of_ranks([]).values())
