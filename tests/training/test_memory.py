"""A low rank of the token factors saves memory in training too."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file, save_file

from ml_embed.config import parse_config
from ml_embed.errors import UserError
from ml_embed.model_folders.read import load_backbone, load_backbone_config, map_table
from ml_embed.training.build import build_encoder
from ml_embed.training.inputs import open_inputs

CHILD = """
import sys
from pathlib import Path
import run
assert run.main(sys.argv[1:]) == 0
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print("peak", int(status["VmHWM"].split()[0]) // 1024)
"""
VOCABULARY, HIDDEN = 151_936, 512


@pytest.fixture
def prefixed(world, tmp_path):
    """The world's backbone, its tensors named and stored as a causal language model's are."""
    folder = tmp_path / "prefixed"
    folder.mkdir()
    for path in world.backbone.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "model.safetensors").unlink()
    tensors = load_file(world.backbone / "model.safetensors")
    renamed = {f"model.{name}": tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_backbone_without_its_table_has_the_same_layers(prefixed):
    config = load_backbone_config(prefixed)
    whole, layers = (load_backbone(prefixed, config, with_table=kept) for kept in (True, False))
    assert layers.embed_tokens is None
    state, expected = layers.state_dict(), whole.state_dict()
    assert torch.equal(map_table(prefixed, config).float(), expected.pop("embed_tokens.weight"))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_factors_of_a_table_in_bfloat16_are_float32(world, prefixed):
    config = parse_config(world.config(model_path=str(prefixed)))
    inputs = open_inputs(config, 1, progress=False)
    encoder = build_encoder(config, inputs, torch.device("cpu"), torch.float32)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    table = map_table(prefixed, inputs.backbone_config).double()
    product = (encoder.embedding.A @ encoder.embedding.B).detach().double()
    best = torch.linalg.svdvals(table)[32:].norm()
    torch.testing.assert_close((table - product).norm(), best, rtol=1e-5, atol=0)


def test_a_table_of_another_size_is_refused(prefixed):
    config = load_backbone_config(prefixed)
    config.vocab_size += 1
    with pytest.raises(UserError, match=r"table is 384 x 64, config\.json says 385 x 64"):
        map_table(prefixed, config)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_rank_64_needs_at_most_six_tenths_of_the_whole_tables_memory(world, tmp_path):
    """The highest resident memory of a run that also saves, measured."""
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    for path in world.backbone.iterdir():
        (backbone / path.name).symlink_to(path)
    config = json.loads((world.backbone / "config.json").read_text())
    for name in ("config.json", "model.safetensors"):
        (backbone / name).unlink()
    config |= {"vocab_size": VOCABULARY, "hidden_size": HIDDEN}
    (backbone / "config.json").write_text(json.dumps(config))
    write_weights(backbone)
    peaks = {}
    for rank in (0, 64):
        nested = {"r": rank, "use_mel": rank > 0, "mel_ranks": None, "train_steps": 2}
        path = world.write_config(
            tmp_path / f"{rank}.json",
            f"rank_{rank}",
            model_path=str(backbone),
            output_dir=str(tmp_path / "runs"),
            **nested,
        )
        run = subprocess.run(
            [sys.executable, "-c", CHILD, "--config", path],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        peaks[rank] = int(run.stdout.split()[-1])
    assert peaks[64] <= 0.6 * peaks[0], peaks


def write_weights(backbone) -> None:
    from transformers import AutoConfig, Qwen3Model

    Qwen3Model(AutoConfig.from_pretrained(backbone)).save_pretrained(backbone)
