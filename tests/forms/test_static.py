"""The token table as a static model: model2vec's vectors are the means of rows."""

import json

import numpy as np
import pytest
import torch
from helpers.scripts import load_script
from helpers.tiny_models import SPOKEN
from safetensors.torch import load_file

from ml_embed.files.atomic import umask
from ml_embed.prepare.tokenizer import TextTokenizer, load_tokenizer

model2vec = pytest.importorskip("model2vec")


def test_a_whole_token_table_is_written_as_it_is(whole, tmp_path):
    table = load_file(whole / "model.safetensors")["embed_tokens.weight"]
    for dim, flags in ((table.shape[1], []), (16, ["--dim", "16"])):
        output = tmp_path / str(dim)
        arguments = ["--model", str(whole), "--output", str(output), "--static", *flags]
        assert load_script("export_model").main(arguments) == 0
        written = load_file(output / "model.safetensors")["embeddings"]
        assert torch.equal(written, table[: len(written), :dim])


def test_vectors_are_means_of_rows(checkpoint, tmp_path, capsys):
    flags = ["--model", str(checkpoint), "--output", str(tmp_path / "s"), "--static"]
    assert load_script("export_model").main([*flags, "--rank", "16", "--dim", "16"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["bytes_of_weights"] >= 400 * 16 * 4
    factors = load_file(checkpoint / "nested/embedding_factors.safetensors")
    rows = (factors["A"][:, :16] @ factors["B"][:16, :16]).numpy()
    tokenizer = TextTokenizer(load_tokenizer(checkpoint), 48)
    means = np.stack([rows[ids[:-1]].mean(0) for ids in tokenizer(SPOKEN)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    found = model2vec.StaticModel.from_pretrained(str(tmp_path / "s")).encode(SPOKEN)
    np.testing.assert_allclose(found, means, atol=1e-5)
    card = (tmp_path / "s/README.md").read_text()
    assert "was not trained so" in card
    weights = load_file(tmp_path / "s/model.safetensors")["embeddings"]
    assert f"{weights.numel():,} parameters" in card
    for wrong in ("hidden state", "| layers |", "Texts are read up to"):
        assert wrong not in card
    assert (tmp_path / "s/model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask()
    assert load_script("export_model").main([*flags, "--overwrite"]) == 0
    assert model2vec.StaticModel.from_pretrained(str(tmp_path / "s")).dim == 64
