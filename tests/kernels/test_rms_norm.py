"""The fused RMSNorm against the formula, row by row: values and gradients."""

import pytest
import torch
from transformers import AutoModel

from ml_embed.data.packing import PackedSequences
from ml_embed.kernels import rms_norm as module
from ml_embed.kernels.rms_norm import fuse_norms, rms_norm
from ml_embed.model import MatryoshkaEncoder, factorize_table

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


def half_precision_error(world, own: bool) -> float:
    """Relative error of all gradients in bfloat16, with our norms or with transformers'."""
    exact, half = (AutoModel.from_pretrained(world.backbone).layers[0].mlp for _ in range(2))
    kind = AutoModel.from_pretrained(world.backbone).norm
    size, generator = len(kind.weight), torch.Generator().manual_seed(2)
    x, grad = torch.randn(2, 200, size, generator=generator)
    found = []
    for mlp, dtype in ((exact, torch.float32), (half, torch.bfloat16)):
        norm = type(kind)(size)
        norm.weight.data = torch.randn(size, generator=torch.Generator().manual_seed(3))
        if own and dtype == torch.bfloat16:
            fuse_norms(norm)
        rows = x.detach().to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = mlp(norm(rows))
        out.backward(grad.to(out.dtype))
        parts = (rows.grad, norm.weight.grad, *(p.grad for p in mlp.parameters()))
        assert all(part.abs().max() > 0 for part in parts)
        found.append(torch.cat([part.float().flatten() for part in parts]))
    return float((found[1] - found[0]).norm() / found[0].norm())


def test_half_precision_stays_half_and_no_less_exact(world):
    norm = AutoModel.from_pretrained(world.backbone).norm
    fuse_norms(norm)
    x = torch.randn(1, 5, len(norm.weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(norm(x), naive(x, norm.weight))  # float32 rows stay float32
    norm.bfloat16()
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert half_precision_error(world, own=True) < 1.1 * half_precision_error(world, own=False)


@pytest.mark.parametrize("rank", [None, 8])
def test_under_autocast_nothing_between_layers_is_float32(world, rank):
    """Queries, keys, the residual and what all seven projections read, with factors and without."""
    backbone = AutoModel.from_pretrained(world.backbone)
    factors = None if rank is None else factorize_table(backbone.embed_tokens.weight.data, rank)
    seen = {}
    encoder = MatryoshkaEncoder(backbone, (1, 2), factors)
    for number, layer in enumerate(encoder.backbone.layers):
        for name in (*(f"self_attn.{p}_proj" for p in "qkvo"), *matrix_names(layer.mlp)):
            note_input(layer.get_submodule(name), f"{number} {name}", seen)
        note_input(layer, f"{number} residual", seen)
        for name in ("q_norm", "k_norm"):
            note_output(layer.get_submodule(f"self_attn.{name}"), f"{number} {name}", seen)
    with torch.autocast("cpu", torch.bfloat16):
        vectors = encoder(torch.arange(6), PackedSequences.from_lengths([2, 4]))
    assert len(seen) == 2 * 10
    assert set(seen.values()) == {torch.bfloat16}, seen
    assert vectors.dtype == torch.float32


def matrix_names(mlp) -> list[str]:
    return [f"mlp.{name}" for name, part in mlp.named_children() if name.endswith("_proj")]


def note_input(module, name: str, seen: dict) -> None:
    module.register_forward_pre_hook(
        lambda _, arguments: seen.__setitem__(name, arguments[0].dtype)
    )


def note_output(module, name: str, seen: dict) -> None:
    module.register_forward_hook(lambda _, arguments, out: seen.__setitem__(name, out.dtype))
