"""Causal attention of short sequences on the CPU, in buckets of about equal length.

torch's fused CPU kernel works on a few queries at a time: it leaves a second core idle, and its
backward pass is many times slower than matrix products. Here each bucket is a few batched matrix
products. The attention weights, T A x length numbers, are kept for the backward pass; therefore
only sequences of up to `LONGEST` tokens are computed this way.

Letters: T tokens, N sequences, A query heads, G key/value heads, D head size, R = A / G query heads
per key/value head, P length to which the sequences of a bucket are padded.

Each (token, key/value head) is a row. A padded sequence has G P rows: P for each key/value head.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

LONGEST = 256
"""Tokens. Longer sequences gain less speed, and their attention weights take as much memory as the
rest of a layer."""
SHORTEST_IN_BUCKET = 0.9
"""Shortest sequence of a bucket as a share of the longest: at most a tenth of the rows are
padding."""


@dataclass(frozen=True)
class Buckets:
    """Where the T G rows of a batch go when its sequences are padded bucket by bucket."""

    shapes: tuple[tuple[int, int], ...]
    """(number of sequences, padded length P) of each bucket."""
    sources: Tensor
    """(rows of all buckets,) int64: which of the T G rows stands there; 0 at padding."""
    padding: Tensor
    """(rows that are padding,) int64: their places among the rows of all buckets."""
    targets: Tensor
    """(T G,) int64: each row's place among the rows of all buckets."""

    def pad(self, rows: Tensor) -> Tensor:
        """(T G, width) -> (rows of all buckets, width), zeros at padding"""
        return rows.index_select(0, self.sources).index_fill_(0, self.padding, 0)

    def unpad(self, rows: Tensor) -> Tensor:
        """(rows of all buckets, width) -> (T G, width); `pad` transposed"""
        return rows.index_select(0, self.targets)

    def split(self, rows: Tensor, groups: int, width: int) -> list[Tensor]:
        """(rows of all buckets, ...) -> for each bucket a view (sequences x G, ..., width)"""
        sections = rows.split([count * groups * length for count, length in self.shapes])
        return [
            section.view(count * groups, -1, width)
            for section, (count, _) in zip(sections, self.shapes, strict=True)
        ]


@lru_cache(maxsize=4)  # every layer of a model asks for the same
def make_buckets(lengths: tuple[int, ...], groups: int) -> Buckets:
    """Sort the sequences of a batch by length and cut that order into buckets.

    Args:
        lengths: tokens of each sequence, in the order of the batch, which may be any.
        groups: G.
    """
    all_lengths = np.asarray(lengths, np.int64)
    starts = np.cumsum(all_lengths) - all_lengths
    order = np.argsort(-all_lengths, kind="stable")
    shapes, sources, is_token = [], [], []
    while len(order):
        length = all_lengths[order[0]]
        count = int(np.count_nonzero(all_lengths[order] >= SHORTEST_IN_BUCKET * length))
        members, order = order[:count], order[count:]
        positions = np.arange(length)
        tokens = starts[members, None, None] + positions  # (count, 1, length)
        inside = np.broadcast_to(
            positions < all_lengths[members, None, None], (count, groups, length)
        )
        sources.append(np.where(inside, tokens * groups + np.arange(groups)[:, None], 0).ravel())
        is_token.append(inside.ravel())
        shapes.append((count, int(length)))
    source, inside = np.concatenate(sources), np.concatenate(is_token)
    target = np.empty(int(all_lengths.sum()) * groups, np.int64)
    target[source[inside]] = np.flatnonzero(inside)
    return Buckets(
        tuple(shapes),
        torch.from_numpy(source),
        torch.from_numpy(np.flatnonzero(~inside)),
        torch.from_numpy(target),
    )


def bucketed_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float
) -> Tensor:
    """Causal attention of sequences of at most `LONGEST` tokens.

    Args:
        query: (1, A, T, D) float32 or float64 on the CPU.
        key, value: (1, G, T, D) of the same kind.
        lengths: tokens of each sequence.
        scale: factor of the scores.
    Returns:
        (1, T, A, D)
    """
    _, heads, tokens, size = query.shape
    groups = key.shape[1]
    rows = [x.transpose(1, 2).reshape(tokens * groups, -1) for x in (query, key, value)]
    out = _Attention.apply(*rows, make_buckets(lengths, groups), groups, scale)
    return out.view(1, tokens, heads, size)


class _Attention(torch.autograd.Function):
    """softmax(scale Q K^T + causal mask) V for each padded sequence and key/value head.

    The R query heads of a key/value head stand side by side in a row, so one product serves all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        buckets: Buckets,
        groups: int,
        scale: float,
    ) -> Tensor:
        """(T G, R D) queries, (T G, D) keys and values -> (T G, R D)"""
        size = key.shape[1]
        query, key, value = (buckets.pad(x) for x in (query, key, value))
        out = torch.empty_like(query)
        mask = _causal_mask(query.shape[1] // size, query.dtype)
        weights = []
        parts = (buckets.split(x, groups, size) for x in (query, key, value, out))
        for q, k, v, o in zip(*parts, strict=True):
            scores = torch.baddbmm(
                mask[: q.shape[1], : k.shape[1]], q, k.transpose(1, 2), alpha=scale
            )
            weights.append(torch.softmax(scores, dim=-1))  # (count G, P R, P)
            torch.bmm(weights[-1], v, out=o)
        ctx.save_for_backward(query, key, value, out, *weights)
        ctx.buckets, ctx.groups, ctx.scale = buckets, groups, scale
        return buckets.unpad(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """With W = softmax(S) and O = W V: dV = W^T dO, dS = W * (dO V^T - rowsum(dO * O))."""
        query, key, value, out, *weights = ctx.saved_tensors
        buckets, scale, size = ctx.buckets, ctx.scale, key.shape[1]
        grad = buckets.pad(gradients[0])
        shift = (grad * out).view(-1, size).sum(dim=-1, keepdim=True).neg_()
        shift = shift.view(len(grad), -1)  # (rows, R)
        grads = [torch.empty_like(x) for x in (query, key, value)]
        whole = (buckets.split(x, ctx.groups, size) for x in (query, key, value, grad, *grads))
        shifts = buckets.split(shift, ctx.groups, 1)
        for w, s, q, k, v, g, dq, dk, dv in zip(weights, shifts, *whole, strict=True):
            torch.bmm(w.transpose(1, 2), g, out=dv)
            d_scores = torch.baddbmm(s, g, v.transpose(1, 2)).mul_(w)
            torch.baddbmm(dq, d_scores, k, beta=0, alpha=scale, out=dq)
            torch.baddbmm(dk, d_scores.transpose(1, 2), q, beta=0, alpha=scale, out=dk)
        return *(buckets.unpad(x) for x in grads), None, None, None


@cache
def _causal_mask(shared: int, dtype: torch.dtype) -> Tensor:
    """(LONGEST R, LONGEST): 0 where a query may look, minus infinity elsewhere.

    Shorter sequences take its upper left corner. `shared` is R.
    """
    mask = torch.full((LONGEST, LONGEST), -torch.inf, dtype=dtype).triu_(1)
    return mask.repeat_interleave(shared, dim=0)
