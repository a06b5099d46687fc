"""A SentenceTransformer that holds the token factors: the Embedder's vectors, trained on, saved."""

import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tiny_models import (
    HIDDEN,
    PROMPTS,
    SPOKEN,
    TEXTS,
    assert_equal_vectors,
    make_tokenizer,
    random_backbone,
    write_model,
)
from packaging.version import Version
from transformers import AutoModel

from ml_embed import Embedder
from ml_embed.errors import UserError
from ml_embed.model_folders.export import export_model
from ml_embed.model_folders.record import ModelRecord

library = pytest.importorskip("sentence_transformers")
try:
    losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")
except ImportError:  # before version 6
    losses = importlib.import_module("sentence_transformers.losses")
from ml_embed.sentence_transformers import load  # noqa: E402

CUTS = [{}, {"depth": 1, "rank": 16, "dim": 16}, {"rank": 16}, {"dim": 8}]


@pytest.fixture(scope="module", params=["shared", "per_layer"])
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("model") / request.param
    return write_model(place, make_tokenizer(), request.param)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model", make_tokenizer())


@pytest.mark.parametrize("cut", CUTS)
def test_its_vectors_are_the_embedders(folder, cut):
    model, expected = load(folder, **cut, device="cpu"), Embedder.from_pretrained(folder, **cut)
    assert isinstance(model, library.SentenceTransformer)
    for name in (None, "query"):
        np.testing.assert_allclose(
            model.encode(TEXTS, prompt_name=name), expected.encode(TEXTS, name), atol=2e-6
        )
    assert_equal_vectors(model.encode_query(SPOKEN), expected.encode_query(SPOKEN))
    assert_equal_vectors(model.encode_document(SPOKEN), expected.encode_document(SPOKEN))
    assert model.max_seq_length == expected.max_seq_length
    assert model.encode("a").shape == (expected.dim,)
    assert model.similarity_fn_name == "cosine"


def test_the_table_is_never_there(shared):
    """Not as a weight; `tests/inference/test_memory.py` measures the memory of encoding."""
    model = load(shared, rank=16, device="cpu")
    vocabulary = 448
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    assert (vocabulary, 16) in shapes
    assert (vocabulary, HIDDEN) not in shapes


def test_untrained_sizes_are_refused(shared):
    with pytest.raises(UserError, match="rank 8 was not trained"):
        load(shared, rank=8)
    assert load(shared, rank=8, allow_untrained=True, device="cpu").encode("a").shape == (HIDDEN,)


@pytest.mark.parametrize("sharing", ["shared", "per_layer"])
def test_a_whole_table_loads_too_and_is_saved(tmp_path, sharing):
    whole = write_model(tmp_path / "whole", make_tokenizer(), sharing, factorized=False)
    cut = {"depth": 3, "dim": 16}
    model = load(whole, **cut, device="cpu")
    expected = Embedder.from_pretrained(whole, **cut).encode(TEXTS)
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-6)
    model.save(str(tmp_path / "saved"))
    assert ModelRecord.load(tmp_path / "saved").ranks == ()
    again = Embedder.from_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(again.encode(TEXTS), expected, atol=1e-6)
    shallow = Embedder.from_pretrained(whole, depth=1, dim=8).encode(TEXTS)
    saved = load(tmp_path / "saved", depth=1, dim=8, device="cpu").encode(TEXTS)
    np.testing.assert_allclose(saved, shallow, atol=1e-6)


def test_a_plain_backbone_gets_its_end_token(tmp_path):
    """Its tokenizer appends none by itself; long texts are cut in front of it."""
    tokenizer = make_tokenizer()
    random_backbone(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = [*SPOKEN, " ".join(SPOKEN * 4)]
    expected = Embedder.from_pretrained(tmp_path, device="cpu").encode(texts)
    assert_equal_vectors(load(tmp_path, device="cpu").encode(texts), expected)


def train_on(model, output, saves=False):
    rows = {"anchor": SPOKEN, "positive": SPOKEN[1:] + SPOKEN[:1]}
    arguments = library.SentenceTransformerTrainingArguments(
        str(output),
        max_steps=4,
        save_strategy="steps" if saves else "no",
        save_steps=2,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    loss = losses.MultipleNegativesRankingLoss(model)
    return library.SentenceTransformerTrainer(
        model, arguments, train_dataset=Dataset.from_dict(rows), loss=loss
    )


def test_it_trains_on_and_saves_our_folder(folder, tmp_path):
    cut = {} if folder.name == "per_layer" else CUTS[1]
    model = load(folder, **cut, device="cpu")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    train_on(model, tmp_path / "run").train()
    moved = [name for name, weight in model.named_parameters() if not weight.equal(before[name])]
    assert moved == list(before), "every weight learns, A and B too"
    model.prompts["query"] = "Question: "
    model.save_pretrained(str(tmp_path / "saved"))
    expected = model.encode(SPOKEN, prompt_name="query")

    saved = tmp_path / "saved"
    record, former = ModelRecord.load(saved), ModelRecord.load(folder)
    assert record.prompts["query"] == "Question: "
    assert (record.exits[-1], record.dims[0], record.ranks[-1]) == (
        cut.get("depth", former.exits[-1]),
        cut.get("dim", former.dims[0]),
        cut.get("rank", former.ranks[-1]),
    )
    modules = json.loads((saved / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.models.") for module in modules)
    again = Embedder.from_pretrained(saved, device="cpu")
    assert_equal_vectors(again.encode(SPOKEN, "query"), expected)
    assert_equal_vectors(load(saved, device="cpu").encode(SPOKEN, prompt_name="query"), expected)
    plain = library.SentenceTransformer(str(saved), device="cpu")
    assert_equal_vectors(plain.encode(SPOKEN, prompt_name="query"), expected)
    if record.norm_sharing == "per_layer" and not cut:
        shallow = Embedder.from_pretrained(saved, depth=1, device="cpu").encode(SPOKEN)
        assert_equal_vectors(load(saved, depth=1, device="cpu").encode(SPOKEN), shallow)


@pytest.mark.skipif(
    Version(library.__version__) < Version("6"),
    reason="the trainer of version 5.2 cannot save under transformers 5",
)
def test_the_trainer_resumes_from_its_checkpoint(shared, tmp_path):
    vectors = []
    for resume in (None, str(tmp_path / "run/checkpoint-2")):
        model = load(shared, rank=16, device="cpu")
        train_on(model, tmp_path / "run", saves=True).train(resume_from_checkpoint=resume)
        vectors.append(model.encode(SPOKEN))
    assert_equal_vectors(*vectors)


def test_it_is_saved_over_what_is_there(folder, shared, tmp_path):
    """Other files stay; weights that belong to no folder of ours would be taken for parts of it."""
    saved = shutil.copytree(folder, tmp_path / "saved")
    (saved / "notes.txt").write_text("mine")
    (saved / "model-00001-of-00002.safetensors").write_bytes(b"")
    model = load(shared, depth=1, device="cpu")
    model.save(str(saved))
    assert (saved / "notes.txt").read_text() == "mine"
    assert not list(saved.glob(".*"))
    found = Embedder.from_pretrained(saved, device="cpu")
    assert_equal_vectors(found.encode(TEXTS), model.encode(TEXTS))
    assert found.prompts["query"] == PROMPTS["query"]


def test_what_cannot_be_saved_is_refused(shared, tmp_path):
    model = load(shared, device="cpu")
    with pytest.raises(UserError, match="safetensors only"):
        model.save(str(tmp_path / "x"), safe_serialization=False)
    layer = model[0].auto_model.layers[0].self_attn
    layer.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="merge adapters"):
        model.save(str(tmp_path / "x"))


def test_factors_only(folder, tmp_path):
    """A folder without the table: ours alone, smaller, and as good as the whole one."""
    cut = CUTS[1] if folder.name == "per_layer" else {}
    small, whole = tmp_path / "small", tmp_path / "whole"
    export_model(folder, small, **cut, factors_only=True)
    expected = Embedder.from_pretrained(folder, **cut, device="cpu").encode(TEXTS)
    np.testing.assert_allclose(load(small, device="cpu").encode(TEXTS), expected, atol=1e-6)
    assert_equal_vectors(Embedder.from_pretrained(small, device="cpu").encode(TEXTS), expected)
    export_model(small, whole)
    assert_equal_vectors(Embedder.from_pretrained(whole, device="cpu").encode(TEXTS), expected)
    sizes = [sum(f.stat().st_size for f in p.rglob("*.safetensors")) for p in (small, whole)]
    assert sizes[0] < sizes[1] - 448 * HIDDEN * 4 + 1000
    for client in (AutoModel.from_pretrained, library.SentenceTransformer):
        with pytest.raises(OSError, match="no file named"):
            client(str(small))
    card = (small / "README.md").read_text()
    assert "only ML-Embed reads it" in card
    assert "import SentenceTransformer" not in card
