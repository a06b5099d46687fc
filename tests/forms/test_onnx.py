"""The exported graph in onnxruntime. `tests/clients/run.py` runs FastEmbed and transformers.js."""

import json

import numpy as np
import pytest
from helpers.scripts import load_script
from helpers.tiny_models import PROMPTS, SPOKEN, TEXTS

from ml_embed import Embedder
from ml_embed.prepare.tokenizer import TextTokenizer, load_tokenizer

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.slow  # tracing takes ten seconds and more

CUT = {"depth": 1, "rank": 16, "dim": 16}
FLAGS = [word for axis, size in CUT.items() for word in (f"--{axis}", str(size))]


def export(checkpoint, output, *flags):
    arguments = ["--model", str(checkpoint), "--output", str(output), "--onnx", *flags]
    return load_script("export_model").main(arguments)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """As it is named: each kind of export once."""
    folder = tmp_path_factory.mktemp("onnx")
    (folder / "texts").mkdir()
    rows = [{"query": t, "passage": "a", "language": "xx"} for t in SPOKEN]
    lines = "\n".join(map(json.dumps, rows))
    (folder / "texts/x.jsonl").write_text(lines)
    assert export(checkpoint, folder / "cut", *FLAGS) == 0
    assert (
        export(checkpoint, folder / "int8", *FLAGS, "--int8", "--texts", str(folder / "texts")) == 0
    )
    return folder


def session(folder, file="onnx/model.onnx"):
    return onnxruntime.InferenceSession(str(folder / file))


@pytest.mark.parametrize("side", ["left", "right"])
def test_vectors_are_the_embedders(checkpoint, exported, side):
    graph, expected = session(exported / "cut"), Embedder.from_pretrained(checkpoint, **CUT)
    tokenizer = load_tokenizer(exported / "cut")
    for texts in (TEXTS, TEXTS[:1], [PROMPTS["query"] + text for text in SPOKEN]):
        batch = tokenizer(
            texts, padding=True, truncation=True, return_tensors="np", padding_side=side
        )
        inputs = {name: batch[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
        (vectors,) = graph.run(["sentence_embedding"], inputs)
        np.testing.assert_allclose(vectors, expected.encode(texts), atol=1e-5)
    assert [one.name for one in graph.get_inputs()] == ["input_ids", "attention_mask"]
    assert [one.shape for one in graph.get_inputs()] == [["batch", "length"]] * 2
    assert [one.name for one in graph.get_outputs()] == ["sentence_embedding"]


def test_a_whole_table_gives_the_embedders_vectors_too(whole, exported, tmp_path):
    """As it is, and in 8 bits."""
    import onnx

    from ml_embed.forms.onnx_session import OnnxModel

    sizes = {"depth": 1, "dim": 16}
    flags = ["--depth", "1", "--dim", "16", "--texts", str(exported / "texts"), "--int8"]
    assert export(whole, tmp_path / "float", *flags[:4]) == 0
    assert export(whole, tmp_path / "int8", *flags) == 0
    tokenizer = TextTokenizer(load_tokenizer(whole), 48)
    expected = Embedder.from_pretrained(whole, **sizes).encode(TEXTS)
    found = OnnxModel(tmp_path / "float/onnx/model.onnx", tokenizer).encode(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    file = tmp_path / "int8/onnx/model_int8.onnx"
    assert 0.99 < (OnnxModel(file, tokenizer).encode(TEXTS) * expected).sum(1).min() < 1
    kinds = {tuple(t.dims): t.data_type for t in onnx.load(file).graph.initializer}
    assert kinds[448, 64] == onnx.TensorProto.INT8, "the table is held in 8 bits"


def test_a_text_cut_behind_its_end_token_gets_it_back(checkpoint, exported):
    """transformers.js cuts so."""
    model = Embedder.from_pretrained(checkpoint, **CUT)
    text = " ".join(TEXTS) * 3
    ids = load_tokenizer(checkpoint)(text).input_ids[: model.max_seq_length]
    assert len(ids) == model.max_seq_length
    inputs = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    (vectors,) = session(exported / "cut").run(None, inputs)
    np.testing.assert_allclose(vectors, model.encode([text]), atol=1e-5)


def test_the_whole_table_is_not_in_it(exported):
    import onnx

    model = onnx.load(exported / "cut/onnx/model.onnx")
    shapes = [tuple(tensor.dims) for tensor in model.graph.initializer]
    assert (448, 16) in shapes
    assert (448, 64) not in shapes
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_weights_in_8_bits(checkpoint, exported, capsys):
    from ml_embed.forms.onnx_session import OnnxModel

    file = exported / "int8/onnx/model_int8.onnx"
    model = OnnxModel(file, TextTokenizer(load_tokenizer(checkpoint), 48))
    cosines = (
        model.encode(SPOKEN) * Embedder.from_pretrained(checkpoint, **CUT).encode(SPOKEN)
    ).sum(1)
    report = json.loads((exported / "int8/int8.json").read_text())
    assert 0.99 < cosines.min() < 1
    assert report["smallest_cosine_by_language"].keys() == {"xx"}
    assert report["smallest_cosine"] == pytest.approx(float(cosines.min()), abs=1e-4)
    assert f"{report['smallest_cosine']:.4f}" in (exported / "int8/README.md").read_text()
    assert file.stat().st_size < 0.6 * (exported / "cut/onnx/model.onnx").stat().st_size


def test_what_loses_too_much_is_not_written(checkpoint, exported, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ml_embed.forms.onnx.SMALLEST_COSINE", 1.1)
    flags = [*FLAGS, "--int8", "--texts", str(exported / "texts")]
    assert export(checkpoint, tmp_path / "out", *flags) == 2
    assert "add --allow-loss" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert export(checkpoint, tmp_path / "out", *flags, "--allow-loss") == 0


def test_large_weights_lie_beside_the_graph(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("ml_embed.forms.onnx_graph.LARGE", 1)
    assert export(checkpoint, tmp_path / "out", *FLAGS) == 0
    assert (tmp_path / "out/onnx/model.onnx_data").stat().st_size > 10_000
    batch = load_tokenizer(tmp_path / "out")(SPOKEN, padding=True, return_tensors="np")
    inputs = {name: batch[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    (vectors,) = session(tmp_path / "out").run(None, inputs)
    expected = Embedder.from_pretrained(checkpoint, **CUT).encode(SPOKEN)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
