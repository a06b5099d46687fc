"""The encoder's vectors and gradients against transformers' own Qwen3, one sequence at a time."""

import sys

import pytest
import torch
from helpers.encoding import encode, random_loss
from oracles import exit_vectors
from transformers import AutoModel, Qwen3Config, Qwen3Model

from ml_embed.data.packing import PackedBatch, PackedSequences
from ml_embed.errors import UserError
from ml_embed.kernels import attention
from ml_embed.kernels.attention import available_kernels, choose_kernel
from ml_embed.model import (
    FactorizedEmbedding,
    MatryoshkaEncoder,
    check_supported,
    factorize_table,
    turn_factors,
)

EXITS = (1, 2)
LENGTHS = (1, 3, 3, 3, 7, 12)


@pytest.fixture
def backbone(world):
    return AutoModel.from_pretrained(world.backbone)


@pytest.fixture
def sequences():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 384, (length,), generator=generator) for length in LENGTHS]


def naive_vectors(model, sequences):
    """(E, N, H)"""
    each = [exit_vectors(model, ids.tolist(), EXITS) for ids in sequences]
    return torch.stack([torch.stack([vectors[layer] for vectors in each]) for layer in EXITS])


def test_packed_vectors_and_all_gradients_equal_transformers(world, backbone, sequences):
    naive = AutoModel.from_pretrained(world.backbone)
    encoder = MatryoshkaEncoder(backbone, EXITS)
    packed, expected = encode(encoder, sequences), naive_vectors(naive, sequences)
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)
    random_loss(packed).backward()
    random_loss(expected).backward()
    names = {"embedding.weight": "embed_tokens.weight", "norms.0.weight": "norm.weight"}
    gradients = {name: parameter.grad for name, parameter in naive.named_parameters()}
    compared = 0
    for name, parameter in encoder.named_parameters():
        reference = gradients[names.get(name, name.removeprefix("backbone."))]
        assert reference.abs().max() > 1e-4, name
        torch.testing.assert_close(
            parameter.grad, reference, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
        compared += 1
    assert compared == len(gradients)


@pytest.mark.parametrize("rank", [8, 24, None])
def test_factors_give_the_gradients_of_the_multiplied_table(world, backbone, sequences, rank):
    """By the chain rule dA = dE B^T and dB = A^T dE in the leading components, 0 in the others."""
    table = backbone.embed_tokens.weight.detach()
    A, B = factorize_table(table, 32)
    naive = AutoModel.from_pretrained(world.backbone)
    naive.embed_tokens.weight.data = A[:, :rank] @ B[:rank]
    encoder = MatryoshkaEncoder(backbone, EXITS, (A, B))
    packed, expected = encode(encoder, sequences, rank), naive_vectors(naive, sequences)
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)
    random_loss(packed).backward()
    random_loss(expected).backward()
    dE, used = naive.embed_tokens.weight.grad, rank or 32
    dA, dB = dE @ B[:used].T, A[:, :used].T @ dE
    assert dA.abs().max() > 1e-3
    torch.testing.assert_close(encoder.embedding.A.grad[:, :used], dA, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder.embedding.B.grad[:used], dB, rtol=1e-4, atol=1e-4)
    assert not encoder.embedding.A.grad[:, used:].any()
    assert not encoder.embedding.B.grad[used:].any()


def test_a_factorised_encoder_holds_no_table(backbone):
    encoder = MatryoshkaEncoder(
        backbone, EXITS, factorize_table(backbone.embed_tokens.weight.detach(), 16)
    )
    shapes = {tuple(parameter.shape) for parameter in encoder.parameters()}
    assert (384, 16) in shapes
    assert (384, 64) not in shapes


def test_per_layer_norms_start_equal_and_are_trained_apart(backbone, sequences):
    encoder = MatryoshkaEncoder(backbone, EXITS, norm_sharing="per_layer")
    vectors = encode(encoder, sequences)
    vectors[0].sum().backward()
    assert encoder.norms[0].weight.grad.abs().sum() > 0
    assert encoder.norms[1].weight.grad is None or not encoder.norms[1].weight.grad.any()
    assert encoder.norms[0].weight is not encoder.norms[1].weight


def test_a_text_does_not_see_its_neighbours(backbone, sequences):
    encoder = MatryoshkaEncoder(backbone, EXITS)
    together = encode(encoder, sequences)
    alone = torch.cat([encode(encoder, [ids]) for ids in sequences], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_factors_are_the_optimum_at_every_nested_rank(weighted):
    """Against torch's SVD of the (weighted) table; Eckart-Young gives the best error."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(200, 24, generator=generator) @ torch.diag(torch.logspace(0, -2, 24))
    share = torch.rand(200, generator=generator).pow(3) + 1e-3 if weighted else torch.ones(200)
    A, B = factorize_table(table, 16, share if weighted else None)
    root = share.sqrt().unsqueeze(1).double()
    _, singular, _ = torch.linalg.svd(root * table.double(), full_matrices=False)
    for rank in (1, 4, 16):
        error = (root * (table - A[:, :rank] @ B[:rank]).double()).square().sum()
        torch.testing.assert_close(error, singular[rank:].square().sum(), rtol=1e-4, atol=1e-6)


def test_turned_factors_are_those_of_their_table():
    """In r x r what `factorize_table` finds from the whole product, also of a singular B."""
    generator = torch.Generator().manual_seed(0)
    A, full = torch.randn(300, 12, generator=generator), torch.randn(12, 32, generator=generator)
    share = torch.rand(300, generator=generator).pow(8)
    share /= share.sum()
    for B in (full, torch.cat([full[:11], full[:1]])):
        rank = int(torch.linalg.matrix_rank(B))
        expected_A, expected_B = factorize_table(A @ B, rank, share)
        G, C = turn_factors(A, B, share)
        torch.testing.assert_close(A @ G @ C, A @ B, atol=2e-5, rtol=0)
        torch.testing.assert_close((A @ G)[:, :rank], expected_A, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(C[:rank], expected_B, atol=1e-4, rtol=1e-4)
        embedding = FactorizedEmbedding(A, B)
        embedding.turned = (G, C)
        for used in (4, 12, None):
            cut = expected_A[:, :used] @ expected_B[:used]
            torch.testing.assert_close(
                embedding(torch.arange(300), used), cut, atol=1e-4, rtol=1e-4
            )


def test_frequency_factors_beat_svd_on_frequent_tokens():
    generator = torch.Generator().manual_seed(0)
    table, share = (
        torch.randn(300, 32, generator=generator),
        torch.rand(300, generator=generator).pow(8),
    )
    errors = []
    for weights in (None, share):
        A, B = factorize_table(table, 8, weights)
        errors.append((share.unsqueeze(1) * (table - A @ B).square()).sum())
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "sliding"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
    ],
)
def test_backbones_that_would_be_computed_wrongly_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check_supported(Qwen3Config(num_hidden_layers=4, **changes))


def test_kernels_on_the_cpu():
    cpu = torch.device("cpu")
    assert available_kernels(cpu, torch.float32) == ("sdpa",)
    assert choose_kernel("auto", cpu, torch.float32) == "sdpa"
    with pytest.raises(UserError, match="attention: 'flash'"):
        choose_kernel("flash", cpu, torch.float32)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size", "kernels"),
    [
        ((9, 0), torch.bfloat16, 128, ("varlen", "sdpa")),
        ((8, 0), torch.float16, 256, ("varlen", "sdpa")),
        ((8, 0), torch.bfloat16, None, ("varlen", "sdpa")),
        ((7, 5), torch.bfloat16, 128, ("sdpa",)),  # before Ampere
        ((9, 0), torch.float32, 128, ("sdpa",)),
        ((9, 0), torch.bfloat16, 100, ("sdpa",)),  # no multiple of 8
        ((9, 0), torch.bfloat16, 264, ("sdpa",)),
    ],
)
def test_kernels_on_a_gpu(monkeypatch, capability, dtype, head_size, kernels):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "flash_attn_imports", lambda: False)
    assert available_kernels(gpu, dtype, head_size) == kernels
    assert choose_kernel("auto", gpu, dtype, head_size) == kernels[0]
    if "varlen" not in kernels:
        with pytest.raises(UserError, match="attention: 'varlen' cannot run on cuda"):
            choose_kernel("varlen", gpu, dtype, head_size)


def test_torchs_kernel_goes_before_flash_attn_which_must_import(monkeypatch, tmp_path):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    broken = tmp_path / "flash_attn.py"
    monkeypatch.syspath_prepend(tmp_path)
    for content, expected in (("import no_such_library", False), ("", True)):
        broken.write_text(content)
        sys.modules.pop("flash_attn", None)
        attention.flash_attn_imports.cache_clear()
        kernels = available_kernels(gpu, torch.bfloat16, 128)
        assert kernels == ("varlen", *["flash"] * expected, "sdpa")
    sys.modules.pop("flash_attn", None)
    attention.flash_attn_imports.cache_clear()


def test_parts_stay_on_the_backbones_device_and_in_its_dtype():
    config = Qwen3Config(vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=2)
    with torch.device("meta"):
        backbone = Qwen3Model(config).bfloat16()
    encoder = MatryoshkaEncoder(backbone, (1, 2), norm_sharing="per_layer")
    assert len(encoder.norms) == 2
    assert {(p.device.type, p.dtype) for p in encoder.parameters()} == {("meta", torch.bfloat16)}


def test_batches_go_to_a_gpu_through_pinned_memory(monkeypatch):
    """So that the copy need not be waited for."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: asked.append("pinned") or x)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda x, device, non_blocking: asked.append(non_blocking) or x
    )
    batch = PackedBatch(torch.arange(3), PackedSequences.from_lengths([1, 2]))
    batch.to(torch.device("cuda"))
    assert asked == ["pinned", True] * 2


def test_positions_restart_in_every_sequence():
    packed = PackedSequences.from_lengths([2, 3, 1])
    assert packed.position_ids.tolist() == [0, 1, 0, 1, 2, 0]
    assert packed.last_tokens.tolist() == [1, 4, 5]
