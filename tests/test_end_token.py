"""The end token is the one that the start model's tokenizer appends, from raw text to vectors.

Qwen3-Embedding appends `<|endoftext|>` while its `eos_token` is `<|im_end|>`.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.in_process import train
from helpers.tiny_models import SPOKEN, TEXTS, make_tokenizer, random_backbone
from tokenizers import processors
from transformers import AutoTokenizer

from ml_embed import Embedder
from ml_embed.evaluation.cube import CubeModel
from ml_embed.inference.text_models import load_text_model
from ml_embed.prepare.tokenization import TokenizeOptions, tokenize_folder
from ml_embed.prepare.tokenizer import TextTokenizer, end_token, load_tokenizer
from ml_embed.recipe.teacher import TextDecoder
from ml_embed.training.inputs import ModelFolder


def append(tokenizer, *tokens: str):
    """The tokenizer with a post-processor that appends tokens, whatever its eos_token is."""
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in tokens]
    template = processors.TemplateProcessing(single=" ".join(("$A", *tokens)), special_tokens=ids)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.Sequence([backend.post_processor, template])
    return tokenizer


@pytest.fixture
def like_qwen3_embedding(world, tmp_path) -> Path:
    """The tiny backbone with a tokenizer that appends its padding token."""
    folder = shutil.copytree(world.backbone, tmp_path / "backbone")
    append(AutoTokenizer.from_pretrained(folder), "<|endoftext|>").save_pretrained(folder)
    return folder


def test_it_is_what_the_tokenizer_appends():
    tokenizer = make_tokenizer()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert eos != pad
    assert end_token(tokenizer) == eos, "nothing is appended"
    assert end_token(append(make_tokenizer(), "<|im_end|>")) == eos
    assert end_token(append(make_tokenizer(), "<|endoftext|>")) == pad
    both = append(make_tokenizer(), "<|endoftext|>", "<|endoftext|>")
    assert end_token(both) == eos, "not exactly one"
    found = TextTokenizer(append(make_tokenizer(), "<|endoftext|>"), 9)(TEXTS)
    for text, ids in zip(TEXTS, found, strict=True):
        assert ids.tolist() == [*tokenizer(text).input_ids[:8], pad]


def test_vectors_are_those_of_sentence_transformers(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    models = pytest.importorskip("sentence_transformers.models")
    random_backbone(make_tokenizer()).save_pretrained(tmp_path / "backbone")
    append(make_tokenizer(), "<|endoftext|>").save_pretrained(tmp_path / "backbone")
    transformer = models.Transformer(str(tmp_path / "backbone"))
    pooling = models.Pooling(64, pooling_mode="lasttoken")
    theirs = sentence_transformers.SentenceTransformer(
        modules=[transformer, pooling, models.Normalize()], device="cpu"
    )
    theirs.save_pretrained(str(tmp_path / "saved"))
    expected = theirs.encode(SPOKEN)
    for folder in (tmp_path / "backbone", tmp_path / "saved"):
        found = Embedder.from_pretrained(folder, device="cpu").encode(SPOKEN)
        np.testing.assert_allclose(found, expected, atol=2e-6)
    own = load_text_model(tmp_path / "backbone", "cpu")
    np.testing.assert_allclose(own.encode(SPOKEN), expected, atol=2e-6)


def test_from_raw_text_to_a_trained_folder(world, like_qwen3_embedding, tmp_path, capsys):
    pad = load_tokenizer(like_qwen3_embedding).pad_token_id
    options = TokenizeOptions(str(like_qwen3_embedding), world.raw, tmp_path / "tokenized")
    tokenize_folder(options, progress=False)
    assert json.loads((tmp_path / "tokenized/manifest.json").read_text())["eos_id"] == pad
    for kind, column in (("corpus", "input_ids"), ("query", "query_input_ids")):
        texts = pq.read_table(tmp_path / f"tokenized/facts_{kind}.parquet")[column].to_pylist()
        assert {ids[-1] for ids in texts} == {pad}
    decoder = TextDecoder(load_tokenizer(like_qwen3_embedding))
    assert "<|" not in decoder([np.array(texts[0])])[0]
    changes = {"model_path": str(like_qwen3_embedding), "train_steps": 1}
    code, _ = train(world, tmp_path, train_data_path=str(tmp_path / "tokenized"), **changes)
    assert code == 0
    step = tmp_path / "run" / "step_1"
    saved = AutoTokenizer.from_pretrained(step)
    assert saved("a text").input_ids[-1] == saved.eos_token_id == pad
    assert json.loads((step / "config.json").read_text())["eos_token_id"] == pad
    assert end_token(ModelFolder.open(step).tokenizer) == pad
    assert CubeModel.open(step).text_tokenizer.eos_id == pad


def test_data_with_another_end_token_is_refused(world, like_qwen3_embedding, tmp_path, capsys):
    code, _ = train(world, tmp_path, model_path=str(like_qwen3_embedding), train_steps=1)
    assert code == 2
    message = capsys.readouterr().err
    assert "end in token 1, those of model_path" in message
    assert "in 0 (<|endoftext|>); run tokenize_data_qwen.py again" in message
