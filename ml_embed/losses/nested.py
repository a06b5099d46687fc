"""Contrastive and distillation losses over nested vectors: pure functions of tensors.

All exits and dims go through one call of each operation: exits are a batch dimension, and the
cosines of all dims are one tensor (`nested_cosines`). Rows may be weighted, so that a mean over the
samples of a global batch is a sum of shares, exact for uneven batches and any number of processes.

Letters: E exits, B samples of this process, C candidates of a sample (its positive and its K
negatives), G passages of the global batch, H hidden size, D nested dims. Sources: MRL (arXiv
2205.13147), ML-Embed (arXiv 2605.15081).
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ml_embed.files.arrays import blocks

LOGITS_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
"""Kind of device -> logits, counting those of all exits and dims, that are held at a time: so many
rows of the batch as fit. About 7 float32 values live per logit, so that is 30 MiB and 1.8 GiB, by
hand. Measured on a CPU, 1,536 x 1,536 at 4 exits: with 2^19 a quarter slower, with 2^21 no faster.
The one for GPUs is a guess."""
NEVER = -1e6
"""A logit of what is never chosen: -inf minus -inf is no number."""
SMALLEST_SQUARED_NORM = 1e-24  # the square of torch.nn.functional.normalize's 1e-12


@dataclass(frozen=True)
class MatryoshkaSpec:
    """The nested sizes of the losses, how much each of them counts, and the temperature tau."""

    dims: tuple[int, ...]
    """largest first"""
    weights: tuple[float, ...]
    """c_n of each dim"""
    temperature: float
    exit_weights: tuple[float, ...] | None = None
    """share of each exit, the shallowest first; their sum is 1; None = all alike"""


@lru_cache(maxsize=16)
def _on_device(weights: tuple[float, ...], device: torch.device) -> Tensor:
    """Weights as a float32 tensor; copied to a device once, not in each step."""
    with torch.inference_mode(False):
        return torch.tensor(weights, device=device)


def exit_shares(exits: int, spec: MatryoshkaSpec, device: torch.device) -> Tensor:
    """(exits,) shares of the deepest exits in a mean over them."""
    shares = _on_device((spec.exit_weights or (1.0,) * exits)[-exits:], device)
    return shares / shares.sum()


def mean_over_exits(losses: Tensor, spec: MatryoshkaSpec) -> Tensor:
    """(E,) -> scalar."""
    return losses @ exit_shares(len(losses), spec, losses.device)


def rows_at_once(logits_per_row: int, device: torch.device) -> int:
    """How many rows of a loss are computed at a time, at least one."""
    return max(1, LOGITS_AT_ONCE.get(device.type, LOGITS_AT_ONCE["cpu"]) // logits_per_row)


def nested_cosines(left: Tensor, right: Tensor, dims: Sequence[int]) -> Tensor:
    """Cosines of the vectors cut to each dim, in one pass over the components.

    A dot product over d components is the one over the next smaller dim plus that of the
    components between, and so are the squared norms. All dims cost what the largest costs alone.

    Args:
        left: (..., M, H), right: (..., N, H), not normalised.
        dims: nested lengths, in any order, the largest is H.
    Returns:
        (D, ..., M, N), smallest dim first.
    """
    ascending = sorted(dims)
    assert ascending[-1] == left.shape[-1], (dims, left.shape)
    widths = [high - low for low, high in itertools.pairwise([0, *ascending])]
    lead = left.shape[:-2]
    # (X, M or N, width) each; split and not slices, whose gradients are zero-filled tensors of all
    left_parts, right_parts = (x.flatten(0, -3).split(widths, dim=-1) for x in (left, right))
    dot = left_parts[0] @ right_parts[0].mT
    dots = [dot]
    for left_part, right_part in zip(left_parts[1:], right_parts[1:], strict=True):
        dots.append(dot := torch.baddbmm(dot, left_part, right_part.mT))
    cosines = torch.stack(dots).unflatten(1, lead)
    return (
        cosines
        * _inverse_norms(left, widths).unsqueeze(-1)
        * _inverse_norms(right, widths).unsqueeze(-2)
    )


def _inverse_norms(vectors: Tensor, widths: list[int]) -> Tensor:
    """(..., H) -> (D, ...): 1 / the length of each vector, cut to each dim."""
    squares = [part.sum(-1) for part in vectors.square().split(widths, dim=-1)]
    return torch.stack(squares).cumsum(0).clamp_min(SMALLEST_SQUARED_NORM).rsqrt()


@dataclass(frozen=True)
class SampleLoss:
    """A loss that is a weighted sum over samples."""

    total: Tensor
    """scalar, float32, the mean over exits"""
    of_samples: Tensor
    """(E, B) each sample's own, without its weight; to be read, not to be learned from"""


LossOfExits = Callable[[Tensor, Tensor], Tensor]
"""(some rows of left, all of right) -> (E, rows): their losses at the exits given, unweighted"""
LossOfRows = Callable[[slice], LossOfExits]
"""Some rows -> their loss; what is the same for all exits is computed here, once."""


class _RowwiseLoss(torch.autograd.Function):
    """Exits' losses (E,) of (E, B, ..., H) and (E, N, H), sums over rows, some rows at a time.

    The gradients of some rows are computed right after their loss, in the forward pass, so that
    only their cosines are in memory, and not all D x B x N. (Checkpointing
    computed everything twice, and kept glibc from reusing freed memory: 1.5 GiB at B = N = 4,096
    with three exits.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        weights: Tensor,
        loss_of_rows: LossOfRows,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        left, right = left.detach(), right.detach()
        losses, of_rows = left.new_zeros(len(left)), left.new_empty(left.shape[:2])
        left_gradient, right_gradient = torch.empty_like(left), torch.zeros_like(right)
        for some in blocks(left.shape[1], rows):
            loss_of = loss_of_rows(some)
            for one in blocks(len(left), 1):
                with torch.enable_grad():
                    own, other = left[one, some].requires_grad_(), right[one].requires_grad_()
                    own_losses = loss_of(own, other)
                    loss = own_losses @ weights[some]
                    left_gradient[one, some], of_right = torch.autograd.grad(loss, (own, other))
                right_gradient[one] += of_right
                losses[one] += loss.detach()
                of_rows[one, some] = own_losses.detach()
        ctx.save_for_backward(left_gradient, right_gradient)
        ctx.mark_non_differentiable(of_rows)
        return losses, of_rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, Tensor, None, None, None]:
        left, right = ((x.movedim(0, -1) * gradient).movedim(-1, 0) for x in ctx.saved_tensors)
        return left, right, None, None, None


def _sum_over_rows(
    left: Tensor,
    right: Tensor,
    weights: Tensor,
    spec: MatryoshkaSpec,
    loss_of_rows: LossOfRows,
    sides: int = 1,
) -> SampleLoss:
    """The loss of all rows of `left` (E, B, ..., H) against `right` (E, N, H), in bounded memory.

    `weights` (B,) are those of the rows; `sides` vectors of each row meet all of `right`.
    """
    exits, count = right.shape[0], max(1, sides * right.shape[1])
    if left.shape[1] <= rows_at_once(len(spec.dims) * exits * count, left.device):
        return _weighted(loss_of_rows(slice(None))(left, right), weights, spec)
    # One exit at a time: of each, more rows fit, so that `right` is gone through less often.
    rows = rows_at_once(len(spec.dims) * count, left.device)
    compute = _RowwiseLoss.apply if torch.is_grad_enabled() else _sum_in_blocks
    losses, of_samples = compute(left, right, weights, loss_of_rows, rows)
    return SampleLoss(mean_over_exits(losses, spec), of_samples)


def _weighted(of_samples: Tensor, weights: Tensor, spec: MatryoshkaSpec) -> SampleLoss:
    """From each sample's loss at each exit, (E, B), and its weight, (B,)."""
    return SampleLoss(mean_over_exits(of_samples @ weights, spec), of_samples)


def _sum_in_blocks(
    left: Tensor, right: Tensor, weights: Tensor, loss_of_rows: LossOfRows, rows: int
) -> tuple[Tensor, Tensor]:
    """As `_RowwiseLoss`, without gradients: for validation."""
    of_rows = left.new_empty(left.shape[:2])
    for some in blocks(left.shape[1], rows):
        loss_of = loss_of_rows(some)
        for one in blocks(len(left), 1):
            of_rows[one, some] = loss_of(left[one, some], right[one])
    return of_rows @ weights, of_rows


def _cosines(left: Tensor, right: Tensor, spec: MatryoshkaSpec) -> Tensor:
    """(E, B, H) with (E, N, H), shared by all samples, or (E, B, N, H), own -> (D, E, B, N).

    (E, B, S, H), S vectors of a sample, with (E, N, H) -> (D, E, B, S N), one vector's after
    another's.
    """
    if left.dim() == 4:
        cosines = nested_cosines(left.flatten(1, 2), right, spec.dims)
        return cosines.unflatten(2, left.shape[1:3]).flatten(3)
    if right.dim() == 3:
        return nested_cosines(left, right, spec.dims)
    return nested_cosines(left.unsqueeze(2), right, spec.dims).squeeze(-2)


def masked_logits(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logits (..., B, N) of which a softmax leaves out what a mask (B, N) says; None = nothing.

    A bool mask is true for those that do not count at all; a float one is added, 0 or less.
    """
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return logits.masked_fill(mask, -torch.inf)
    return logits + mask


def _nested_cross_entropy(
    left: Tensor,
    right: Tensor,
    target: Tensor,
    mask: Tensor | None,
    spec: MatryoshkaSpec,
) -> Tensor:
    """(E, B): sum_n c_n CE(cos_n(left_i, right) / tau, target_i) of each exit and sample i.

    `left` and `right` are as `_cosines` takes them; `mask` (B, N): see `masked_logits`.
    """
    logits = masked_logits(_cosines(left, right, spec) / spec.temperature, mask)  # (D, E, B, N)
    targets = target.expand(logits.shape[:-1]).flatten()
    losses = cross_entropy(logits.flatten(0, 2), targets, reduction="none")
    of_dims = _sum_over_dims(losses.view(len(logits), -1), spec)
    return of_dims.view(logits.shape[1:-1])


def _sum_over_dims(losses: Tensor, spec: MatryoshkaSpec) -> Tensor:
    """(D, X), smallest dim first -> (X,): the sum over dims, weighted by c_n."""
    return _on_device(spec.weights[::-1], losses.device) @ losses


def _nested_squared_error(
    left: Tensor, right: Tensor, wanted: Tensor, entry_weights: Tensor, spec: MatryoshkaSpec
) -> Tensor:
    """(E, B): sum_n c_n / (sum_n c_n) sum_j w_ij (cos_n(left_i, right_j) - t_ij)^2 of each exit.

    `left` and `right` are as `_cosines` takes them; `wanted`, t, and `entry_weights` are (B, N).
    """
    error = entry_weights * (_cosines(left, right, spec) - wanted).square()  # (D, E, B, N)
    of_dims = _sum_over_dims(error.sum(-1).flatten(1), spec) / sum(spec.weights)
    return of_dims.view(error.shape[1:3])


def hard_loss(
    query: Tensor,
    candidates: Tensor,
    mask: Tensor,
    sample_weights: Tensor,
    spec: MatryoshkaSpec,
) -> SampleLoss:
    """Cross-entropy of the positive among itself and the sample's own negatives.

    Source: F2LLM (arXiv 2510.02294).

    Args:
        query: (E, B, H).
        candidates: (E, B, C, H), the positive first. With C = 1 (no negatives) the loss is 0.
        mask: (B, C), for `masked_logits`: what a sample does not have, or is no negative.
        sample_weights: (B,), their sum over all samples is 1 for a mean.
    """
    if candidates.shape[2] == 1:
        return SampleLoss(query.new_zeros(()), query.new_zeros(query.shape[:2]))
    target = torch.zeros(query.shape[1], dtype=torch.long, device=query.device)
    losses = _nested_cross_entropy(query, candidates, target, mask, spec)
    return _weighted(losses, sample_weights, spec)


def in_batch_loss(
    query: Tensor,
    passages: Tensor,
    target: Tensor,
    mask: Tensor | None,
    sample_weights: Tensor,
    spec: MatryoshkaSpec,
) -> SampleLoss:
    """Cross-entropy of the positive among the documents of the in-batch loss.

    Args:
        query: (E, B, H).
        passages: (E, G, H), gathered with gradients.
        target: (B,) index of each sample's positive in `passages`.
        mask: (B, G), for `masked_logits`: what is no negative of the sample; None = nothing.
        sample_weights: (B,).
    """

    def of_rows(rows: slice) -> LossOfExits:
        own_mask = None if mask is None else mask[rows]
        rest = (target[rows], own_mask, spec)
        return lambda own, shared: _nested_cross_entropy(own, shared, *rest)

    return _sum_over_rows(query, passages, sample_weights, spec, of_rows)


def all_pairs_loss(
    query: Tensor,
    passage: Tensor,
    others: Tensor,
    target: Tensor,
    mask: Tensor,
    sample_weights: Tensor,
    spec: MatryoshkaSpec,
) -> SampleLoss:
    """Cross-entropy of the positive among all that a query, and its passage, are compared with.

    Source: the improved contrastive loss of Li et al. (arXiv 2308.03281).

    Args:
        query, passage: (E, B, H).
        others: (E, G, H), documents and queries, gathered with gradients.
        target: (B,) index of each sample's positive in `others`.
        mask: (B, 2, G), for `masked_logits`: with what the query, and with what the passage, is not
            compared.
        sample_weights: (B,).
    """

    def of_rows(rows: slice) -> LossOfExits:
        rest = (target[rows], mask[rows].flatten(1), spec)
        return lambda own, shared: _nested_cross_entropy(own, shared, *rest)

    both = torch.stack([query, passage], dim=2)
    return _sum_over_rows(both, others, sample_weights, spec, of_rows, sides=2)


def pair_cosines(query: Tensor, passage: Tensor, spec: MatryoshkaSpec) -> Tensor:
    """Cosines of pairs (E, R, H), cut to each dim: (E, R, D), smallest dim first."""
    cosines = nested_cosines(query.unsqueeze(-2), passage.unsqueeze(-2), spec.dims)
    return cosines[..., 0, 0].movedim(0, -1)


def cosent_loss(cosines: Tensor, scores: Tensor, spec: MatryoshkaSpec) -> Tensor:
    """How far the order of pairs by cosine is from their order by score (CoSENT).

    Source: sentence-transformers' CoSENTLoss, whose scale is 1 / tau; https://kexue.fm/archives/8847.
    Each dim's sum over all two pairs is formed in n log n steps: for each pair, the sum over pairs
    of lower scores is a running sum along the order of scores.

    Args:
        cosines: (n, E, D) of the pairs of the global batch, smallest dim first.
        scores: (n,).
    Returns:
        scalar: the mean over exits of sum_d c_d log(1 + sum over i, j with score_i < score_j of
        exp((cos_d(i) - cos_d(j)) / tau)); 0 if all scores are equal.
    """
    ordered, order = scores.sort()
    logits = cosines[order] / spec.temperature  # (n, E, D)
    lower = torch.searchsorted(ordered, ordered)  # (n,) how many pairs have a lower score
    running = logits.logcumsumexp(dim=0)
    terms = running[(lower - 1).clamp_min(0)] - logits
    # Masked, not selected: how many are selected would have to be waited for.
    terms = terms.masked_fill((lower == 0)[:, None, None], -torch.inf)
    losses = torch.cat([terms, torch.zeros_like(logits[:1])]).logsumexp(dim=0)  # (E, D)
    return mean_over_exits(_sum_over_dims(losses.T, spec), spec)


def distillation_loss(student: Tensor, teacher: Tensor, row_weights: Tensor) -> Tensor:
    """Weighted mean squared error to as many leading components of a teacher's vectors.

    Args:
        student: (N, H), not normalised.
        teacher: (N, H_teacher >= H), not normalised.
        row_weights: (N,), 1 / rows for a mean over rows.
    Returns:
        scalar: sum_i w_i mean_h (s_ih - t_ih)^2.
    """
    difference = student - teacher[..., : student.shape[-1]]
    return (row_weights * difference.square().mean(-1)).sum()


def candidate_similarity_loss(
    query: Tensor, candidates: Tensor, wanted: Tensor, entry_weights: Tensor, spec: MatryoshkaSpec
) -> Tensor:
    """How far the cosines of each query with its own candidates are from a teacher's.

    Args:
        query: (E, B, H), the student's.
        candidates: (E, B, C, H), the student's.
        wanted: (B, C), the teacher's cosines.
        entry_weights: (B, C), 0 where there is no candidate.
    Returns:
        scalar: mean over exits of sum_n c_n / (sum_n c_n) sum_ij w_ij (cos_n(q_i, c_ij) - t_ij)^2.
    """
    losses = _nested_squared_error(query, candidates, wanted, entry_weights, spec)
    return mean_over_exits(losses.sum(1), spec)


def score_divergence_loss(
    query: Tensor,
    candidates: Tensor,
    scores: Tensor,
    absent: Tensor,
    sample_weights: Tensor,
    spec: MatryoshkaSpec,
) -> Tensor:
    """How far the choice among a sample's own candidates is from a teacher's, by stored scores.

    Args:
        query: (E, B, H).
        candidates: (E, B, C, H), the positive first.
        scores: (B, C), the teacher's logits.
        absent: (B, C) bool, true where a sample has no candidate.
        sample_weights: (B,).
    Returns:
        scalar: mean over exits of
        sum_n c_n sum_i w_i KL(softmax(scores_i) || softmax(cos_n(q_i, c_i) / tau)).
    """
    wanted = scores.masked_fill(absent, NEVER).log_softmax(-1)
    logits = masked_logits(_cosines(query, candidates, spec) / spec.temperature, absent)
    own = logits.clamp_min(NEVER).log_softmax(-1)  # (D, E, B, C)
    divergence = (wanted.exp() * (wanted - own)).sum(-1)
    return mean_over_exits(_sum_over_dims(divergence @ sample_weights, spec), spec)


def margin_loss(
    query: Tensor,
    candidates: Tensor,
    scores: Tensor,
    negative_weights: Tensor,
    spec: MatryoshkaSpec,
) -> Tensor:
    """How far the margins of the positive over each negative are from a teacher's (MarginMSE).

    Source: arXiv 2010.02666.

    Args:
        query: (E, B, H).
        candidates: (E, B, 1 + K, H), the positive first.
        scores: (B, 1 + K), the teacher's logits.
        negative_weights: (B, K), 0 where there is no negative.
    Returns:
        scalar: mean over exits of sum_n c_n / (sum_n c_n) sum_ij w_ij (m_n(i, j) - t_i0 + t_ij)^2,
        where m_n(i, j) = (cos_n(q_i, c_i0) - cos_n(q_i, c_ij)) / tau.
    """
    logits = _cosines(query, candidates, spec) / spec.temperature  # (D, E, B, 1 + K)
    margins, wanted = (x[..., :1] - x[..., 1:] for x in (logits, scores))
    error = negative_weights * (margins - wanted).square()
    losses = _sum_over_dims(error.flatten(2).sum(2), spec) / sum(spec.weights)
    return mean_over_exits(losses, spec)


def in_batch_similarity_loss(
    query: Tensor,
    passages: Tensor,
    teacher_query: Tensor,
    teacher_passages: Tensor,
    sample_weights: Tensor,
    spec: MatryoshkaSpec,
) -> Tensor:
    """How far the cosines of each query with all positives are from a teacher's.

    Args:
        query: (E, B, H), the student's.
        passages: (E, G, H), the student's, of the global batch, gathered with gradients.
        teacher_query: (B, H'), unit vectors of any width, without gradients.
        teacher_passages: (G, H'), like `teacher_query`.
        sample_weights: (B,).
    Returns:
        scalar: mean over exits of
        sum_n c_n / (sum_n c_n) sum_i w_i mean_j (cos_n(q_i, p_j) - t_i . t_j)^2.
    """

    def of_rows(rows: slice) -> LossOfExits:
        wanted = teacher_query[rows] @ teacher_passages.T
        alike = torch.full_like(wanted, 1 / passages.shape[1])
        return lambda own, shared: _nested_squared_error(own, shared, wanted, alike, spec)

    return _sum_over_rows(query, passages, sample_weights, spec, of_rows).total


def self_distillation_loss(
    query: Tensor,
    candidates: Tensor,
    passages: Tensor,
    masks: tuple[Tensor, Tensor],
    sample_weights: Tensor,
    spec: MatryoshkaSpec,
) -> Tensor:
    """How far each cut's choice among documents is from that of the deepest exit's whole vectors.

    A choice is the softmax of s / tau over a sample's own candidates and passages of the batch. The
    deepest exit's whole vectors get no gradient from it: nothing is to move towards its cuts.
    Source: the distribution that is aligned in two-dimensional nesting (arXiv 2402.14776).

    Args:
        query: (E, B, H).
        candidates: (E, B, C, H), the positive first.
        passages: (E, G, H), gathered with gradients; G = 0 where others' passages do not count.
        masks: (B, C) and (B, G), for `masked_logits`: what is not to be chosen from.
        sample_weights: (B,).
    Returns:
        scalar: mean over exits of sum_n c_n sum_i w_i KL(deepest, whole || exit, cut to d_n).
    """
    own = torch.cat([query.unsqueeze(2), candidates], dim=2)  # (E, B, 1 + C, H)
    best, best_passages = own[-1:].detach(), passages[-1:].detach()
    whole = replace(spec, dims=spec.dims[:1], weights=(1.0,))

    def choice(left: Tensor, right: Tensor, rows: slice, spec: MatryoshkaSpec) -> Tensor:
        """(D, E, b, C + G) log-probabilities."""
        logits = [
            masked_logits(_cosines(left[:, :, 0], right, spec) / spec.temperature, mask[rows])
            for right, mask in zip((left[:, :, 1:], right), masks, strict=True)
        ]
        return torch.cat(logits, dim=-1).clamp_min(NEVER).log_softmax(-1)

    def of_rows(rows: slice) -> LossOfExits:
        wanted = choice(best[:, rows], best_passages, rows, whole)

        def loss(left: Tensor, right: Tensor) -> Tensor:
            divergence = (wanted.exp() * (wanted - choice(left, right, rows, spec))).sum(-1)
            of_dims = _sum_over_dims(divergence.flatten(1), spec)
            return of_dims.view(divergence.shape[1:])

        return loss

    return _sum_over_rows(own, passages, sample_weights, spec, of_rows).total
