"""The narrowed last layer gives the same vectors and gradients as a whole one."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModel

from ml_embed.data.packing import PackedSequences
from ml_embed.model import MatryoshkaEncoder

EXITS = (1, 2)


@pytest.fixture
def packed_batches():
    """Two batches of different texts, tokens and numbers of texts."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for lengths in ((2, 5, 9), (4, 4, 6, 11, 13)):
        batches.append((torch.randint(0, 384, (sum(lengths),), generator=generator), lengths))
    return [(ids, PackedSequences.from_lengths(lengths)) for ids, lengths in batches]


def load(world, **options) -> MatryoshkaEncoder:
    return MatryoshkaEncoder(AutoModel.from_pretrained(world.backbone), EXITS, **options)


def gradients(encoder) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in encoder.named_parameters()}
    assert all(grad.abs().max() > 0 for grad in found.values())
    encoder.zero_grad()
    return found


def test_the_last_layer_is_narrowed_and_no_other(world, packed_batches):
    encoder, seen = load(world), {}
    ids, packed = packed_batches[1]

    def note(name: str):
        return lambda module, arguments, out: seen.setdefault(name, []).append(
            arguments[0].shape[1]
        )

    for layer in encoder.backbone.layers:
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
        ):
            layer.get_submodule(name).register_forward_hook(note(name))
    encoder(ids, packed)
    tokens, texts = len(ids), len(packed.lengths)
    assert seen == {
        "self_attn.q_proj": [tokens, texts],
        "self_attn.k_proj": [tokens, tokens],
        "self_attn.v_proj": [tokens, tokens],
        "self_attn.o_proj": [tokens, texts],
        "mlp.gate_proj": [tokens, texts],
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_backward_pass_belongs_to_its_own_forward_pass(world, packed_batches, checkpointing):
    """After two forward passes in a row, recomputed layers use their own batch's rows."""
    encoder = load(world, gradient_checkpointing=checkpointing).train()
    apart = []
    for batch in packed_batches:
        encoder(*batch).square().sum().backward()
        apart.append(gradients(encoder))
    losses = [encoder(*batch).square().sum() for batch in packed_batches]
    for loss, expected in zip(losses, apart, strict=True):
        loss.backward()
        for name, grad in gradients(encoder).items():
            torch.testing.assert_close(grad, expected[name], rtol=0, atol=0, msg=name)


def test_threads_share_a_model(world, packed_batches):
    encoder = load(world).eval()
    with torch.no_grad(), ThreadPoolExecutor(2) as pool:
        expected = [encoder(*batch) for batch in packed_batches]
        for _ in range(20):
            found = pool.map(lambda batch: encoder(*batch), packed_batches * 4)
            for vectors, right in zip(found, expected * 4, strict=True):
                torch.testing.assert_close(vectors, right, rtol=1e-5, atol=1e-5)
