"""Vectors in fewer bits: against loops, and as sentence-transformers searches them."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from ml_embed.evaluation.data import CandidateSet, CorpusSet
from ml_embed.evaluation.metrics import metrics_of_ranks
from ml_embed.evaluation.precisions import precision_rows, stored
from ml_embed.inference.precision import quantize
from ml_embed.reports.tables import precision_table

TEXTS, DIM, QUERIES = 60, 16, 12


@pytest.fixture
def vectors():
    """Texts 0 to 11 are queries, near to texts 12 to 23."""
    made = torch.randn(TEXTS, DIM, generator=torch.Generator().manual_seed(0))
    made[:QUERIES] = made[QUERIES : 2 * QUERIES] + made[:QUERIES]
    return normalize(made, dim=-1)


def test_bits_order_as_hamming_distances_do(vectors):
    bits = np.unpackbits(quantize(vectors.numpy(), "ubinary"), axis=1).astype(int)
    distance = np.abs(bits[:, None] - bits[None]).sum(2)
    left = stored(vectors, "binary")
    np.testing.assert_allclose((left @ left.T).numpy(), 1 - 2 * distance / DIM, atol=1e-6)


def test_integers_are_those_that_encode_gives(vectors):
    levels = quantize(vectors.numpy(), "uint8").astype(np.float64)
    least, greatest = vectors.numpy().min(0), vectors.numpy().max(0)
    middle = least + (levels + 0.5) * (greatest - least) / 255
    middle /= np.linalg.norm(middle, axis=1, keepdims=True)
    found = stored(vectors, "int8").numpy()
    # a value at the edge of two levels may fall to either by rounding
    assert np.abs(found - middle).max() < 2 * (greatest - least).max() / 255
    assert (np.abs(found - middle) < 1e-5).mean() > 0.99
    assert (found * vectors.numpy()).sum(1).min() > 0.999


def rank_by_loop(query, documents, right):
    """Of document `right`; a tie counts half."""
    scores = [float(query @ document) for document in documents]
    others = [s for i, s in enumerate(scores) if i != right]
    better = sum(s > scores[right] + 1e-6 for s in others)
    return 1 + better + sum(abs(s - scores[right]) <= 1e-6 for s in others) / 2


def corpus_set() -> CorpusSet:
    """The first texts search the others; no two are alike, and none says a language."""
    queries, none = torch.arange(QUERIES), torch.empty(0, 2, dtype=torch.int64)
    corpus = torch.arange(QUERIES, TEXTS)
    return CorpusSet("corpus", "all", queries, corpus, queries, none, (), none[:, 0], none)


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_metrics_are_those_of_a_loop(vectors, precision):
    queries, corpus = torch.arange(QUERIES), torch.arange(QUERIES, TEXTS)
    sets = [
        corpus_set(),
        CandidateSet("own", "all", queries, corpus.repeat(QUERIES, 1), torch.arange(QUERIES)),
    ]
    rows = precision_rows(vectors, {"dim": DIM}, sets)
    left = stored(vectors, precision).double()
    for asking, of_row in (
        (left, lambda row: row),
        (vectors.double(), lambda row: row["rescored"]),
    ):
        ranks = [rank_by_loop(asking[q], left[QUERIES:], q) for q in range(QUERIES)]
        expected = metrics_of_ranks(ranks)
        for row in (row for row in rows if row["precision"] == precision):
            assert {name: of_row(row)[name] for name in expected} == pytest.approx(expected)
    assert {row["bytes_per_vector"] for row in rows} == {64, 16, 2}


def test_the_table_puts_equal_bytes_together(vectors):
    sets = [corpus_set()]
    rows = []
    for dim in (4, 8, 16):
        unit = normalize(vectors[:, :dim], dim=-1)
        rows += precision_rows(unit, {"dim": dim}, sets)
    assert not any(row["dim"] == 4 and row["precision"] == "binary" for row in rows), "half a byte"
    lines = precision_table({"precisions": rows}, "recall@1").splitlines()
    sizes = [int(line.split()[3]) for line in lines[3:]]
    assert sizes == [64, 32, 16, 16, 8, 4, 2, 1]


def test_sentence_transformers_rescores_them(vectors):
    """Its own search takes what `precision="ubinary"` gives, and finds what exact search finds."""
    quantization = pytest.importorskip("sentence_transformers.util.quantization")
    pytest.importorskip("faiss")
    documents = vectors[QUERIES:].numpy()
    found, *_ = quantization.semantic_search_faiss(
        vectors[:QUERIES].numpy(),
        corpus_embeddings=quantize(documents, "ubinary"),
        corpus_precision="ubinary",
        top_k=1,
        rescore=True,
        rescore_multiplier=len(documents),
        exact=True,
    )
    signs = stored(vectors[QUERIES:], "binary")
    expected = (vectors[:QUERIES] @ signs.T).argmax(1).tolist()
    assert [hits[0]["corpus_id"] for hits in found] == expected
