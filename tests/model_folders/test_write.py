"""What a model folder holds, field by field, for each program that reads it."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.tiny_models import (
    HIDDEN,
    MAX_SEQ_LENGTH,
    PROMPTS,
    SPOKEN,
    TEXTS,
    assert_equal_vectors,
    make_tokenizer,
    random_backbone,
    write_model,
)
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, Qwen3Config, Qwen3Model

from ml_embed import Embedder
from ml_embed.errors import UserError
from ml_embed.model import MatryoshkaEncoder
from ml_embed.model_folders.backbone import init_backbone
from ml_embed.model_folders.card import Form, write_card
from ml_embed.model_folders.export import export_model
from ml_embed.model_folders.modules import POOLING_MODES
from ml_embed.model_folders.record import ModelRecord, Origin, TrainedOn
from ml_embed.model_folders.write import save_config, save_model_folder, save_tokenizer

YARN = {"original_max_position_embeddings": 64}
FORMER_CLIENT = ("transformers==4.57.6", "sentence-transformers==5.1.2", "datasets==4.4.0")
ENCODE = """
import sys
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
texts = open(sys.argv[2], encoding="utf-8").read().split("\\0")
np.save(sys.argv[3], model.encode(texts, prompt_name="query", batch_size=4))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(
        tmp_path_factory.mktemp("model") / "per_layer", make_tokenizer(), "per_layer"
    )


def write_plain(folder: Path, rope: dict | None = None, **known) -> None:
    """A model with a whole table and one exit."""
    tokenizer = make_tokenizer()
    backbone = random_backbone(tokenizer, rope)
    config = backbone.config
    encoder = MatryoshkaEncoder(backbone, (3,))
    record = ModelRecord((3,), (64,), (), 0.05, MAX_SEQ_LENGTH, prompts=PROMPTS, **known)
    save_model_folder(folder, encoder.state_dict(), config, tokenizer, record)


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_only_what_servers_know_lies_at_the_top(folder):
    assert {path.name for path in folder.glob("*.safetensors")} == {"model.safetensors"}
    assert {path.name for path in (folder / "nested").iterdir()} == {
        "embedding_factors.safetensors",
        "exit_norms.safetensors",
    }
    shapes = {
        n: t.shape for n, t in load_file(folder / "nested/embedding_factors.safetensors").items()
    }
    assert shapes == {"A": (448, 32), "B": (32, HIDDEN)}
    assert set(load_file(folder / "nested/exit_norms.safetensors")) == {"1", "3"}


def test_the_record_names_the_digest_of_each_weights_file(folder):
    import xxhash

    record = read(folder / "ml_embed.json")
    assert record["format_version"] == 2
    weights = {str(path.relative_to(folder)): path for path in folder.rglob("*.safetensors")}
    assert len(weights) == 3
    for name, path in weights.items():
        assert record["digests"][name] == xxhash.xxh3_128(path.read_bytes()).hexdigest()


def test_config_says_positions_as_transformers_4_and_servers_look_for_them(folder, tmp_path):
    config = read(folder / "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000
    assert config["rope_scaling"] is None
    yarn = {"rope_type": "yarn", "factor": 4.0, **YARN}
    save_config(tmp_path, Qwen3Config(rope_parameters={"rope_theta": 5e5, **yarn}))
    config = read(tmp_path / "config.json")
    assert (config["rope_theta"], config["rope_scaling"]) == (5e5, yarn)
    again = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert {key: again[key] for key in ("rope_theta", *yarn)} == {"rope_theta": 5e5, **yarn}


def test_backbones_say_positions_too(tmp_path):
    init_backbone("tiny", make_tokenizer(), tmp_path / "new")
    assert read(tmp_path / "new/config.json")["rope_theta"] == 1_000_000
    assert (
        read(tmp_path / "new/tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    )


def test_the_tokenizer_is_one_that_transformers_4_and_5_read(folder, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>", "<more>"]})
    tokenizer.chat_template = "{{ messages }}"
    save_tokenizer(tmp_path, tokenizer)
    settings = read(tmp_path / "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["padding_side"] == "left"
    assert settings["additional_special_tokens"] == ["<extra>", "<more>"]
    assert not {"extra_special_tokens", "backend", "is_local", "local_files_only"} & set(settings)
    assert not (tmp_path / "chat_template.jinja").exists()
    assert "chat_template" not in settings
    assert tokenizer.chat_template is not None, "the caller's is not touched"
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert {"<extra>", "<more>"} <= set(again.all_special_tokens)
    assert again("a <more>").input_ids == tokenizer("a <more>").input_ids


def test_all_pooling_modes_are_named(folder):
    pooling = read(folder / "1_Pooling/config.json")
    assert {key: pooling[key] for key in POOLING_MODES} == {
        "pooling_mode_cls_token": False,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": True,
    }


def test_padded_batches_are_right_at_the_last_position(folder):
    """transformers.js and many scripts read position -1."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen3Model.from_pretrained(folder)
    batch = tokenizer(SPOKEN, padding=True, truncation=True, return_tensors="pt")
    assert batch.attention_mask[:, 0].min() == 0, "nothing is padded"
    with torch.no_grad():
        rows = model(**batch).last_hidden_state[:, -1]
    vectors = torch.nn.functional.normalize(rows, dim=-1).numpy()
    assert_equal_vectors(vectors, Embedder.from_pretrained(folder, device="cpu").encode(SPOKEN))


def test_the_model_card(folder, tmp_path):
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == (
        "sentence-transformers",
        "sentence-similarity",
    )
    assert {"ml-embed", "matryoshka"} <= set(card.data.tags)
    assert card.data.base_model is None
    for part in (
        "| vector length | 8, 16, 32, 64 |",
        "| layers | 1, 3 |",
        "| rank of the token table | 16, 32 |",
        "normalise again after truncating",
        repr(PROMPTS["query"]),
    ):
        assert part in card.text, part
    form = Form("onnx", "in {x} and }", 7, 64)  # names of languages are the user's
    write_card(tmp_path, ModelRecord.load(folder), form)
    assert form.use in (tmp_path / "README.md").read_text()
    origin = Origin("ada/base", "apache-2.0", languages=("de", "sw"))
    trained_on = TrainedOn("facts"), TrainedOn("ada/questions"), TrainedOn("x", "./x")
    origin = dataclasses.replace(origin, trained_on=trained_on)
    write_plain(tmp_path / "known", origin=origin)
    export_model(tmp_path / "known", tmp_path / "cut", dim=64)
    data = ModelCard.load(tmp_path / "cut" / "README.md").data
    assert (data.base_model, data.license, data.language) == (
        "ada/base",
        "apache-2.0",
        ["de", "sw"],
    )
    assert data.datasets == ["ada/questions"]
    card = (tmp_path / "cut/README.md").read_text()
    assert "| facts | not known | not known | not known | not known |" in card


def as_format_1(folder: Path, new: Path) -> Path:
    """The folder as it was written before `nested/` and digests."""
    shutil.copytree(folder, new)
    for path in (new / "nested").iterdir():
        path.rename(new / path.name)
    (new / "nested").rmdir()
    record = read(new / "ml_embed.json")
    for name in ("digest", "digests", "origin", "default_prompt_name"):
        del record[name]
    (new / "ml_embed.json").write_text(json.dumps(record | {"format_version": 1}))
    return new


@pytest.mark.parametrize("cut", [{}, {"depth": 1, "dim": 16, "rank": 16}])
def test_folders_of_format_1_are_still_read(folder, tmp_path, cut):
    former = as_format_1(folder, tmp_path / "former")
    expected = Embedder.from_pretrained(folder, device="cpu", **cut)
    model = Embedder.from_pretrained(former, device="cpu", **cut)
    np.testing.assert_array_equal(model.encode(TEXTS), expected.encode(TEXTS))
    assert (model.prompts, model.max_seq_length) == (PROMPTS, MAX_SEQ_LENGTH)
    export_model(former, tmp_path / "new", **cut)
    assert read(tmp_path / "new" / "ml_embed.json")["format_version"] == 2
    assert not (tmp_path / "new" / "embedding_factors.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folders_of_format_1_whose_weights_were_saved_over(folder, tmp_path, dtype):
    export_model(folder, tmp_path / "new", dtype=dtype)
    former = as_format_1(tmp_path / "new", tmp_path / "former")
    Embedder.from_pretrained(former, device="cpu")
    weights = load_file(former / "model.safetensors")
    weights["embed_tokens.weight"] += 0.05
    save_file(weights, former / "model.safetensors", {"format": "pt"})
    said = (
        r"model\.safetensors .*changed after .* remove embedding_factors\.safetensors, exit_norms"
    )
    with pytest.raises(UserError, match=said):
        Embedder.from_pretrained(former, device="cpu")


def former_python(folder: Path) -> str:
    """An interpreter with transformers 4: the one that is named, or one made here."""
    if named := os.environ.get("ML_EMBED_TRANSFORMERS4_PYTHON"):
        return named
    python = folder / "bin" / "python"
    venv.create(folder, with_pip=True)
    (own,) = folder.glob("lib/python*/site-packages")
    # torch and the rest are taken from the environment of this test.
    (own / "rest.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    command = [python, "-m", "pip", "install", "--quiet", *FORMER_CLIENT]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(
            f"an environment with {' and '.join(FORMER_CLIENT)} cannot be made here "
            f"({done.stderr.strip().splitlines()[-1]}); name its interpreter in "
            "ML_EMBED_TRANSFORMERS4_PYTHON"
        )
    return str(python)


@pytest.mark.slow
def test_transformers_4_gives_the_same_vectors(folder, tmp_path):
    """transformers 4.57 and sentence-transformers 5.1, in an environment of their own."""
    assert transformers.__version__.startswith("5"), "both would be the same"
    python = former_python(tmp_path / "environment")
    theta, yarn = tmp_path / "theta", tmp_path / "yarn"
    write_plain(theta, {"rope_type": "default", "rope_theta": 1e6})
    write_plain(yarn, {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0, **YARN})
    export_model(folder, tmp_path / "cut", depth=1, dim=16, rank=16)
    (tmp_path / "texts").write_text("\0".join(SPOKEN), encoding="utf-8")
    for model in (folder, tmp_path / "cut", theta, yarn):
        command = [python, "-c", ENCODE, model, tmp_path / "texts", tmp_path / "vectors.npy"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        expected = Embedder.from_pretrained(model, device="cpu").encode(SPOKEN, prompt_name="query")
        np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), expected, atol=2e-6)


def test_sentence_transformers_of_this_environment_agrees(folder):
    if importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("sentence-transformers is not installed")
    from sentence_transformers import SentenceTransformer

    other = SentenceTransformer(str(folder), device="cpu")
    expected = Embedder.from_pretrained(folder, device="cpu").encode(SPOKEN)
    np.testing.assert_allclose(other.encode(SPOKEN, batch_size=4), expected, atol=2e-6)
