"""Embedder's methods mean what those of sentence-transformers' SentenceTransformer mean."""

import copy
import json
import pickle
import types

import numpy as np
import pytest
import torch
from helpers.tiny_models import (
    HIDDEN,
    PROMPTS,
    SPOKEN,
    TEXTS,
    assert_equal_vectors,
    make_tokenizer,
    write_model,
)

from ml_embed import Embedder
from ml_embed.errors import UserError

QUERY = PROMPTS["query"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model", make_tokenizer())


@pytest.fixture(scope="module")
def model(folder):
    return Embedder.from_pretrained(folder, device="cpu")


@pytest.fixture
def theirs(folder):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


def with_prompts(folder, new, **settings):
    """A copy whose file for sentence-transformers says other prompts."""
    import shutil

    shutil.copytree(folder, new)
    path = new / "config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return new


@pytest.mark.parametrize(
    "settings",
    [
        {"prompts": {"query": "q: ", "document": "d: "}},
        {"prompts": {"passage": "p: "}},
        {"prompts": {"query": "q: ", "other": "o: "}, "default_prompt_name": "other"},
        {"prompts": {"other": "o: "}, "default_prompt_name": "other"},
        {"prompts": {}},
    ],
)
def test_prompts_are_chosen_as_there(folder, tmp_path, settings):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    copied = with_prompts(folder, tmp_path / "copy", **settings)
    model = Embedder.from_pretrained(copied, device="cpu")
    other = sentence_transformers.SentenceTransformer(str(copied), device="cpu")
    for method in ("encode", "encode_query", "encode_document"):
        mine, their = getattr(model, method), getattr(other, method)
        assert_equal_vectors(mine(SPOKEN), their(SPOKEN))
        assert_equal_vectors(mine(SPOKEN, prompt="own: "), their(SPOKEN, prompt="own: "))
        for name in settings["prompts"]:
            assert_equal_vectors(mine(SPOKEN, name), their(SPOKEN, name))
    assert model.default_prompt_name == settings.get("default_prompt_name")


def test_a_prompt_is_the_text(model, caplog):
    expected = model.encode([QUERY + text for text in SPOKEN])
    assert_equal_vectors(model.encode(SPOKEN, prompt=QUERY), expected)
    assert_equal_vectors(model.encode(SPOKEN, prompt_name="query"), expected)
    assert_equal_vectors(model.encode_query(SPOKEN), expected)
    assert not caplog.records
    assert_equal_vectors(model.encode(SPOKEN, prompt="query"), expected)
    assert "prompt 'query' is the name of a saved prompt" in caplog.text
    assert_equal_vectors(model.encode(SPOKEN, "query", prompt=""), model.encode(SPOKEN))
    assert "prompt_name 'query' is ignored" in caplog.text


def test_one_string_gives_one_vector(model, theirs):
    for options in ({}, {"convert_to_tensor": True}, {"precision": "binary"}):
        mine, their = model.encode("a text", **options), theirs.encode("a text", **options)
        assert (type(mine), mine.shape, mine.dtype) == (type(their), their.shape, their.dtype)
        np.testing.assert_allclose(mine, their, atol=2e-5)


def test_tensors(model, theirs):
    mine, their = (m.encode(SPOKEN, convert_to_tensor=True) for m in (model, theirs))
    assert isinstance(mine, torch.Tensor)
    assert (mine.shape, mine.dtype, mine.device) == (their.shape, their.dtype, model.device)
    assert_equal_vectors(mine.numpy(), their.numpy())


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_precisions(model, precision):
    quantization = pytest.importorskip("sentence_transformers.util.quantization")
    vectors = model.encode(TEXTS)
    expected = quantization.quantize_embeddings(vectors, precision)
    found = model.encode(TEXTS, precision=precision)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    assert model.encode([], precision=precision).dtype == expected.dtype


def test_precisions_that_are_not_possible(model):
    with pytest.raises(UserError, match="'int4' is not known; take one of float32, int8"):
        model.encode(["a"], precision="int4")
    with pytest.raises(UserError, match="needs several vectors"):
        model.encode("a", precision="int8")


def test_batch_size(model, monkeypatch):
    expected = model.encode(TEXTS)
    sizes = []
    forward = model._encoder.forward

    def spy(ids, packed, rank=None):
        sizes.append(len(packed.last_tokens))
        return forward(ids, packed, rank)

    monkeypatch.setattr(model._encoder, "forward", spy)
    assert_equal_vectors(model.encode(TEXTS, batch_size=3), expected)
    assert sizes == [3, 3, 2]
    with pytest.raises(UserError, match="batch_size is 0"):
        model.encode(TEXTS, batch_size=0)


def test_similarity(model, theirs):
    left, right = model.encode(SPOKEN[:3]), model.encode(SPOKEN[1:6])
    found = model.similarity(left, right)
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found, theirs.similarity(left, right))
    torch.testing.assert_close(model.similarity(3 * left[0], torch.tensor(right)), found[:1])
    torch.testing.assert_close(
        model.similarity_pairwise(left, right[:3]), theirs.similarity_pairwise(left, right[:3])
    )


@pytest.mark.parametrize("cut", [{}, {"depth": 1, "dim": 16, "rank": 16}, {"dim": 24}])
def test_pickled_and_copied(folder, cut):
    model = Embedder.from_pretrained(folder, **cut, device="cpu", allow_untrained=True)
    expected = model.encode(TEXTS)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert (again.depth, again.dim, again.rank) == (model.depth, model.dim, model.rank)
        np.testing.assert_array_equal(again.encode(TEXTS), expected)


@pytest.mark.parametrize("cut", [{}, {"depth": 1, "dim": 16, "rank": 16}])
def test_save_pretrained(folder, tmp_path, cut):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = Embedder.from_pretrained(folder, **cut, device="cpu")
    model.save_pretrained(tmp_path / "saved")
    again = Embedder.from_pretrained(tmp_path / "saved", device="cpu")
    assert (again.depth, again.dim, again.rank) == (model.depth, model.dim, model.rank)
    assert_equal_vectors(again.encode(TEXTS), model.encode(TEXTS))
    other = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert_equal_vectors(other.encode(SPOKEN), model.encode(SPOKEN))
    with pytest.raises(UserError, match="exists already"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="the model that is read"):
        model.save_pretrained(folder, overwrite=True)


def test_a_plain_backbone_is_saved_as_a_model_folder(world, tmp_path):
    model = Embedder.from_pretrained(world.backbone, device="cpu")
    model.save_pretrained(tmp_path / "saved")
    again = Embedder.from_pretrained(tmp_path / "saved", device="cpu")
    assert_equal_vectors(again.encode(SPOKEN), model.encode(SPOKEN))


def test_tables_and_mappings_are_refused(model):
    """Their items are the names of columns."""
    table = types.SimpleNamespace(columns=["text"], __iter__=None)
    tables = [{"text": ["a"]}, table]
    try:
        import pandas as pd

        tables.append(pd.DataFrame({"text": ["a", "b"]}))
        assert_equal_vectors(model.encode(pd.Series(["a", "b"])), model.encode(["a", "b"]))
    except ImportError:
        pass
    import pyarrow as pa
    from datasets import Dataset

    tables += [pa.table({"text": ["a"]}), Dataset.from_dict({"text": ["a"]})]
    for given in tables:
        with pytest.raises(UserError, match=f"texts is a {type(given).__name__}, whose items"):
            model.encode(given)
    assert model.encode(Dataset.from_dict({"text": ["a"]})["text"]).shape == (1, HIDDEN)
    assert_equal_vectors(model.encode(np.array(["a", "b"])), model.encode(("a", "b")))
