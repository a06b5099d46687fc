"""Weights of another shape or type than the folder says are refused before memory is taken."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import reseal
from safetensors.torch import load_file, save_file

from ml_embed import Embedder
from ml_embed.errors import UserError
from ml_embed.files.digests import SEAL
from ml_embed.inference.text_models import load_text_model

FACTORS, NORMS = "nested/embedding_factors.safetensors", "nested/exit_norms.safetensors"


def refused(folder: Path, message: str) -> None:
    for read in (Embedder.from_pretrained, load_text_model):
        with pytest.raises(UserError, match=message):
            read(folder)


@pytest.mark.parametrize(
    ("file", "name", "tensor", "message"),
    [
        (FACTORS, "A", torch.ones(448), "tensor A is 448, .* must be 448 x 32"),
        (FACTORS, "A", torch.tensor(1.0), "tensor A is a single number"),
        (FACTORS, "A", torch.ones(448, 32, 1), "tensor A is 448 x 32 x 1"),
        (FACTORS, "A", torch.ones(448, 16), "tensor A is 448 x 16"),
        (FACTORS, "B", torch.ones(0, 64), "tensor B is 0 x 64, .* must be 32 x 64"),
        (FACTORS, "A", torch.ones(448, 32, dtype=torch.int64), "tensor A has the type I64"),
        (FACTORS, "B", torch.ones(32, 64, dtype=torch.complex64), "tensor B has the type C64"),
        (FACTORS, "B", torch.ones(32, 64).to(torch.float8_e4m3fn), "B has the type F8_E4M3"),
        (FACTORS, "B", None, "has no tensor B"),
        (NORMS, "1", torch.ones(3), "tensor 1 is 3, .* must be 64"),
        (NORMS, "3", torch.ones(64, 64), "tensor 3 is 64 x 64"),
        (NORMS, "3", torch.ones(64, dtype=torch.int32), "tensor 3 has the type I32"),
        (NORMS, "3", None, "no norm of exit 3"),
        (NORMS, "-5", torch.ones(64), "a tensor '-5'"),
        ("model.safetensors", "layers.0.mlp.up_proj.weight", torch.ones(64), "up_proj.weight is"),
    ],
)
def test_tensors_that_do_not_fit(folder, file, name, tensor, message):
    tensors = load_file(folder / file) | {name: tensor}
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / file, {"format": "pt"})
    reseal(folder)
    refused(folder, message)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 10**12}, "embed_tokens.weight is 448 x 64, .* 1,000,000,000,000 x 64"),
        ({"hidden_size": 10**6}, "x 1,000,000"),
        ({"intermediate_size": 10**9}, "64 x 1,000,000,000"),
        ({"head_dim": 10**9}, "k_proj.weight is 32 x 64, .* 2,000,000,000 x 64"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers 1000000000000 is more than 10,000"),
        ({"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}, "lack all after 3"),
    ],
)
def test_sizes_that_the_weights_do_not_have(folder, settings, message, trained):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    if trained:
        reseal(folder)
    else:  # a plain backbone, whose modules are not ours to read
        shutil.rmtree(folder / "nested")
        for name in ("ml_embed.json", "modules.json"):
            (folder / name).unlink()
    refused(folder, message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"exits": []}, "exits and dims must not be empty"),
        ({"ema_decay": False}, "ema_decay must be a number from 0 to below 1, not False"),
        ({"exits": [3, 1]}, "exits must be whole numbers in order"),
        ({"exits": "all"}, "exits must be whole numbers"),
        ({"dims": [8, 64]}, "dims must be whole numbers in order"),
        ({"ranks": [True]}, "ranks must be whole numbers"),
        ({"max_seq_length": "long"}, "max_seq_length must be"),
        ({"norm_sharing": "none"}, "norm_sharing 'none'"),
        ({"pooling": "mean"}, "pooling 'mean'"),
        ({"digests": {"model.safetensors": 5}}, "must be texts"),
        ({"origin": {"datasets": ["facts", {}]}}, "must be texts"),
        ({"format_version": {}}, "format version"),
    ],
)
def test_records_that_no_training_writes(folder, values, message):
    path = folder / "ml_embed.json"
    record = json.loads(path.read_text()) | values
    del record[SEAL]  # as who edits it on purpose does
    path.write_text(json.dumps(record))
    refused(folder, message)
