"""Losses against the formulas written out sample by sample, in values and gradients."""

import pytest
import torch
from oracles import cosine, dims_and_weights
from oracles import hard_loss as naive_hard_loss
from oracles import in_batch_loss as naive_in_batch_loss
from torch.nn.functional import normalize

from ml_embed.losses import nested as losses
from ml_embed.losses.nested import (
    MatryoshkaSpec,
    distillation_loss,
    hard_loss,
    in_batch_loss,
    in_batch_similarity_loss,
    nested_cosines,
)
from ml_embed.model import default_dims, dim_weights

HIDDEN, TEMPERATURE = 24, 0.05


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def make_spec(nested: bool) -> MatryoshkaSpec:
    dims = default_dims(HIDDEN) if nested else (HIDDEN,)
    return MatryoshkaSpec(dims, dim_weights(dims), TEMPERATURE)


def leaf(*shape, generator):
    return torch.randn(*shape, generator=generator, requires_grad=True)


def assert_same_gradients(fast, naive, leaves):
    gradients = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (fast, naive)]
    for mine, reference in zip(*gradients, strict=True):
        assert reference.abs().max() > 1e-3
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_dims_and_weights_follow_the_formula():
    assert list(
        zip(default_dims(HIDDEN), dim_weights(default_dims(HIDDEN)), strict=True)
    ) == dims_and_weights(24, True)
    assert default_dims(64) == (64, 32, 16, 8)


def test_nested_cosines_equal_cosines_of_cut_vectors(generator):
    left, right = leaf(3, HIDDEN, generator=generator), leaf(5, HIDDEN, generator=generator)
    seen = []
    for dim, cosines in nested_cosines(left, right, (24, 16, 8)):
        seen.append(dim)
        for i in range(3):
            for j in range(5):
                torch.testing.assert_close(cosines[i, j], cosine(left[i], right[j], dim))
    assert seen == [8, 16, 24]


def test_a_zero_vector_gives_no_nan():
    zero = torch.zeros(1, HIDDEN, requires_grad=True)
    for _, cosines in nested_cosines(zero, torch.ones(2, HIDDEN), (8, 24)):
        assert cosines.eq(0).all()
        (gradient,) = torch.autograd.grad(cosines.sum(), zero, retain_graph=True)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("counts", [(3, 3, 3, 3), (0, 1, 3, 2)])
def test_hard_loss(generator, nested, counts):
    query, candidates = (
        leaf(4, HIDDEN, generator=generator),
        leaf(4, 4, HIDDEN, generator=generator),
    )
    excluded = torch.tensor([[k > count for k in range(4)] for count in counts])
    fast = hard_loss(query, candidates, excluded, torch.full((4,), 0.25), make_spec(nested))
    negatives = [list(candidates[i, 1 : 1 + count]) for i, count in enumerate(counts)]
    naive = naive_hard_loss(
        list(query),
        list(candidates[:, 0]),
        negatives,
        dims_and_weights(HIDDEN, nested),
        TEMPERATURE,
    )
    torch.testing.assert_close(fast, naive, rtol=1e-5, atol=1e-6)
    assert_same_gradients(fast, naive, (query, candidates))


def test_hard_loss_without_negatives_is_zero(generator):
    query = leaf(4, HIDDEN, generator=generator)
    excluded = torch.zeros(4, 1, dtype=torch.bool)
    assert (
        hard_loss(query, query.unsqueeze(1), excluded, torch.full((4,), 0.25), make_spec(True)) == 0
    )


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("documents", [(0, 1, 2, 3, 4), (0, 1, 0, 3, 1)])
def test_in_batch_loss(generator, nested, documents):
    query, passage = leaf(5, HIDDEN, generator=generator), leaf(5, HIDDEN, generator=generator)
    numbers = torch.tensor(documents)
    excluded = (numbers[:, None] == numbers[None, :]) & ~torch.eye(5, dtype=torch.bool)
    fast = in_batch_loss(
        query, passage, torch.arange(5), excluded, torch.full((5,), 0.2), make_spec(nested)
    )
    naive = naive_in_batch_loss(
        list(query),
        list(passage),
        [
            {j: 1.0 for j, other in enumerate(documents) if j != i and other == own}
            for i, own in enumerate(documents)
        ],
        dims_and_weights(HIDDEN, nested),
        TEMPERATURE,
    )
    torch.testing.assert_close(fast, naive, rtol=1e-5, atol=1e-6)
    assert_same_gradients(fast, naive, (query, passage))


@pytest.mark.parametrize("logits_at_once", [1, 20, 21, 35])
def test_blocks_of_rows_give_the_loss_and_gradients_of_all(generator, monkeypatch, logits_at_once):
    query, passage = leaf(5, HIDDEN, generator=generator), leaf(7, HIDDEN, generator=generator)
    excluded = torch.zeros(5, 7, dtype=torch.bool)
    excluded[1, 5] = excluded[3, 0] = True
    arguments = (
        query,
        passage,
        torch.tensor([2, 0, 4, 6, 1]),
        excluded,
        torch.rand(5, generator=generator),
    )
    whole = in_batch_loss(*arguments, make_spec(True))
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", logits_at_once)
    blocks = in_batch_loss(*arguments, make_spec(True))
    torch.testing.assert_close(blocks, whole, rtol=1e-6, atol=1e-6)
    assert_same_gradients(blocks, whole, (query, passage))


@pytest.mark.parametrize("logits_at_once", [1, 20, 21])
def test_blocks_of_similarities_are_the_whole(generator, monkeypatch, logits_at_once):
    """Teacher and student of other widths; rows of different weights."""
    query, passage = leaf(5, HIDDEN, generator=generator), leaf(7, HIDDEN, generator=generator)
    taught = [normalize(torch.randn(rows, 5, generator=generator), dim=-1) for rows in (5, 7)]
    arguments = (query, passage, *taught, torch.rand(5, generator=generator), make_spec(True))
    whole = in_batch_similarity_loss(*arguments)
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", logits_at_once)
    blocks = in_batch_similarity_loss(*arguments)
    torch.testing.assert_close(blocks, whole, rtol=1e-6, atol=1e-6)
    assert_same_gradients(blocks, whole, (query, passage))


def test_a_row_without_weight_counts_nothing(generator):
    query, passage = leaf(3, HIDDEN, generator=generator), leaf(3, HIDDEN, generator=generator)
    weights = torch.tensor([0.5, 0.5, 0.0])
    loss = in_batch_loss(query, passage, torch.arange(3), None, weights, make_spec(True))
    (gradient,) = torch.autograd.grad(loss, query)
    assert gradient[:2].abs().min(dim=1).values.gt(0).all()
    assert not gradient[2].any()


def test_distillation_reads_the_leading_components(generator):
    student, teacher = leaf(3, 4, generator=generator), torch.randn(3, 6, generator=generator)
    expected = sum((student[i] - teacher[i, :4]).square().mean() for i in range(3)) / 3
    torch.testing.assert_close(
        distillation_loss(student, teacher, torch.full((3,), 1 / 3)), expected
    )
