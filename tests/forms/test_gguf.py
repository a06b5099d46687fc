"""One file for llama.cpp: what it says and holds. `tests/clients/run.py` runs llama.cpp itself."""

import json

import numpy as np
import pytest
import torch
from helpers.scripts import load_script
from helpers.tiny_models import HIDDEN, MAX_SEQ_LENGTH, TEXTS, write_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from ml_embed.errors import UserError
from ml_embed.forms.gguf import export_gguf
from ml_embed.model_folders.export import export_model, open_part
from ml_embed.prepare.tokenizer import TextTokenizer, load_tokenizer
from ml_embed.prepare.tokenizer_training import train_tokenizer

gguf = pytest.importorskip("gguf")


def read(path):
    reader = gguf.GGUFReader(path)
    said = {name: field.contents() for name, field in reader.fields.items()}
    return said, {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize(
    ("model", "cut"),
    [
        ("checkpoint", {}),
        ("checkpoint", {"depth": 1, "rank": 16, "dim": 16}),
        ("whole", {"depth": 1, "dim": 16}),
    ],
)
def test_it_holds_the_weights_of_the_cut(request, tmp_path, capsys, model, cut):
    checkpoint = request.getfixturevalue(model)
    flags = [word for axis, size in cut.items() for word in (f"--{axis}", str(size))]
    arguments = ["--model", str(checkpoint), "--output", str(tmp_path / "g"), "--gguf", *flags]
    assert load_script("export_model").main(arguments) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    path = tmp_path / "g" / printed["file"]
    assert printed["bytes_of_weights"] == path.stat().st_size
    said, tensors = read(path)
    depth = cut.get("depth", 3)
    config = AutoConfig.from_pretrained(checkpoint)
    assert {name: value for name, value in said.items() if name.startswith("qwen3.")} == {
        "qwen3.block_count": depth,
        "qwen3.embedding_length": HIDDEN,
        "qwen3.context_length": MAX_SEQ_LENGTH,
        "qwen3.pooling_type": gguf.PoolingType.LAST,
        "qwen3.feed_forward_length": config.intermediate_size,
        "qwen3.attention.head_count": config.num_attention_heads,
        "qwen3.attention.head_count_kv": config.num_key_value_heads,
        "qwen3.attention.key_length": config.head_dim,
        "qwen3.attention.value_length": config.head_dim,
        "qwen3.attention.layer_norm_rms_epsilon": pytest.approx(config.rms_norm_eps),
        "qwen3.rope.freq_base": config.rope_parameters["rope_theta"],
    }
    assert said["general.architecture"] == "qwen3"
    # The folder that the same cut makes holds the same weights, and as many.
    export_model(checkpoint, tmp_path / "folder", **cut)
    expected = load_file(tmp_path / "folder" / "model.safetensors")
    assert len(tensors) == len(expected)
    for theirs, ours in {
        "token_embd.weight": "embed_tokens.weight",
        "output_norm.weight": "norm.weight",
        f"blk.{depth - 1}.attn_q.weight": f"layers.{depth - 1}.self_attn.q_proj.weight",
        f"blk.{depth - 1}.attn_k_norm.weight": f"layers.{depth - 1}.self_attn.k_norm.weight",
        f"blk.{depth - 1}.ffn_down.weight": f"layers.{depth - 1}.mlp.down_proj.weight",
    }.items():
        np.testing.assert_allclose(tensors[theirs].data, expected[ours].numpy(), atol=1e-6)
    card = (tmp_path / "g" / "README.md").read_text()
    whole = sum(tensor.numel() for tensor in expected.values())
    assert f"{whole:,} parameters" in card, "with the whole table"
    assert f"vectors of {HIDDEN} components" in card
    assert f"gives {HIDDEN}\ncomponents" in card
    assert ("take the first 16 and normalise again" in card) == bool(cut)


def test_it_says_the_tokenizer(checkpoint, tmp_path):
    export_gguf(open_part(checkpoint), tmp_path / "g")
    said, _ = read(tmp_path / "g/model.gguf")
    tokenizer = load_tokenizer(checkpoint)
    tokens, end = said["tokenizer.ggml.tokens"], TextTokenizer(tokenizer, 8).eos_id
    assert len(tokens) == 448
    assert all(tokens[number] == name for name, number in tokenizer.get_vocab().items())
    types = said["tokenizer.ggml.token_type"]
    assert (types[end], types[-1]) == (gguf.TokenType.CONTROL, gguf.TokenType.UNUSED)
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    assert said["tokenizer.ggml.eos_token_id"] == end
    assert said["tokenizer.ggml.padding_token_id"] == tokenizer.pad_token_id
    assert said["tokenizer.ggml.add_eos_token"]
    assert not said["tokenizer.ggml.add_bos_token"]


def test_halves(checkpoint, tmp_path):
    export_gguf(open_part(checkpoint), tmp_path / "g", torch.bfloat16)
    _, tensors = read(tmp_path / "g/model.gguf")
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_biases_are_refused(checkpoint, tmp_path):
    """llama.cpp's qwen3 reads none."""
    part = open_part(checkpoint)
    part.folder.config.attention_bias = True
    with pytest.raises(UserError, match="attention_bias"):
        export_gguf(part, tmp_path / "g")


def test_doubles_are_written_in_float32(checkpoint, tmp_path):
    part = open_part(checkpoint)
    part.folder.config.dtype = torch.float64
    export_gguf(part, tmp_path / "g")
    _, tensors = read(tmp_path / "g/model.gguf")
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert json.loads((tmp_path / "g/config.json").read_text())["dtype"] == "float32"


def test_another_split_into_pieces_is_refused(tmp_path):
    tokenizer = train_tokenizer(TEXTS * 3, 400)
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\s+"}
    folder = write_model(tmp_path / "model", tokenizer)
    (folder / "tokenizer.json").write_text(
        json.dumps(
            json.loads((folder / "tokenizer.json").read_text())
            | {"pre_tokenizer": description["pre_tokenizer"]}
        )
    )
    assert AutoTokenizer.from_pretrained(folder)
    with pytest.raises(UserError, match="does not cut texts into pieces as Qwen's"):
        export_gguf(open_part(folder), tmp_path / "g")
    assert not (tmp_path / "g").exists()
