"""Inference against transformers and sentence-transformers, on tiny random models."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers.tiny_models import (
    HIDDEN,
    LAYERS,
    MAX_SEQ_LENGTH,
    RANK,
    SPOKEN,
    TEXTS,
    assert_equal_vectors,
    make_tokenizer,
    naive,
    random_backbone,
    reseal,
    write_model,
)
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from ml_embed.errors import UserError
from ml_embed.inference import embedder
from ml_embed.inference.embedder import Embedder
from ml_embed.inference.text_models import load_text_model
from ml_embed.inference.vector_file import encode_into_file
from ml_embed.model_folders.read import ModelFolder, load_encoder


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tokenizer):
    return write_model(tmp_path_factory.mktemp("model") / "shared", tokenizer)


@pytest.fixture(scope="module")
def per_layer(tmp_path_factory, tokenizer):
    return write_model(tmp_path_factory.mktemp("model") / "per_layer", tokenizer, "per_layer")


@pytest.mark.parametrize(
    "cut", [{}, {"depth": 1, "dim": 16, "rank": 16}, {"depth": 1, "rank": 32}, {"dim": 8}]
)
@pytest.mark.parametrize("sharing", ["shared", "per_layer"])
def test_vectors_are_those_of_transformers(sharing, cut, request):
    folder = request.getfixturevalue(sharing)
    model = Embedder.from_pretrained(folder, **cut, device="cpu")
    vectors = model.encode(TEXTS, batch_tokens=70)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), cut.get("dim", HIDDEN)) == (len(TEXTS), model.dim)
    assert_equal_vectors(vectors, naive(folder, TEXTS, **cut))
    assert_equal_vectors(np.linalg.norm(vectors, axis=1), np.ones(len(TEXTS)))
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01


def test_vectors_are_those_of_sentence_transformers(shared):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    other = sentence_transformers.SentenceTransformer(str(shared), device="cpu")
    model = Embedder.from_pretrained(shared, device="cpu")
    assert_equal_vectors(model.encode(TEXTS), other.encode(TEXTS))
    queries = model.encode(SPOKEN, prompt_name="query")
    assert_equal_vectors(queries, other.encode(SPOKEN, prompt_name="query"))
    assert np.abs(queries - model.encode(SPOKEN)).max() > 0.01


def test_a_cut_model_holds_less(shared):
    whole, cut = (
        Embedder.from_pretrained(shared),
        Embedder.from_pretrained(shared, depth=1, rank=16),
    )
    assert (whole.depth, whole.dim, whole.rank, whole.max_seq_length) == (
        LAYERS,
        HIDDEN,
        RANK,
        MAX_SEQ_LENGTH,
    )
    assert (cut.depth, cut.dim, cut.rank) == (1, HIDDEN, 16)
    layer = sum(p.numel() for p in whole._encoder.backbone.layers[0].parameters())
    assert whole.num_parameters == 3 * layer + (448 + HIDDEN) * RANK + HIDDEN
    assert cut.num_parameters == layer + (448 + HIDDEN) * 16 + HIDDEN
    for model in (whole, cut):
        assert model.num_parameters == held_parameters(model)


def held_parameters(model: Embedder) -> int:
    return sum(parameter.numel() for parameter in model._encoder.parameters())


def test_order_batches_and_windows_do_not_matter(shared, monkeypatch):
    model = Embedder.from_pretrained(shared, device="cpu")
    expected = model.encode(TEXTS)
    order = [5, 2, 7, 0, 3, 1, 6, 4]
    assert_equal_vectors(model.encode([TEXTS[i] for i in order], batch_tokens=1), expected[order])
    monkeypatch.setattr(embedder, "WINDOW", 3)
    assert_equal_vectors(model.encode((text for text in TEXTS), show_progress=True), expected)


def test_generators_are_not_read_far_ahead(shared, monkeypatch):
    monkeypatch.setattr(embedder, "WINDOW", 4)
    model = Embedder.from_pretrained(shared, device="cpu")
    read = []
    texts = (read.append(i) or "text" for i in range(1000))
    stream = model._stream(texts, "", embedder._Settings(), False, None)
    assert len(next(stream)) == 4
    assert len(read) <= 8
    stream.close()


def test_truncation_keeps_the_end_token(shared):
    model = Embedder.from_pretrained(shared, device="cpu")
    long = "right " * 500
    assert_equal_vectors(model.encode([long]), naive(shared, [long]))
    assert_equal_vectors(model.encode([long]), model.encode([long + "unread"]))


def test_one_string_and_no_string(shared):
    model = Embedder.from_pretrained(shared, dim=16, device="cpu")
    assert model.encode("a").shape == (16,)
    assert_equal_vectors(model.encode("a"), model.encode(["a"])[0])
    for nothing in ([], iter(())):
        vectors = model.encode(nothing)
        assert vectors.shape == (0, 16)
        assert vectors.dtype == np.float32


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", None], "text 1 .*NoneType"),
        ([b"a"], "text 0 .*bytes"),
        (["a", "b", "\ud800"], "text 2 .*surrogate"),
    ],
)
def test_what_is_no_text_is_named_by_its_place(shared, texts, message):
    with pytest.raises(UserError, match=message):
        Embedder.from_pretrained(shared, device="cpu").encode(texts)


@pytest.mark.parametrize(
    ("given", "kind"), [(None, "NoneType"), (5, "int"), (b"abc", "bytes"), (bytearray(2), "byte")]
)
def test_what_is_neither_a_string_nor_several_is_named_by_its_type(shared, given, kind):
    model = Embedder.from_pretrained(shared, device="cpu")
    with pytest.raises(UserError, match=f"texts is of type {kind}"):
        model.encode(given)
    if given is not None:  # computes here
        with pytest.raises(UserError, match=f"devices is of type {kind}"):
            model.encode(["a"], devices=given)


def test_unknown_prompt_lists_the_known(shared):
    with pytest.raises(UserError, match=r"'passage' .*'query'"):
        Embedder.from_pretrained(shared, device="cpu").encode(["a"], prompt_name="passage")


def test_untrained_cuts_are_refused_with_the_trained_ones(shared):
    with pytest.raises(UserError) as error:
        Embedder.from_pretrained(shared, depth=2, dim=24, rank=8, device="cpu")
    for part in (
        "depth 2 was not trained (trained: 1, 3)",
        "trained: 8, 16, 32, 64",
        "rank 8 was not",
    ):
        assert part in str(error.value)
    with pytest.raises(UserError, match=r"depth 4 is not possible.*1 to 3"):
        Embedder.from_pretrained(shared, depth=4, allow_untrained=True)


def test_cuts_may_be_numbers_of_numpy_but_must_be_whole(shared):
    model = Embedder.from_pretrained(
        shared, depth=np.int64(1), dim=np.int32(16), rank=np.uint8(16), device="cpu"
    )
    cut = (model.depth, model.dim, model.rank)
    assert cut == (1, 16, 16)
    assert json.loads(json.dumps(cut)) == [1, 16, 16], "plain ints"
    assert_equal_vectors(model.encode(TEXTS), naive(shared, TEXTS, 1, 16, 16))
    for axis, value in (("depth", 1.0), ("dim", np.float32(16)), ("rank", "16")):
        with pytest.raises(UserError, match=f"{axis} .*must be a whole number"):
            Embedder.from_pretrained(shared, **{axis: value})


@pytest.mark.parametrize("sharing", ["shared", "per_layer"])
def test_untrained_cuts_can_be_allowed(sharing, request):
    folder = request.getfixturevalue(sharing)
    model = Embedder.from_pretrained(
        folder, depth=2, dim=24, rank=8, device="cpu", allow_untrained=True
    )
    vectors = model.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), 24)
    if sharing == "shared":
        assert_equal_vectors(vectors, naive(folder, TEXTS, 2, 24, 8))


def test_the_multiplied_out_table_is_not_read(shared, tmp_path):
    folder = shutil.copytree(shared, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors")
    reseal(folder)
    assert_equal_vectors(Embedder.from_pretrained(folder).encode(TEXTS), naive(shared, TEXTS))


def test_sharded_folders(shared, tmp_path):
    folder = shutil.copytree(shared, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {
        name: f"model-0000{i % 3 + 1}-of-00003.safetensors"
        for i, name in enumerate(sorted(weights))
    }
    for file in set(weight_map.values()):
        save_file(
            {n: t for n, t in weights.items() if weight_map[n] == file},
            folder / file,
            {"format": "pt"},
        )
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    reseal(folder)
    assert_equal_vectors(Embedder.from_pretrained(folder).encode(TEXTS), naive(shared, TEXTS))
    assert load_encoder(ModelFolder.open(folder), depth=1).exits == (1,)
    (folder / weight_map["norm.weight"]).unlink()
    with pytest.raises(UserError, match=rf"lacks {weight_map['norm.weight']}"):
        Embedder.from_pretrained(folder)


def test_plain_backbones(tokenizer, tmp_path):
    causal = Qwen3ForCausalLM(random_backbone(tokenizer).config)
    causal.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = Embedder.from_pretrained(tmp_path, device="cpu")
    ids = tokenizer("Everyone has the right", return_tensors="pt").input_ids
    ids = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], dim=1)
    with torch.no_grad():
        row = causal.model(ids).last_hidden_state[0, -1]
    assert_equal_vectors(model.encode("Everyone has the right"), (row / row.norm()).numpy())
    with pytest.raises(UserError, match="whole token table"):
        Embedder.from_pretrained(tmp_path, rank=16)
    with pytest.raises(UserError, match="depth 1 was not trained"):
        Embedder.from_pretrained(tmp_path, depth=1)


def test_whole_tables_can_be_cut_in_depth(tokenizer, tmp_path):
    folder = write_model(tmp_path / "plain_table", tokenizer, factorized=False)
    model = Embedder.from_pretrained(folder, depth=1, dim=32, device="cpu")
    assert model.rank == 0
    assert model.num_parameters == held_parameters(model)
    assert_equal_vectors(model.encode(TEXTS), naive(folder, TEXTS, 1, 32))


class Exploit:
    """Unpickling this writes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("keep_record", [True, False])
def test_pickled_weights_are_not_run(shared, tmp_path, keep_record):
    folder = shutil.copytree(shared, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    if not keep_record:
        (folder / "ml_embed.json").unlink()
    planted = tmp_path / "planted"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Exploit(planted)))
    with pytest.raises(
        UserError, match=r"lacks model\.safetensors" if keep_record else "be loaded"
    ):
        Embedder.from_pretrained(folder)
    assert not planted.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert planted.exists(), "the planted file does nothing, so this test says nothing"


def test_no_folder_and_no_device(shared, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Embedder.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="device 'toaster'"):
        Embedder.from_pretrained(shared, device="toaster")


def test_the_home_folder_and_a_run_in_place_of_a_model(shared, tmp_path, monkeypatch):
    run = tmp_path / "run"
    for step in (9, 10):
        shutil.copytree(shared, run / f"step_{step}")
    (run / "config.json").write_text(json.dumps({"model_path": "models/x"}))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_equal_vectors(
        Embedder.from_pretrained("~/run/step_9").encode(TEXTS), naive(shared, TEXTS)
    )
    for load in (Embedder.from_pretrained, load_text_model):
        with pytest.raises(
            UserError, match=r"^~/run is a run folder.* the newest is .*/run/step_10$"
        ):
            load("~/run")
    with pytest.raises(UserError, match="nowhere does not exist"):
        Embedder.from_pretrained("~/nowhere")
    with pytest.raises(UserError, match=r"config\.json is a file"):
        Embedder.from_pretrained(run / "config.json")


@pytest.mark.parametrize("factorized", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, "num_hidden_layers"),
        ({"hidden_size": "64"}, "hidden_size.*'64'"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 must be a whole number of at least 1"),
        ({"intermediate_size": 95}, r"weights in .* cannot be loaded"),
        ({"hidden_act": "tanhh"}, "cannot be loaded: 'tanhh'"),
        ({"dtype": "float31"}, "float31"),
        (None, r"config\.json is damaged \(it must hold an object\)"),
    ],
)
def test_configs_edited_by_hand(tokenizer, tmp_path, factorized, changes, message):
    folder = write_model(tmp_path / "model", tokenizer, factorized=factorized)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes if changes else changes))
    with pytest.raises(UserError, match=message):
        Embedder.from_pretrained(folder, device="cpu")


def test_encode_to_file(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(embedder, "WINDOW", 3)
    model = Embedder.from_pretrained(shared, dim=16, device="cpu")
    path = tmp_path / "vectors" / "all.npy"
    assert model.encode_to_file((text for text in TEXTS), path) == len(TEXTS)
    assert_equal_vectors(np.load(path, mmap_mode="r"), model.encode(TEXTS))
    with pytest.raises(UserError, match="exists already"):
        model.encode_to_file(["a"], path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="text 4"):
        model.encode_to_file(["a", "b", "c", "d", 5], path, overwrite=True)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["all.npy"]
    assert model.encode_to_file([], path, overwrite=True) == 0
    assert np.load(path).shape == (0, 16)


def test_encode_to_file_looks_at_its_place_before_the_work(shared, tmp_path, monkeypatch):
    model = Embedder.from_pretrained(shared, dim=16, device="cpu")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model.encode_to_file(["a"], "~/vectors.npy") == 1
    assert np.load(tmp_path / "vectors.npy").shape == (1, 16)
    (tmp_path / "folder.npy").mkdir()

    def unread():
        pytest.fail("the texts were read")
        yield "a"

    for path, message in (
        (tmp_path / "folder.npy", "folder.npy is a folder"),
        (tmp_path / "vectors.npy" / "more.npy", r"vectors\.npy is a file; give a folder"),
        ("~/vectors.npy/in/more.npy", r"vectors\.npy is a file; give a folder"),
    ):
        with pytest.raises(UserError, match=message):
            model.encode_to_file(unread(), path, overwrite=True)
    with pytest.raises(UserError, match="is a folder, which is not replaced"):
        model.encode_to_file(unread(), tmp_path / "folder.npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.npy", "vectors.npy"]


def test_another_process_gives_the_same_vectors(shared, monkeypatch):
    monkeypatch.setattr(embedder, "WORKER_WINDOW", 3)
    model = Embedder.from_pretrained(shared, depth=1, dim=16, rank=16, device="cpu")
    expected = model.encode(TEXTS, prompt_name="query", batch_size=2)
    elsewhere = model.encode(iter(TEXTS), prompt_name="query", batch_size=2, devices="cpu")
    assert_equal_vectors(elsewhere, expected)


def test_a_file_of_vectors_is_whole_where_its_work_folder_cannot_be_removed(tmp_path, monkeypatch):
    """NFS keeps a file that is open, such as the lock, under another name in its folder."""
    monkeypatch.setattr(os, "rmdir", Mock(side_effect=OSError(errno.ENOTEMPTY, "not empty")))
    path = tmp_path / "vectors.npy"
    texts, vectors = ["a", "b"], np.ones((2, 3), np.float32)
    encode_into_file(path, lambda: texts, lambda _: vectors, 3, "texts", progress=False)
    np.testing.assert_array_equal(np.load(path), vectors)
