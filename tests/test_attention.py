"""Attention over packed sequences against one sequence, one head and one query at a time."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ml_embed import attention
from ml_embed.attention import PackedSequences, packed_attention

LENGTHS = (1, 3, 3, 7)
HEADS, GROUPS, HEAD_DIM = 4, 2, 8
SCALE = HEAD_DIM**-0.5


def naive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(1, A, T, D) x (1, G, T, D) -> (1, T, A, D) by the formula."""
    outputs, start = [], 0
    for length in LENGTHS:
        for last in range(start, start + length):
            heads = []
            for head in range(HEADS):
                keys, values = (x[0, head * GROUPS // HEADS, start : last + 1] for x in (key, value))
                heads.append((keys @ query[0, head, last] * SCALE).softmax(0) @ values)
            outputs.append(torch.stack(heads))
        start += length
    return torch.stack(outputs).unsqueeze(0)


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), HEAD_DIM) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def attended(inputs: list[Tensor], kernel: str) -> Tensor:
    module = SimpleNamespace(head_dim=HEAD_DIM)
    packed = PackedSequences.from_lengths(LENGTHS)
    return packed_attention(module, *inputs, None, packed=packed, kernel=kernel)[0]


def test_sdpa_is_the_formula_in_values_and_gradients():
    inputs = tensors()
    found, expected = attended(inputs, "sdpa"), naive(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    for a, b in zip(
        torch.autograd.grad(found, inputs, weights), torch.autograd.grad(expected, inputs, weights), strict=True
    ):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def standing_in(takes_grouped_heads: bool):
    """A kernel of torch's documented meaning, on any device."""

    def attend(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa=False):
        assert enable_gqa == (q.shape[1] != k.shape[1])
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        outputs = []
        for i in range(len(cu_q) - 1):
            queries, keys, values = q[cu_q[i] : cu_q[i + 1]], k[cu_k[i] : cu_k[i + 1]], v[cu_k[i] : cu_k[i + 1]]
            keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (keys, values))
            scores = torch.einsum("qad,kad->aqk", queries, keys) / math.sqrt(q.shape[2])
            assert window_size == (-1, 0), "(before, after): all before, none after"
            scores = scores.masked_fill(torch.ones(len(queries), len(keys)).triu(1).bool(), -torch.inf)
            outputs.append(torch.einsum("aqk,kad->qad", scores.float().softmax(-1).to(v.dtype), values))
        return torch.cat(outputs)

    def ungrouped(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size):
        return attend(q, k, v, cu_q, cu_k, max_q, max_k, window_size=window_size)

    return attend if takes_grouped_heads else ungrouped


@pytest.mark.parametrize("takes_grouped_heads", [False, True])
def test_the_variable_length_kernel_is_told_where_sequences_lie(monkeypatch, takes_grouped_heads):
    kernel = standing_in(takes_grouped_heads)
    monkeypatch.setattr(attention, "_torch_varlen", lambda: kernel)
    inputs = tensors(torch.bfloat16)
    expected = naive(*(x.double() for x in inputs))
    torch.testing.assert_close(attended(inputs, "varlen").double(), expected, rtol=0, atol=0.03)  # 8 bits
