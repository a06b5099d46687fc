"""Contrastive and distillation losses over nested vectors: pure functions of tensors.

One loop over the nested dims (`nested_cosines`) serves all of them. Rows may be weighted, so that a
mean over the samples of a global batch is a sum of shares, exact for uneven batches and any number
of processes.

Letters: B samples of this process, C candidates of a sample (its positive and its K negatives),
G passages of the global batch, H hidden size, D nested dims. Sources: MRL (arXiv 2205.13147),
ML-Embed (arXiv 2605.15081).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

LOGITS_AT_ONCE = 2**18
"""In-batch cosines of one exit and dim that are held at a time: so many rows of the batch as fit.
Measured: about 40 float32 values live per cosine."""
SMALLEST_SQUARED_NORM = 1e-24  # the square of torch.nn.functional.normalize's 1e-12


@dataclass(frozen=True)
class MatryoshkaSpec:
    """The nested dims, largest first, their weights c_n, and the temperature tau."""

    dims: tuple[int, ...]
    weights: tuple[float, ...]
    temperature: float


def nested_cosines(
    left: Tensor, right: Tensor, dims: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Cosines of the vectors cut to each dim, smallest first, in one pass over the components.

    A dot product over d components is the one over the next smaller dim plus that of the
    components between, and so are the squared norms. All dims cost what the largest costs alone.

    Args:
        left: (..., M, H), right: (..., N, H), not normalised.
        dims: nested lengths, in any order.
    Yields:
        dim and the cosines (..., M, N).
    """
    dot = left_square = right_square = left.new_zeros(())
    start = 0
    for stop in sorted(dims):
        left_part, right_part = left[..., start:stop], right[..., start:stop]
        dot = dot + left_part @ right_part.transpose(-1, -2)
        left_square = left_square + left_part.square().sum(-1)
        right_square = right_square + right_part.square().sum(-1)
        left_scale = left_square.clamp_min(SMALLEST_SQUARED_NORM).rsqrt()
        right_scale = right_square.clamp_min(SMALLEST_SQUARED_NORM).rsqrt()
        yield stop, dot * left_scale.unsqueeze(-1) * right_scale.unsqueeze(-2)
        start = stop


LossOfRows = Callable[[Tensor, Tensor, slice], Tensor]
"""(some rows of left, all of right, which rows those are) -> their part of a loss, a scalar"""


class _RowwiseLoss(torch.autograd.Function):
    """A loss of (B, H) and (N, H) that is a sum over rows, some rows at a time.

    The gradients of some rows are computed right after their loss, in the forward pass, so that
    only their cosines are in memory, and not the D x B x N ones of every exit. (Checkpointing
    computed everything twice, and kept glibc from reusing freed memory: 1.5 GiB at B = N = 4,096
    with three exits.)
    """

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor, loss_of_rows: LossOfRows, rows: int
    ) -> Tensor:
        left, right = left.detach(), right.detach().requires_grad_()
        total = left.new_zeros(())
        left_gradient, right_gradient = torch.empty_like(left), torch.zeros_like(right)
        for start in range(0, len(left), rows):
            some = slice(start, start + rows)
            with torch.enable_grad():
                own = left[some].requires_grad_()
                loss = loss_of_rows(own, right, some)
                left_gradient[some], of_right = torch.autograd.grad(loss, (own, right))
            right_gradient += of_right
            total += loss.detach()
        ctx.save_for_backward(left_gradient, right_gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        left_gradient, right_gradient = ctx.saved_tensors
        return gradient * left_gradient, gradient * right_gradient, None, None


def _sum_over_rows(left: Tensor, right: Tensor, loss_of_rows: LossOfRows) -> Tensor:
    """The loss of all rows of `left` (B, H) against `right` (N, H), in LOGITS_AT_ONCE's memory."""
    rows = max(1, LOGITS_AT_ONCE // len(right))
    if len(left) > rows:
        return _RowwiseLoss.apply(left, right, loss_of_rows, rows)
    return loss_of_rows(left, right, slice(None))


def _sum_over_dims(
    left: Tensor, right: Tensor, spec: MatryoshkaSpec, loss_of_cosines: Callable[[Tensor], Tensor]
) -> Tensor:
    """sum_n c_n loss(cosines at d_n), a scalar; the loss sees (B, N).

    `left` is (B, H); `right` is (N, H), shared by all samples, or (B, N, H), each sample's own.
    """
    own_candidates = right.dim() == 3
    left = left.unsqueeze(1) if own_candidates else left  # (B, 1, H) or (B, H)
    weight_of = dict(zip(spec.dims, spec.weights, strict=True))
    total = left.new_zeros(())
    for dim, cosines in nested_cosines(left, right, spec.dims):
        total = total + weight_of[dim] * loss_of_cosines(
            cosines.squeeze(1) if own_candidates else cosines
        )
    return total


def masked_logits(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logits of which a softmax leaves out what a mask of their shape says; None = nothing.

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
    sample_weights: Tensor,
    spec: MatryoshkaSpec,
) -> Tensor:
    """sum_n c_n sum_i w_i CE(cos_n(left_i, right) / tau, target_i), a scalar.

    `mask` (B, N): see `masked_logits`.
    """

    def loss(cosines: Tensor) -> Tensor:
        logits = masked_logits(cosines / spec.temperature, mask)
        return (sample_weights * cross_entropy(logits, target, reduction="none")).sum()

    return _sum_over_dims(left, right, spec, loss)


def _nested_squared_error(
    left: Tensor, right: Tensor, wanted: Tensor, entry_weights: Tensor, spec: MatryoshkaSpec
) -> Tensor:
    """sum_n c_n / (sum_n c_n) sum_ij w_ij (cos_n(left_i, right_j) - wanted_ij)^2, a scalar.

    `wanted` and `entry_weights` are (B, N).
    """
    error = _sum_over_dims(
        left, right, spec, lambda cosines: (entry_weights * (cosines - wanted).square()).sum()
    )
    return error / sum(spec.weights)


def hard_loss(
    query: Tensor,
    candidates: Tensor,
    mask: Tensor,
    sample_weights: Tensor,
    spec: MatryoshkaSpec,
) -> Tensor:
    """Cross-entropy of the positive among itself and the sample's own negatives.

    Source: F2LLM (arXiv 2510.02294).

    Args:
        query: (B, H).
        candidates: (B, C, H), the positive first. With C = 1 (no negatives at all) the loss is 0.
        mask: (B, C), for `masked_logits`: what a sample does not have, or is no negative.
        sample_weights: (B,), their sum over all samples is 1 for a mean.
    Returns:
        scalar, float32.
    """
    if candidates.shape[1] == 1:
        return query.new_zeros(())
    target = torch.zeros(len(query), dtype=torch.long, device=query.device)
    return _nested_cross_entropy(query, candidates, target, mask, sample_weights, spec)


def in_batch_loss(
    query: Tensor,
    passages: Tensor,
    target: Tensor,
    mask: Tensor | None,
    sample_weights: Tensor,
    spec: MatryoshkaSpec,
) -> Tensor:
    """Cross-entropy of the positive among all positives of the global batch, no hard negatives.

    Args:
        query: (B, H).
        passages: (G, H), gathered with gradients.
        target: (B,) index of each sample's positive in `passages`.
        mask: (B, G), for `masked_logits`: what is no negative of the sample; None = nothing.
        sample_weights: (B,).
    Returns:
        scalar, float32.
    """

    def of_rows(own: Tensor, shared: Tensor, rows: slice) -> Tensor:
        own_mask = None if mask is None else mask[rows]
        weights = sample_weights[rows]
        return _nested_cross_entropy(own, shared, target[rows], own_mask, weights, spec)

    return _sum_over_rows(query, passages, of_rows)


def pair_cosines(query: Tensor, passage: Tensor, spec: MatryoshkaSpec) -> Tensor:
    """Cosines of pairs (..., H), cut to each dim of the spec: (..., D) in the spec's order."""
    pairs = query.unsqueeze(-2), passage.unsqueeze(-2)
    of_dim = {dim: cosine[..., 0, 0] for dim, cosine in nested_cosines(*pairs, spec.dims)}
    return torch.stack([of_dim[dim] for dim in spec.dims], dim=-1)


def cosent_loss(cosines: Tensor, scores: Tensor, spec: MatryoshkaSpec) -> Tensor:
    """How far the order of pairs by cosine is from their order by score (CoSENT).

    Source: sentence-transformers' CoSENTLoss, whose scale is 1 / tau; https://kexue.fm/archives/8847.
    Each dim's sum over all two pairs is formed in n log n steps: for each pair, the sum over pairs
    of lower scores is a running sum along the order of scores.

    Args:
        cosines: (n, D) of the pairs of the global batch, in the order of the spec's dims.
        scores: (n,).
    Returns:
        scalar: sum_d c_d log(1 + sum over i, j with score_i < score_j of
        exp((cos_d(i) - cos_d(j)) / tau)); 0 if all scores are equal.
    """
    ordered, order = scores.sort()
    logits = cosines[order] / spec.temperature  # (n, D)
    lower = torch.searchsorted(ordered, ordered)  # (n,) how many pairs have a lower score
    running = logits.logcumsumexp(dim=0)
    has_lower = lower > 0
    terms = running[lower[has_lower] - 1] - logits[has_lower]  # (at most n - 1, D)
    losses = torch.cat([terms, torch.zeros_like(logits[:1])]).logsumexp(dim=0)  # (D,)
    return (losses * losses.new_tensor(spec.weights)).sum()


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
        query: (B, H), the student's.
        candidates: (B, C, H), the student's.
        wanted: (B, C), the teacher's cosines.
        entry_weights: (B, C), 0 where there is no candidate.
    Returns:
        scalar: sum_n c_n / (sum_n c_n) sum_ij w_ij (cos_n(q_i, c_ij) - t_ij)^2.
    """
    return _nested_squared_error(query, candidates, wanted, entry_weights, spec)


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
        query: (B, H), the student's.
        passages: (G, H), the student's, of the global batch, gathered with gradients.
        teacher_query: (B, H'), unit vectors of any width, without gradients.
        teacher_passages: (G, H'), like `teacher_query`.
        sample_weights: (B,).
    Returns:
        scalar: sum_n c_n / (sum_n c_n) sum_i w_i mean_j (cos_n(q_i, p_j) - t_i . t_j)^2.
    """

    def of_rows(own: Tensor, shared: Tensor, rows: slice) -> Tensor:
        wanted = teacher_query[rows] @ teacher_passages.T
        return _nested_squared_error(
            own, shared, wanted, sample_weights[rows].unsqueeze(1) / len(passages), spec
        )

    return _sum_over_rows(query, passages, of_rows)
