"""Losses against the formulas written out sample by sample, in values and gradients."""

import itertools

import pytest
import torch
from helpers.operations import operations_of
from oracles import cosine, dims_and_weights
from oracles import hard_loss as naive_hard_loss
from oracles import in_batch_loss as naive_in_batch_loss
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from ml_embed.benchmarks.gpu_common import SMALL, SMALL_MODEL, random_batch
from ml_embed.losses import nested as losses
from ml_embed.losses.nested import (
    MatryoshkaSpec,
    distillation_loss,
    hard_loss,
    in_batch_loss,
    in_batch_similarity_loss,
    nested_cosines,
    self_distillation_loss,
)
from ml_embed.losses.objective import Objective
from ml_embed.model import default_dims, dim_weights

HIDDEN, TEMPERATURE, EXITS = 24, 0.05, 2


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
    left, right = (leaf(EXITS, rows, HIDDEN, generator=generator) for rows in (3, 5))
    cosines = nested_cosines(left, right, (24, 16, 8))
    assert cosines.shape == (3, EXITS, 3, 5)
    for (d, e, i, j), found in zip(indices(cosines), cosines.flatten(), strict=True):
        torch.testing.assert_close(found, cosine(left[e, i], right[e, j], (8, 16, 24)[d]))


def indices(tensor):
    return itertools.product(*map(range, tensor.shape))


def test_a_zero_vector_gives_no_nan():
    zero = torch.zeros(1, 1, HIDDEN, requires_grad=True)
    for cosines in nested_cosines(zero, torch.ones(1, 2, HIDDEN), (8, 24)):
        assert cosines.eq(0).all()
        (gradient,) = torch.autograd.grad(cosines.sum(), zero, retain_graph=True)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("counts", [(3, 3, 3, 3), (0, 1, 3, 2)])
def test_hard_loss(generator, nested, counts):
    query, candidates = (
        leaf(EXITS, 4, HIDDEN, generator=generator),
        leaf(EXITS, 4, 4, HIDDEN, generator=generator),
    )
    excluded = torch.tensor([[k > count for k in range(4)] for count in counts])
    fast = hard_loss(query, candidates, excluded, torch.full((4,), 0.25), make_spec(nested)).total
    naive = sum(
        naive_hard_loss(
            list(query[e]),
            list(candidates[e, :, 0]),
            [list(candidates[e, i, 1 : 1 + count]) for i, count in enumerate(counts)],
            dims_and_weights(HIDDEN, nested),
            TEMPERATURE,
        )
        for e in range(EXITS)
    )
    torch.testing.assert_close(fast, naive / EXITS, rtol=1e-5, atol=1e-6)
    assert_same_gradients(fast, naive / EXITS, (query, candidates))


def test_hard_loss_without_negatives_is_zero(generator):
    query = leaf(EXITS, 4, HIDDEN, generator=generator)
    excluded = torch.zeros(4, 1, dtype=torch.bool)
    weights = torch.full((4,), 0.25)
    loss = hard_loss(query, query.unsqueeze(2), excluded, weights, make_spec(True))
    assert loss.total == 0
    assert not loss.of_samples.any()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("documents", [(0, 1, 2, 3, 4), (0, 1, 0, 3, 1)])
def test_in_batch_loss(generator, nested, documents):
    query, passage = (leaf(EXITS, 5, HIDDEN, generator=generator) for _ in range(2))
    numbers = torch.tensor(documents)
    excluded = (numbers[:, None] == numbers[None, :]) & ~torch.eye(5, dtype=torch.bool)
    fast = in_batch_loss(
        query, passage, torch.arange(5), excluded, torch.full((5,), 0.2), make_spec(nested)
    ).total
    naive = sum(
        naive_in_batch_loss(
            list(query[e]),
            list(passage[e]),
            [
                {j: 1.0 for j, other in enumerate(documents) if j != i and other == own}
                for i, own in enumerate(documents)
            ],
            dims_and_weights(HIDDEN, nested),
            TEMPERATURE,
        )
        for e in range(EXITS)
    )
    torch.testing.assert_close(fast, naive / EXITS, rtol=1e-5, atol=1e-6)
    assert_same_gradients(fast, naive / EXITS, (query, passage))


LOGITS_OF_A_ROW = 3 * EXITS * 7  # dims, exits, passages


@pytest.mark.parametrize(
    "logits_at_once", [1, 3 * LOGITS_OF_A_ROW - 1, 3 * LOGITS_OF_A_ROW, 5 * LOGITS_OF_A_ROW]
)
def test_blocks_of_rows_give_the_loss_and_gradients_of_all(generator, monkeypatch, logits_at_once):
    query, passage = (leaf(EXITS, rows, HIDDEN, generator=generator) for rows in (5, 7))
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
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", {"cpu": logits_at_once})
    blocks = in_batch_loss(*arguments, make_spec(True))
    torch.testing.assert_close(blocks.total, whole.total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(blocks.of_samples, whole.of_samples, rtol=1e-6, atol=1e-6)
    with torch.no_grad():  # as in validation
        unlearned = in_batch_loss(*arguments, make_spec(True))
    torch.testing.assert_close(unlearned.total, whole.total.detach())
    torch.testing.assert_close(unlearned.of_samples, whole.of_samples.detach())
    assert_same_gradients(blocks.total, whole.total, (query, passage))


def test_each_samples_loss_is_what_it_has_alone(generator):
    """That is, with all weight on it."""
    query, passage = (leaf(EXITS, 4, HIDDEN, generator=generator) for _ in range(2))
    candidates = leaf(EXITS, 4, 3, HIDDEN, generator=generator)
    excluded = torch.zeros(4, 3, dtype=torch.bool)

    def losses_with(weights: list[float]):
        own, spec = torch.tensor(weights), make_spec(True)
        yield hard_loss(query, candidates, excluded, own, spec)
        yield in_batch_loss(query, passage, torch.arange(4), None, own, spec)

    for sample in range(4):
        alone = [float(i == sample) for i in range(4)]
        for all_of_them, one in zip(
            losses_with([0.4, 0.3, 0.2, 0]), losses_with(alone), strict=True
        ):
            assert one.total > 0
            torch.testing.assert_close(all_of_them.of_samples[:, sample].mean(), one.total)


@pytest.mark.parametrize("logits_at_once", [1, 3 * LOGITS_OF_A_ROW - 1, 3 * LOGITS_OF_A_ROW])
def test_blocks_of_similarities_are_the_whole(generator, monkeypatch, logits_at_once):
    """Teacher and student of other widths; rows of different weights."""
    query, passage = (leaf(EXITS, rows, HIDDEN, generator=generator) for rows in (5, 7))
    taught = [normalize(torch.randn(rows, 5, generator=generator), dim=-1) for rows in (5, 7)]
    arguments = (query, passage, *taught, torch.rand(5, generator=generator), make_spec(True))
    whole = in_batch_similarity_loss(*arguments)
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", {"cpu": logits_at_once})
    blocks = in_batch_similarity_loss(*arguments)
    torch.testing.assert_close(blocks, whole, rtol=1e-6, atol=1e-6)
    assert_same_gradients(blocks, whole, (query, passage))


def test_blocks_multiply_nothing_twice(generator, monkeypatch):
    """What is wanted of all exits alike is computed once for a block of rows."""
    rows, weights, spec = 5, torch.full((5,), 0.2), make_spec(True)
    query, passage = (leaf(EXITS, count, HIDDEN, generator=generator) for count in (rows, 7))
    candidates = leaf(EXITS, rows, 3, HIDDEN, generator=generator)
    taught = [normalize(torch.randn(n, 5, generator=generator), dim=-1) for n in (rows, 7)]
    masks = torch.zeros(rows, 3, dtype=torch.bool), torch.zeros(rows, 7, dtype=torch.bool)

    def multiplied(loss, leaves) -> int:
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(loss(), leaves)
        return counter.get_total_flops()

    def similarity():
        return in_batch_similarity_loss(query, passage, *taught, weights, spec)

    def from_itself():
        return self_distillation_loss(query, candidates, passage, masks, weights, spec)

    cases = ((similarity, (query, passage)), (from_itself, (query, candidates, passage)))
    whole = [multiplied(*case) for case in cases]
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", {"cpu": 2 * 3 * 7})  # two rows of an exit
    blockwise = [multiplied(*case) for case in cases]
    assert blockwise == pytest.approx(whole, rel=0.01), "but for the small sums over dims"


def test_a_row_without_weight_counts_nothing(generator):
    query, passage = (leaf(1, 3, HIDDEN, generator=generator) for _ in range(2))
    weights = torch.tensor([0.5, 0.5, 0.0])
    loss = in_batch_loss(query, passage, torch.arange(3), None, weights, make_spec(True)).total
    (gradient,) = torch.autograd.grad(loss, query)
    assert gradient[0, :2].abs().min(dim=1).values.gt(0).all()
    assert not gradient[0, 2].any()


def test_distillation_reads_the_leading_components(generator):
    student, teacher = leaf(3, 4, generator=generator), torch.randn(3, 6, generator=generator)
    expected = sum((student[i] - teacher[i, :4]).square().mean() for i in range(3)) / 3
    torch.testing.assert_close(
        distillation_loss(student, teacher, torch.full((3,), 1 / 3)), expected
    )


def test_the_objective_needs_few_operations_however_many_exits(generator):
    """One by one, exits and dims took 6,955 of them for 7 exits and 8 dims."""
    dims = default_dims(1024)
    objective = Objective(MatryoshkaSpec(dims, dim_weights(dims), TEMPERATURE))
    batch = random_batch(SMALL, SMALL_MODEL)
    counts = []
    for exits in (2, 7):
        vectors = leaf(exits, len(batch.texts.packed.lengths), 1024, generator=generator)
        counts.append(
            operations_of(lambda v=vectors: torch.autograd.grad(objective(v, batch).total, v))
        )
    assert counts[0] == counts[1] <= 260
