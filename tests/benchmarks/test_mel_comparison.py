"""The comparison of the starts of token factors: its figures, and a real pretrained table."""

import importlib.util

import pytest
import torch
from helpers.tiny_models import make_tokenizer, write_model
from safetensors import safe_open

from ml_embed.benchmarks.mel_comparison import (
    PACKAGE,
    Measurement,
    compare_starts,
    markdown_table,
    packaged_model,
    pair_recall,
    weighted_error,
)
from ml_embed.errors import UserError
from ml_embed.model import factorize_table
from ml_embed.sample_data.corpus import load_articles

installed = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed"
)


def test_the_error_counts_each_token_as_often_as_it_occurs():
    table = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    cut = torch.tensor([[3.0, 0.0], [1.0, 0.0], [7.0, 7.0]])
    counts = torch.tensor([1.0, 5.0, 0.0])
    assert weighted_error(table, cut, counts) == pytest.approx(16 / (25 + 5))


def test_recall_looks_for_the_article_in_every_other_language():
    one = torch.eye(3)
    swapped = one[[1, 0, 2]]  # articles 0 and 1 exchanged
    assert pair_recall(torch.stack([one, one])) == 1
    assert pair_recall(torch.stack([one, swapped])) == pytest.approx(1 / 3)


def test_the_table_has_a_line_a_rank_and_the_uncut_model():
    rows = [Measurement(None, None, 0, 1, 0.5)]
    rows += [Measurement(start, 8, 0.25, 0.75, 0.125) for start in ("svd", "frequency")]
    lines = markdown_table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| 8 | 0.250 | 0.250 | 0.750")
    assert lines[3].startswith("| uncut | 0.000")


def test_at_the_full_rank_nothing_is_lost(tmp_path):
    pytest.importorskip("sentence_transformers")
    model = write_model(tmp_path / "model", make_tokenizer(), factorized=False)
    rows = compare_starts(model, [8, 64], progress=False)
    assert [(row.start, row.rank) for row in rows[1:]] == [
        (s, r) for s in ("svd", "frequency") for r in (8, 64)
    ]
    whole = rows[0].recall
    for row in rows[1:]:
        if row.rank == 64:
            assert row.error < 1e-9
            assert row.cosine == pytest.approx(1, abs=1e-4)
            assert row.recall == pytest.approx(whole, abs=1e-2)
        else:
            assert row.error > 0.1
            assert row.cosine < 0.99
    with pytest.raises(UserError, match="from 1 to 64"):
        compare_starts(model, [65], progress=False)


def test_folders_that_cannot_be_compared(tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(UserError, match=r"no modules\.json"):
        compare_starts(tmp_path, [8])


@installed
def test_frequency_loses_less_of_a_real_table_on_text_that_was_not_counted():
    """all-MiniLM-L6-v2's table; odd English articles are counted, even ones measured."""
    from transformers import AutoTokenizer

    folder = packaged_model()
    with safe_open(folder / "model.safetensors", "pt") as file:
        (name,) = [n for n in file.keys() if n.endswith("word_embeddings.weight")]  # noqa: SIM118
        table = file.get_tensor(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = {
        row["article"]: row["text"] for row in load_articles().to_pylist() if row["code"] == "eng"
    }
    counts = [
        torch.bincount(
            torch.tensor([i for a in numbers for i in tokenizer(texts[a]).input_ids]),
            minlength=len(table),
        )
        for numbers in (range(1, 31, 2), range(2, 31, 2))
    ]
    for rank in (64, 128):
        errors = {}
        for start, share in (("svd", None), ("frequency", (counts[0] + 1) / (counts[0] + 1).sum())):
            A, B = factorize_table(table, rank, share)
            errors[start] = weighted_error(table, A @ B, counts[1])
        assert errors["frequency"] < 0.85 * errors["svd"], errors
