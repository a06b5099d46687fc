"""BM25 as a baseline: its ranks against the formula, written out document by document."""

import importlib.util
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ml_embed.commands.evaluate import main
from ml_embed.errors import UserError
from ml_embed.evaluation import lexical
from ml_embed.evaluation.lexical import METHODS, evaluate_bm25, ngrams, words
from ml_embed.evaluation.metrics import metrics_of_ranks

needs_bm25s = pytest.mark.skipif(importlib.util.find_spec("bm25s") is None, reason="no bm25s")
CORPUS = ["Süd-Afrika", "Nord Afrika", "Afrika Afrika", "नेपाल", "Süd Korea", ""]
ROWS = [
    {"query": query, "passage": CORPUS[right], "candidates": CORPUS[shift:] + CORPUS[:shift]}
    for shift, (query, right) in enumerate(
        [("süd AFRIKA", 0), ("Afrika", 2), ("नेपाल देश", 3), ("xyz", 4), ("Korea", 1), ("", 5)]
    )
]


def naive_bm25(query, documents, pieces):
    """Lucene's BM25, k1 = 1.5 and b = 0.75, summed over a query's pieces."""
    split = [pieces(document) for document in documents]
    mean = sum(map(len, split)) / len(split)
    scores = []
    for document in split:
        score = 0.0
        for piece in pieces(query):
            having = sum(piece in other for other in split)
            idf = math.log(1 + (len(split) - having + 0.5) / (having + 0.5))
            count = document.count(piece)
            score += idf * count / (count + 1.5 * (0.25 + 0.75 * len(document) / mean))
        scores.append(score)
    return scores


def test_pieces():
    assert words("Süd-Afrika, नेपाल!") == ["süd", "afrika", "नेपाल"]
    assert ngrams("Abc") == [" ab", "abc", "bc ", " abc", "abc ", " abc "]
    assert ngrams("德") == [" 德 "]


@needs_bm25s
@pytest.mark.parametrize("raw", [False, True], ids=["candidates", "corpus"])
def test_metrics_are_those_of_the_formula(tmp_path, raw):
    rows = ROWS
    if raw:
        others = [text for text in CORPUS if text]
        rows = [
            {"query": row["query"], "passage": row["passage"], "negatives": others}
            for row in ROWS
            if row["query"] and row["passage"]
        ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "names.parquet")
    found = evaluate_bm25(tmp_path)
    assert found.keys() == METHODS.keys()
    for method, pieces in METHODS.items():
        ranks = []
        for row in rows:
            documents = others if raw else row["candidates"]
            scores = naive_bm25(row["query"], documents, pieces)
            own = scores[documents.index(row["passage"])]
            better = sum(score > own + 1e-6 for score in scores)
            tied = sum(abs(score - own) <= 1e-6 for score in scores) - 1
            ranks.append(1 + better + tied / 2)
        assert 1 < np.mean(ranks) < len(documents)
        [result] = found[method]
        expected = metrics_of_ranks(ranks)
        assert {name: result[name] for name in expected} == pytest.approx(expected)


@needs_bm25s
def test_other_right_answers_do_not_compete_and_the_corpus_is_read_once(tmp_path, monkeypatch):
    rows = [
        {"query": query, "passage": passage, "negatives": ["Nord Peru", "West Peru", "Chad"]}
        for query in ("Peru", "Chad Nord")
        for passage in (f"{query} {query}", f"{query} Süd")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "names.parquet")
    built, make = [], lexical.Bm25Index
    monkeypatch.setattr(lexical, "Bm25Index", lambda split: built.append(1) or make(split))
    found = evaluate_bm25(tmp_path)
    assert len(built) == len(METHODS)
    corpus = list(
        dict.fromkeys(text for row in rows for text in (row["passage"], *row["negatives"]))
    )
    for method, pieces in METHODS.items():
        ranks = []
        for row in rows:
            scores = dict(zip(corpus, naive_bm25(row["query"], corpus, pieces), strict=True))
            right = {other["passage"] for other in rows if other["query"] == row["query"]}
            own = scores[row["passage"]]
            others = [score for text, score in scores.items() if text not in right]
            ties = sum(abs(score - own) <= 1e-6 for score in others)
            ranks.append(1 + sum(score > own + 1e-6 for score in others) + ties / 2)
        expected = metrics_of_ranks(ranks)
        assert {name: found[method][0][name] for name in expected} == pytest.approx(expected)


@needs_bm25s
def test_the_command_shows_it_beside_a_model(world, tmp_path, capsys):
    pq.write_table(pa.Table.from_pylist(ROWS[:5]), tmp_path / "names.parquet")
    flags = ["--model", world.backbone, "--data", tmp_path, "--output", tmp_path / "out"]
    assert main([*map(str, flags), "--baseline", str(world.backbone), "bm25"]) == 0
    said = capsys.readouterr().out
    assert "bm25 words  bm25 characters  before  after" in said
    rows = json.loads((tmp_path / "out" / "evaluation.json").read_text())["bm25"]
    assert rows == evaluate_bm25(tmp_path / "names.parquet")
    assert np.isfinite([row["recall@1"] for of in rows.values() for row in of]).all()


def test_mistakes(world, tmp_path, capsys, monkeypatch):
    pq.write_table(pa.Table.from_pylist(ROWS[:5]), tmp_path / "names.parquet")
    flags = ["--model", world.backbone, "--data", tmp_path, "--output", tmp_path / "out"]
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bm25s" else find(name)
    )
    assert main([*map(str, flags), "--baseline", "bm25"]) == 2
    assert "pip install 'ml-embed[bm25]'" in capsys.readouterr().err
    with pytest.raises(UserError, match="bm25s"):
        evaluate_bm25(tmp_path)
