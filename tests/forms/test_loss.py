"""The smallest cosine per language, and what is refused."""

import json

import numpy as np
import pytest

from ml_embed.errors import UserError
from ml_embed.forms.loss import MOST_TEXTS, measure_loss, texts_by_language

VECTORS = {"a": [1.0, 0.0], "b": [0.6, 0.8], "c": [0.0, 1.0]}


def exact(texts):
    return np.array([VECTORS[text] for text in texts], np.float32)


def rounded(texts):
    vectors = exact(texts)
    vectors[np.array(texts) == "b"] = [0.8, 0.6]  # cosine 0.96
    return vectors


def test_the_smallest_cosine_of_each_language():
    loss = measure_loss(rounded, exact, {"xx": ["a", "c"], "yy": ["a", "b", "c"]})
    assert loss.to_json() == {
        "smallest_cosine": pytest.approx(0.96),
        "smallest_cosine_by_language": {"yy": pytest.approx(0.96), "xx": 1.0},
        "texts_compared": 5,
    }
    assert list(loss.cosines) == ["yy", "xx"]
    assert "yy 0.9600, xx 1.0000" in loss.sentence()
    assert "0.9600" in loss.refusal()
    assert "--allow-loss" in loss.refusal()


def test_texts_come_by_language_each_once(tmp_path):
    rows = [{"query": f"q {i}", "passage": "one", "language": "sw"} for i in range(MOST_TEXTS + 9)]
    rows.append({"query": "q", "passage": "p"})
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "x.jsonl").write_text(lines)
    found = texts_by_language(tmp_path)
    assert found["not said"] == ["q", "p"]
    assert len(found["sw"]) == MOST_TEXTS == len(set(found["sw"]))


def test_without_data_it_is_the_embedded_corpus():
    found = texts_by_language(None)
    assert len(found) > 300
    assert set(map(len, found.values())) == {3}


def test_data_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        texts_by_language(tmp_path / "none")
