"""Cut model folders: complete, and the same vectors as cutting at load time, whoever reads them."""

import json
import stat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.in_process import train
from helpers.scripts import load_script
from helpers.tiny_models import (
    HIDDEN,
    LAYERS,
    PROMPTS,
    SPOKEN,
    TEXTS,
    assert_equal_vectors,
    make_tokenizer,
    naive,
    write_model,
)
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from ml_embed import Embedder
from ml_embed.data.store import open_store
from ml_embed.errors import UserError
from ml_embed.model import factorize_table
from ml_embed.model_folders.export import export_model
from ml_embed.model_folders.record import ModelRecord


def test_factors_are_turned_for_the_data_before_the_cut(world, tmp_path, monkeypatch, capsys):
    """The whole rank is the same model, and smaller ranks are nearer to its table than without."""
    code, _ = train(world, tmp_path, "run", learning_rate=3e-2)
    assert code == 0
    model, errors = tmp_path / "run/step_4", {}
    table = load_file(model / "model.safetensors")["embed_tokens.weight"]
    store = open_store(world.tokenized, tmp_path / "cache")
    share = torch.from_numpy(store.token_share(len(table))).unsqueeze(1)
    for turned in (False, True):
        for rank in (16, 32):
            output = tmp_path / f"{turned}{rank}"
            flags = ["--refactor", str(world.tokenized)] if turned else []
            arguments = ["--model", model, "--output", output, "--rank", rank, *flags]
            assert load_script("export_model").main(list(map(str, arguments))) == 0
            cut = load_file(output / "model.safetensors")["embed_tokens.weight"]
            errors[turned, rank] = float((share * (cut - table).square()).sum())
    assert errors[True, 32] < 1e-8
    assert errors[True, 16] < 0.9 * errors[False, 16]
    A, B = factorize_table(table, 16, share.flatten())
    assert errors[True, 16] == pytest.approx(
        float((share * (A @ B - table).square()).sum()), rel=1e-3
    )


def test_data_of_another_tokenizer_turns_nothing(checkpoint, world, tmp_path):
    with pytest.raises(UserError, match="made with another tokenizer"):
        export_model(checkpoint, tmp_path / "cut", frequencies=world.tokenized)
    assert not (tmp_path / "cut").exists()


def test_data_with_more_tokens_turns_nothing(checkpoint, tmp_path):
    """In the released layout, which does not say which tokenizer it was made with."""
    (tmp_path / "data").mkdir()
    corpus = pa.table({"doc_id": ["a"], "input_ids": [[5, 9999, 2]]})
    query = pa.table({"query_input_ids": [[5, 2]], "passage_input_ids": ["a"]})
    pq.write_table(corpus, tmp_path / "data/corpus.parquet")
    pq.write_table(query, tmp_path / "data/x_query.parquet")
    with pytest.raises(UserError, match="holds token id 9999, but the model's vocabulary"):
        export_model(checkpoint, tmp_path / "cut", frequencies=tmp_path / "data")


@pytest.fixture(scope="module", params=["shared", "per_layer"])
def checkpoint(request, tmp_path_factory):
    return write_model(
        tmp_path_factory.mktemp("model") / request.param, make_tokenizer(), request.param
    )


def embed(folder: Path, **cut) -> np.ndarray:
    return Embedder.from_pretrained(folder, device="cpu", **cut).encode(TEXTS)


def test_a_cut_folder_gives_the_vectors_of_the_cut(checkpoint, tmp_path):
    cut = {"depth": 1, "dim": 16, "rank": 16}
    output = tmp_path / "cut"
    assert vars(export_model(checkpoint, output, **cut)) == cut
    assert_equal_vectors(embed(output), embed(checkpoint, **cut))
    assert_equal_vectors(embed(output), naive(checkpoint, TEXTS, **cut))
    assert np.abs(embed(output) - embed(checkpoint, dim=16)).max() > 0.01, "the cut changes nothing"
    # Still nested, and a complete model folder for transformers.
    assert_equal_vectors(embed(output, dim=8), embed(checkpoint, **cut | {"dim": 8}))
    assert_equal_vectors(
        naive(output, TEXTS, depth=1), embed(output, dim=HIDDEN, allow_untrained=True)
    )
    record, config = ModelRecord.load(output), json.loads((output / "config.json").read_text())
    assert (record.exits, record.dims, record.ranks, record.prompts) == (
        (1,),
        (16, 8),
        (16,),
        PROMPTS,
    )
    assert (config["num_hidden_layers"], config["matryoshka_dimensions"]) == (1, [8, 16])
    with safe_open(output / "nested" / "embedding_factors.safetensors", "pt") as file:
        assert (file.get_tensor("A").shape[1], file.get_tensor("B").shape) == (16, (16, HIDDEN))
    with safe_open(output / "model.safetensors", "pt") as file:
        names = file.offset_keys()
        assert "layers.0.mlp.up_proj.weight" in names
        assert not [name for name in names if name.startswith("layers.1.")]
    with pytest.raises(UserError, match="dim 32 was not trained"):
        Embedder.from_pretrained(output, dim=32)


@pytest.mark.parametrize("cut", [{}, {"depth": 1, "dim": 16, "rank": 16}])
def test_sentence_transformers_reads_it(checkpoint, tmp_path, cut):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    export_model(checkpoint, tmp_path / "cut", **cut)
    other = sentence_transformers.SentenceTransformer(str(tmp_path / "cut"), device="cpu")
    vectors = other.encode(SPOKEN, prompt_name="query")
    assert vectors.shape == (len(SPOKEN), cut.get("dim", HIDDEN))
    expected = Embedder.from_pretrained(checkpoint, **cut, device="cpu").encode(
        SPOKEN, prompt_name="query"
    )
    assert_equal_vectors(vectors, expected)


def test_cutting_twice_is_cutting_once(checkpoint, tmp_path):
    export_model(checkpoint, tmp_path / "first", dim=32, rank=16)
    export_model(tmp_path / "first", tmp_path / "second", depth=1, dim=8)
    assert_equal_vectors(embed(tmp_path / "second"), embed(checkpoint, depth=1, dim=8, rank=16))


def test_a_whole_table_is_cut_in_depth_and_dim(tmp_path):
    whole = write_model(tmp_path / "whole", make_tokenizer(), factorized=False)
    export_model(whole, tmp_path / "cut", depth=1, dim=8)
    assert_equal_vectors(embed(tmp_path / "cut"), naive(whole, TEXTS, 1, 8))
    assert not (tmp_path / "cut" / "nested").exists()
    with pytest.raises(UserError, match="whole token table"):
        export_model(whole, tmp_path / "other", rank=16)


def test_untrained_sizes(checkpoint, tmp_path):
    cut = {"depth": 2, "dim": 24, "rank": 8}
    with pytest.raises(UserError, match=r"depth 2 .*trained: 1, 3.*dim 24 .*rank 8 "):
        export_model(checkpoint, tmp_path / "cut", **cut)
    assert not (tmp_path / "cut").exists()
    export_model(checkpoint, tmp_path / "cut", **cut, allow_untrained=True)
    record = ModelRecord.load(tmp_path / "cut")
    assert (record.exits, record.dims, record.ranks) == ((1, 2), (24, 16, 8), (8,))
    assert_equal_vectors(embed(tmp_path / "cut"), embed(checkpoint, **cut, allow_untrained=True))
    assert_equal_vectors(
        embed(tmp_path / "cut", depth=1),
        embed(checkpoint, **cut | {"depth": 1}, allow_untrained=True),
    )


def test_bfloat16_halves_the_folder(checkpoint, tmp_path):
    export_model(checkpoint, tmp_path / "half", dtype=torch.bfloat16)
    sizes = [
        (folder / "model.safetensors").stat().st_size for folder in (checkpoint, tmp_path / "half")
    ]
    assert sizes[1] < 0.55 * sizes[0]
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (embed(tmp_path / "half") * embed(checkpoint)).sum(1).min() > 0.99


def stored(folder: Path) -> tuple[str, torch.dtype, torch.dtype]:
    """What a folder's config says, what its weights are, and what transformers makes of them."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        weights = file.get_tensor("norm.weight").dtype
    return (
        json.loads((folder / "config.json").read_text())["dtype"],
        weights,
        AutoModel.from_pretrained(folder).dtype,
    )


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_folders_trained_from_a_bfloat16_backbone_say_what_they_hold(world, tmp_path, key):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    backbone = tmp_path / "backbone"
    AutoModel.from_pretrained(world.backbone, dtype=torch.bfloat16).save_pretrained(backbone)
    AutoTokenizer.from_pretrained(world.backbone).save_pretrained(backbone)
    config = (backbone / "config.json").read_text()
    assert '"dtype": "bfloat16"' in config
    (backbone / "config.json").write_text(config.replace('"dtype"', f'"{key}"'))
    assert train(world, tmp_path, model_path=str(backbone), train_steps=1)[0] == 0
    trained, whole, half = tmp_path / "run" / "step_1", tmp_path / "whole", tmp_path / "half"
    export_model(trained, whole)
    export_model(trained, half, dtype=torch.bfloat16)
    assert stored(trained) == stored(whole) == ("float32", torch.float32, torch.float32)
    assert stored(half) == ("bfloat16", torch.bfloat16, torch.bfloat16)
    other = sentence_transformers.SentenceTransformer(str(trained), device="cpu")
    np.testing.assert_allclose(
        other.encode(SPOKEN),
        Embedder.from_pretrained(trained, device="cpu").encode(SPOKEN),
        atol=1e-5,
    )


def test_what_stands_there_is_not_lost(checkpoint, tmp_path):
    output = tmp_path / "cut"
    export_model(checkpoint, output, depth=1)
    with pytest.raises(UserError, match="exists already"):
        export_model(checkpoint, output)
    assert ModelRecord.load(output).exits == (1,)
    export_model(checkpoint, output, overwrite=True)
    assert ModelRecord.load(output).exits == (1, LAYERS)
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "thesis.txt").write_text("precious")
    for place, message in (
        (documents, "not a model folder"),
        (checkpoint, "the model that is read"),
    ):
        with pytest.raises(UserError, match=message):
            export_model(checkpoint, place, overwrite=True)
    assert (documents / "thesis.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "documents"]


def test_colleagues_can_read_it(checkpoint, tmp_path):
    export_model(checkpoint, tmp_path / "cut")
    (tmp_path / "reference").write_text("")
    usual = stat.S_IMODE((tmp_path / "reference").stat().st_mode)
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / "cut").rglob("*")
        if path.is_file()
    }
    assert modes == dict.fromkeys(modes, usual)


@pytest.mark.parametrize("flag", ["--model", "--checkpoint"])
def test_the_script(checkpoint, tmp_path, capsys, flag):
    script = load_script("export_model")
    flags = [flag, str(checkpoint), "--output", str(tmp_path / "cut"), "--depth", "1", "--dim", "8"]
    assert script.main(flags) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (printed["depth"], printed["dim"], printed["rank"]) == (1, 8, 32)
    assert_equal_vectors(embed(tmp_path / "cut"), embed(checkpoint, depth=1, dim=8))
    assert script.main(flags) == 2
    assert "exists already" in capsys.readouterr().err
    assert script.main([*flags[:4], "--depth", "7"]) == 2
