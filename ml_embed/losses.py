"""Contrastive losses over nested vectors: pure functions of tensors.

One loop over the nested dims (`nested_cosines`) serves all of them. Rows may be weighted, so that a mean over the
samples of a global batch is a sum of shares, exact for uneven batches and any number of processes.

Letters: B samples of this process, C candidates of a sample (its positive and its K negatives), G passages of the
global batch, H hidden size, D nested dims. Sources: MRL (arXiv 2205.13147), ML-Embed (arXiv 2605.15081).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

LOGITS_AT_ONCE = 2**18
"""In-batch logits of one exit and dim held at a time, in rows of the batch; some 40 float32 values live for each."""
SMALLEST_SQUARED_NORM = 1e-24  # of a vector, squared: the 1e-12 of torch.nn.functional.normalize


@dataclass(frozen=True)
class MatryoshkaSpec:
    """The nested dims, largest first, their weights c_n, and the temperature tau."""

    dims: tuple[int, ...]
    weights: tuple[float, ...]
    temperature: float


def nested_cosines(left: Tensor, right: Tensor, dims: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Cosines of the vectors cut to each dim, smallest first, in one pass over the components.

    A dot product over d components is the one over the next smaller dim plus a block, and so are the squared norms;
    so all dims together cost what the largest costs alone.

    Args:
        left: (..., M, H), right: (..., N, H), not normalised.
        dims: nested lengths, in any order.
    Yields:
        dim and the cosines (..., M, N).
    """
    dot = left_square = right_square = 0.0
    start = 0
    for stop in sorted(dims):
        left_block, right_block = left[..., start:stop], right[..., start:stop]
        dot = dot + left_block @ right_block.transpose(-1, -2)
        left_square = left_square + left_block.square().sum(-1)
        right_square = right_square + right_block.square().sum(-1)
        left_scale = left_square.clamp_min(SMALLEST_SQUARED_NORM).rsqrt()
        right_scale = right_square.clamp_min(SMALLEST_SQUARED_NORM).rsqrt()
        yield stop, dot * left_scale.unsqueeze(-1) * right_scale.unsqueeze(-2)
        start = stop


class _BlockwiseCrossEntropy(torch.autograd.Function):
    """`_nested_cross_entropy` of (B, H) and (N, H) in blocks of rows, each with its gradients at once.

    The loss is a sum over rows, so a block's gradients are known as soon as its value is, and the D x B x N logits of
    every exit need not wait for the backward pass. (Checkpointing each block instead did it twice, and its small
    leftovers between freed blocks kept glibc from reusing them: 1.5 GiB at B = N = 4,096, three exits.)
    """

    @staticmethod
    def forward(ctx, left, right, target, excluded, sample_weights, spec, rows):
        left, right = left.detach(), right.detach().requires_grad_()
        total = left.new_zeros(())
        left_gradient, right_gradient = torch.empty_like(left), torch.zeros_like(right)
        for start in range(0, len(left), rows):
            block = slice(start, start + rows)
            mask = None if excluded is None else excluded[block]
            with torch.enable_grad():
                own = left[block].requires_grad_()
                loss = _nested_cross_entropy(own, right, target[block], mask, sample_weights[block], spec)
                left_gradient[block], of_right = torch.autograd.grad(loss, (own, right))
            right_gradient += of_right
            total += loss.detach()
        ctx.save_for_backward(left_gradient, right_gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        left_gradient, right_gradient = ctx.saved_tensors
        return gradient * left_gradient, gradient * right_gradient, None, None, None, None, None


def _nested_cross_entropy(
    left: Tensor, right: Tensor, target: Tensor, excluded: Tensor | None, sample_weights: Tensor, spec: MatryoshkaSpec
) -> Tensor:
    """sum_n c_n sum_i w_i CE(cos_n(left_i, right) / tau, target_i), a scalar; `excluded` (B, N) logits count nothing.

    `right` is (N, H), shared by all samples, or (B, N, H), each sample's own.
    """
    own_candidates = right.dim() == 3
    left = left.unsqueeze(1) if own_candidates else left  # (B, 1, H) or (B, H)
    weight_of = dict(zip(spec.dims, spec.weights, strict=True))
    total = left.new_zeros(())
    for dim, cosines in nested_cosines(left, right, spec.dims):
        logits = (cosines.squeeze(1) if own_candidates else cosines) / spec.temperature  # (B, N)
        if excluded is not None:
            logits = logits.masked_fill(excluded, -torch.inf)
        total = total + weight_of[dim] * (sample_weights * cross_entropy(logits, target, reduction="none")).sum()
    return total


def hard_loss(
    query: Tensor, candidates: Tensor, excluded: Tensor, sample_weights: Tensor, spec: MatryoshkaSpec
) -> Tensor:
    """Cross-entropy of the positive among itself and the sample's own negatives (F2LLM, arXiv 2510.02294).

    Args:
        query: (B, H).
        candidates: (B, C, H), the positive first. With C = 1 (no negatives at all) the loss is 0.
        excluded: (B, C) bool, true where a candidate is a filler or not a negative of this sample.
        sample_weights: (B,), their sum over all samples is 1 for a mean.
    Returns:
        scalar, float32.
    """
    if candidates.shape[1] == 1:
        return query.new_zeros(())
    target = torch.zeros(len(query), dtype=torch.long, device=query.device)
    return _nested_cross_entropy(query, candidates, target, excluded, sample_weights, spec)


def in_batch_loss(
    query: Tensor,
    passages: Tensor,
    target: Tensor,
    excluded: Tensor | None,
    sample_weights: Tensor,
    spec: MatryoshkaSpec,
) -> Tensor:
    """Cross-entropy of the positive among all positives of the global batch; no hard negatives in it.

    Args:
        query: (B, H), passages: (G, H), gathered with gradients.
        target: (B,) index of each sample's positive in `passages`.
        excluded: (B, G) bool, true where a passage is the sample's own document standing in another row; or None.
        sample_weights: (B,).
    Returns:
        scalar, float32.
    """
    rows = max(1, LOGITS_AT_ONCE // len(passages))
    if len(query) > rows:
        return _BlockwiseCrossEntropy.apply(query, passages, target, excluded, sample_weights, spec, rows)
    return _nested_cross_entropy(query, passages, target, excluded, sample_weights, spec)


def distillation_loss(student: Tensor, teacher: Tensor, row_weights: Tensor) -> Tensor:
    """Weighted mean squared error between student vectors and as many leading components of the teacher's.

    Args:
        student: (N, H), teacher: (N, H_teacher >= H), neither normalised.
        row_weights: (N,), 1 / rows for a mean over rows.
    Returns:
        scalar: sum_i w_i mean_h (s_ih - t_ih)^2.
    """
    difference = student - teacher[..., : student.shape[-1]]
    return (row_weights * difference.square().mean(-1)).sum()
