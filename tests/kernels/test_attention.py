"""Attention over packed sequences against one sequence, one head and one query at a time."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from helpers.operations import CountOperations
from torch import Tensor

from ml_embed.data.packing import PackedSequences
from ml_embed.kernels import attention
from ml_embed.kernels.attention import packed_attention
from ml_embed.kernels.bucketed_attention import bucketed_attention, make_buckets

LENGTHS = (1, 3, 3, 7)
HEADS, GROUPS, HEAD_DIM = 4, 2, 8
SCALE = HEAD_DIM**-0.5


def naive(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int] = LENGTHS) -> Tensor:
    """(1, A, T, D) x (1, G, T, D) -> (1, T, A, D) by the formula."""
    outputs, start = [], 0
    num_heads, groups = query.shape[1], key.shape[1]
    for length in lengths:
        for last in range(start, start + length):
            heads = []
            for head in range(num_heads):
                keys, values = (
                    x[0, head * groups // num_heads, start : last + 1] for x in (key, value)
                )
                heads.append((keys @ query[0, head, last] * SCALE).softmax(0) @ values)
            outputs.append(torch.stack(heads))
        start += length
    return torch.stack(outputs).unsqueeze(0)


def tensors(
    dtype: torch.dtype = torch.float64,
    lengths: Sequence[int] = LENGTHS,
    heads: int = HEADS,
    groups: int = GROUPS,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, number, sum(lengths), HEAD_DIM) for number in (heads, groups, groups)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def attended(
    inputs: list[Tensor], kernel: str, lengths: Sequence[int] = LENGTHS, **options: bool
) -> Tensor:
    module = SimpleNamespace(head_dim=HEAD_DIM)
    packed = PackedSequences.from_lengths(lengths)
    return packed_attention(module, *inputs, None, packed=packed, kernel=kernel, **options)[0]


def assert_same_with_gradients(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(
        found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype
    )
    gradients = (torch.autograd.grad(x, inputs, weights) for x in (found, expected))
    for a, b in zip(*gradients, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.fixture
def only_fused(monkeypatch):
    monkeypatch.setattr(attention, "_buckets_are_faster", lambda query: False)


def test_sdpa_is_the_formula_in_values_and_gradients(only_fused):
    inputs = tensors()
    assert_same_with_gradients(attended(inputs, "sdpa"), naive(*inputs), inputs)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(1, 2), (5, 5, 5), LENGTHS, (21, 1, 19, 20, 2, 20, 11)])
def test_buckets_are_the_formula_in_values_and_gradients(lengths, groups):
    inputs = tensors(lengths=lengths, groups=groups)
    found = bucketed_attention(*inputs, lengths, SCALE)
    assert_same_with_gradients(found, naive(*inputs, lengths), inputs)


def test_a_bucket_holds_about_equal_lengths():
    buckets = make_buckets((21, 1, 19, 20, 2, 20, 11), groups=2)
    assert buckets.shapes == ((4, 21), (1, 11), (1, 2), (1, 1))
    assert len(buckets.padding) == 2 * (4 * 21 - 21 - 20 - 20 - 19)


@pytest.mark.parametrize("lengths", [(2, 5, 6, 9), (9, 2, 7, 5, 5)])
def test_training_puts_short_sequences_in_buckets_and_leaves_long_ones_to_torch(
    monkeypatch, lengths
):
    seen = []

    def note(
        query: Tensor, key: Tensor, value: Tensor, own: tuple[int, ...], scale: float
    ) -> Tensor:
        seen.extend(own)
        return bucketed_attention(query, key, value, own, scale)

    monkeypatch.setattr(attention, "LONGEST", 5)
    monkeypatch.setattr(attention, "bucketed_attention", note)
    inputs = tensors(lengths=lengths)
    assert_same_with_gradients(attended(inputs, "sdpa", lengths), naive(*inputs, lengths), inputs)
    assert sorted(seen) == sorted(length for length in lengths if length <= 5)
    seen.clear()
    with torch.no_grad():
        torch.testing.assert_close(
            attended(inputs, "sdpa", lengths), naive(*inputs, lengths), rtol=1e-12, atol=1e-12
        )
    assert not seen, "nothing is kept for a backward pass that does not come"


def test_last_queries_alone_are_the_formula_and_the_other_rows_zero():
    inputs = tensors()
    last = PackedSequences.from_lengths(LENGTHS).last_tokens
    found = attended(inputs, "sdpa", last_queries_only=True)
    expected = torch.zeros_like(found).index_copy(1, last, naive(*inputs)[:, last])
    assert_same_with_gradients(found, expected, inputs)


def standing_in(takes_grouped_heads: bool):
    """What torch documents `varlen_attn` to compute, on any device."""

    def attend(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        assert enable_gqa == (q.shape[1] != k.shape[1])
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        outputs = []
        for i in range(len(cu_q) - 1):
            queries, keys, values = (
                q[cu_q[i] : cu_q[i + 1]],
                k[cu_k[i] : cu_k[i + 1]],
                v[cu_k[i] : cu_k[i + 1]],
            )
            keys, values = (
                x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (keys, values)
            )
            scores = torch.einsum("qad,kad->aqk", queries, keys) * scale
            assert window_size == (-1, 0), "(before, after): all before, none after"
            scores = scores.masked_fill(
                torch.ones(len(queries), len(keys)).triu(1).bool(), -torch.inf
            )
            outputs.append(
                torch.einsum("aqk,kad->qad", scores.float().softmax(-1).to(v.dtype), values)
            )
        return torch.cat(outputs)

    def ungrouped(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        return attend(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)

    return attend if takes_grouped_heads else ungrouped


def test_the_variable_length_path_fills_nothing_with_zeros(monkeypatch):
    """`x[0]` would, for each gradient, the whole tensor first."""
    monkeypatch.setattr(attention, "varlen_attn", lambda q, k, v, *_, **__: q + (k + v).sum())
    inputs = tensors(torch.bfloat16, groups=HEADS)
    with CountOperations() as counted:
        attended(inputs, "varlen").sum().backward()
    assert all(x.grad.abs().max() > 0 for x in inputs)
    assert not [name for name in counted.names if "select" in name or "zeros" in name]


@pytest.mark.parametrize("takes_grouped_heads", [False, True])
def test_the_variable_length_kernel_is_told_where_sequences_lie(monkeypatch, takes_grouped_heads):
    monkeypatch.setattr(attention, "varlen_attn", standing_in(takes_grouped_heads))
    inputs = tensors(torch.bfloat16)
    expected = naive(*(x.double() for x in inputs))
    found = attended(inputs, "varlen").double()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)  # bfloat16 has 8 bits
