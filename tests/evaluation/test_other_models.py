"""Models of other kinds as baselines: a static export, and what sentence-transformers reads."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.scripts import load_script
from helpers.tiny_models import TEXTS, make_tokenizer, write_model
from oracles import naive_metrics

model2vec = pytest.importorskip("model2vec")
library = pytest.importorskip("sentence_transformers")

CASES = [(0, 1, (3, 1, 4)), (3, 0, (0, 5)), (5, 3, (1, 3, 4)), (4, 6, (0, 1, 2, 3, 6))]
"""numbers of texts: a query, its passage, its candidates"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, what `--static` makes of it, the same with prompts, and test data."""
    root = tmp_path_factory.mktemp("others")
    write_model(root / "model", make_tokenizer())
    flags = ["--model", root / "model", "--output", root / "static", "--static", "--dim", 16]
    assert load_script("export_model").main([*map(str, flags)]) == 0
    spoken = library.SentenceTransformer(str(root / "static"), device="cpu")
    spoken.prompts = {"query": "Where? ", "document": ""}
    spoken.save(str(root / "spoken"))
    rows = [
        {"query": TEXTS[q], "passage": TEXTS[p], "candidates": [TEXTS[c] for c in candidates]}
        for q, p, candidates in CASES
    ]
    (root / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), root / "data" / "articles.parquet")
    return root


def evaluate(world, output, *baselines):
    flags = ["--model", world / "model", "--data", world / "data", "--output", output]
    flags += ["--device", "cpu", "--baseline", *baselines]
    return load_script("evaluate").main([*map(str, flags)])


def expected(world, prompt):
    model = model2vec.StaticModel.from_pretrained(str(world / "static"))
    scores = [
        model.encode([TEXTS[c] for c in candidates]) @ model.encode(prompt + TEXTS[query])
        for query, _, candidates in CASES
    ]
    return naive_metrics(
        [found.tolist() for found in scores], [of.index(right) for _, right, of in CASES]
    )


def test_a_static_model_stands_beside_the_others(world, tmp_path, capsys):
    static, spoken = str(world / "static"), str(world / "spoken")
    assert evaluate(world, tmp_path / "out", static, world / "model", spoken) == 0
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(written["others"]) == [static, spoken]
    means = []
    for name, prompt in ((static, ""), (spoken, "Where? ")):
        (row,) = written["others"][name]
        assert (row["dataset"], row["split"], row["dim"]) == ("articles", "all", 16)
        metrics = expected(world, prompt)
        assert {metric: row[metric] for metric in metrics} == pytest.approx(metrics)
        means.append(metrics["recall@1"])
    assert expected(world, "") != expected(world, "Where? "), "the prompt makes no difference"
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert table[0].split()[-4:] == [static, spoken, "before", "after"]
    found = [float(value) for value in table[-1].split()[-4:-2]]
    assert found == pytest.approx(np.round(means, 3), abs=1e-9)
    assert written["baseline"]["model"] == str(world / "model")


def test_mistakes_are_told_before_the_work(world, tmp_path, capsys):
    (tmp_path / "second").symlink_to(world / "model")
    assert evaluate(world, tmp_path / "out", world / "model", tmp_path / "second") == 2
    said = capsys.readouterr().err
    assert "--baseline names 2 models of the trained kind" in said
    shutil.copytree(world / "static", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"{")
    assert evaluate(world, tmp_path / "out", tmp_path / "broken") == 2
    assert "cannot be read as a model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
