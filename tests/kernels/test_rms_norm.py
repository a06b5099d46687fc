"""The fused RMSNorm against the formula, row by row: values and gradients."""

import pytest
import torch
from transformers import AutoModel

from ml_embed.data.packing import PackedSequences
from ml_embed.kernels import rms_norm as module
from ml_embed.kernels.rms_norm import fuse_norms, rms_norm
from ml_embed.model import MatryoshkaEncoder

EPS = 1e-6


def naive(x, weight, eps=EPS):
    rows = [
        row / (row.square().sum() / len(row) + eps).sqrt() * weight
        for row in x.reshape(-1, x.shape[-1])
    ]
    return torch.stack(rows).view(x.shape)


def tensors(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(size, generator=generator, dtype=dtype) for size in (shape, shape[-1:], shape)
    )
    return x.requires_grad_(), weight.requires_grad_(), grad


def gradients(function, x, weight, grad, eps=EPS):
    x.grad = weight.grad = None
    y = function(x, weight, eps)
    y.backward(grad)
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("shape", [(1, 7, 16), (1, 5, 3, 8), (4, 1), (1, 16)])
def test_values_and_gradients(shape, eps):
    inputs = tensors(shape)
    for own, expected in zip(
        gradients(rms_norm, *inputs, eps), gradients(naive, *inputs, eps), strict=True
    ):
        assert expected.abs().max() > 1e-9
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


def test_rows_and_gradients_in_any_order_of_memory():
    """The gradient of queries arrives from (heads, tokens), rows may come from there as well."""
    x, weight, grad = tensors((1, 5, 3, 8))
    expected = gradients(naive, x, weight, grad)
    other = grad.transpose(1, 2).contiguous().transpose(1, 2)
    assert not other.is_contiguous()
    strange = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    for rows in (x, strange):
        for own, wanted in zip(gradients(rms_norm, rows, weight, other), expected, strict=True):
            torch.testing.assert_close(own, wanted, rtol=1e-12, atol=1e-12)


def test_a_row_of_zeros():
    weight = torch.ones(8, requires_grad=True)
    x = torch.zeros(2, 8, requires_grad=True)
    y, grad, _ = gradients(rms_norm, x, weight, torch.ones(2, 8))
    assert not y.any()
    torch.testing.assert_close(grad, torch.full((2, 8), 1e3))


def test_frozen_weights_get_no_gradient():
    x, weight, grad = tensors((3, 8))
    rms_norm(x, weight.requires_grad_(False), EPS).backward(grad)
    assert weight.grad is None
    weight.requires_grad_()
    torch.testing.assert_close(
        x.grad, gradients(naive, *tensors((3, 8)))[1], rtol=1e-12, atol=1e-12
    )


@pytest.fixture
def fused_rows(monkeypatch):
    """Numbers of rows (tokens, texts or heads) that the fused norm is given, call by call."""
    seen, own = [], module.rms_norm

    def note(x, weight, eps):
        seen.append(tuple(x.shape[1:-1]))
        return own(x, weight, eps)

    monkeypatch.setattr(module, "rms_norm", note)
    return seen


def test_the_norms_of_all_layers_are_fused(world, fused_rows):
    backbone = AutoModel.from_pretrained(world.backbone)
    heads, groups = backbone.config.num_attention_heads, backbone.config.num_key_value_heads
    packed = PackedSequences.from_lengths([2, 4])
    encoder = MatryoshkaEncoder(backbone, (1, 2))
    encoder(torch.arange(6), packed)
    attended = [(6,), (6, heads), (6, groups)]
    assert fused_rows == [*attended, (6,), *attended, (2,)], (
        "the last layer's second norm sees last tokens only"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_left_to_transformers(world, dtype, fused_rows):
    norm = AutoModel.from_pretrained(world.backbone).norm
    x = torch.randn(1, 5, len(norm.weight))
    with torch.autocast("cpu", enabled=dtype == torch.bfloat16):
        expected = norm(x)
    fuse_norms(norm, type(norm))
    with torch.autocast("cpu", enabled=dtype == torch.bfloat16):
        torch.testing.assert_close(norm(x), expected)
        assert len(fused_rows) == (dtype == torch.float32)
    norm.bfloat16()
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert len(fused_rows) == (dtype == torch.float32)
