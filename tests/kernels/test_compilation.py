"""compile_layers gives the same vectors and gradients, or says why it cannot work."""

import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from helpers.encoding import encode, random_loss
from transformers import AutoModel, Qwen3Config, Qwen3Model

from ml_embed.data.packing import PackedSequences
from ml_embed.errors import UserError
from ml_embed.kernels import compilation
from ml_embed.kernels.compilation import COMPILES_SINCE
from ml_embed.model import MatryoshkaEncoder

EXITS = (1, 2)


def test_compiled_layers_give_the_same_and_are_compiled_once(world, compiled_graphs):
    generator = torch.Generator().manual_seed(1)
    sequences = [
        torch.randint(0, 384, (length,), generator=generator) for length in (1, 3, 3, 3, 7, 12)
    ]
    plain, compiled = (
        MatryoshkaEncoder(AutoModel.from_pretrained(world.backbone), EXITS, compile_layers=choice)
        for choice in (False, True)
    )
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    # Other lengths must not mean another compilation.
    for batch in (sequences, sequences[1:], sequences[::-1]):
        with torch._dynamo.config.patch(error_on_recompile=batch is not sequences):
            left, right = encode(plain, batch), encode(compiled, batch)
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
            for encoder, vectors in ((plain, left), (compiled, right)):
                encoder.zero_grad()
                random_loss(vectors).backward()
    assert compiled_graphs
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert a.grad.abs().max() > 0, name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=2e-5)


@pytest.fixture
def counted(compiled_graphs, monkeypatch) -> list[torch.fx.GraphModule]:
    """The graphs that are made; differentiating them takes long, and is another test's."""
    graphs, compiled = [], torch.compile

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compiled(function, backend=count, **options)
    )
    return graphs


@pytest.mark.slow
def test_layers_that_are_checkpointed_are_compiled_too(world, counted):
    gradients = []
    for choice in (False, True):
        encoder = MatryoshkaEncoder(
            AutoModel.from_pretrained(world.backbone),
            EXITS,
            gradient_checkpointing=True,
            compile_layers=choice,
        ).train()
        random_loss(encode(encoder, [torch.arange(length) for length in (3, 7)])).backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    assert counted
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=2e-5)


def test_layers_are_compiled_once_for_any_number_of_texts(counted):
    """One class of layer is compiled once, not once per layer, and never for another batch."""
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    encoder = MatryoshkaEncoder(Qwen3Model(config), (1, 10), compile_layers=True)
    for texts in (6, 5, 7, 4, 8, 3, 9, 10, 2, 12, 1, 15, 11):
        lengths = [2 + text % 5 for text in range(texts)]
        with torch._dynamo.config.patch(error_on_recompile=texts != 6):
            encoder(torch.arange(sum(lengths)) % 64, PackedSequences.from_lengths(lengths))
    # before and after attention, and a piece between; the first layer may differ from the others
    assert 2 <= len(counted) <= 7


def test_an_older_transformers_is_refused(world, monkeypatch):
    monkeypatch.setattr(compilation.transformers, "__version__", "5.3.0")
    with pytest.raises(UserError, match=f"needs transformers {COMPILES_SINCE}"):
        MatryoshkaEncoder(AutoModel.from_pretrained(world.backbone), EXITS, compile_layers=True)


def test_a_machine_without_a_compiler_is_told_before_training(world, tmp_path, monkeypatch):
    """In a process of its own: torch reads CXX once."""
    monkeypatch.setenv("CXX", str(tmp_path / "no_compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = world.write_config(tmp_path / "config.json", "no_compiler", compile_layers=True)
    run = subprocess.run(
        [sys.executable, ROOT / "run.py", "--config", config], capture_output=True, text=True
    )
    assert run.returncode == 2, run.stderr
    assert "error: compile_layers: torch.compile does not work on this machine's cpu" in run.stderr
    assert str(tmp_path / "no_compiler") in run.stderr
    assert "set compile_layers to false" in run.stderr
    assert "Traceback" not in run.stderr
