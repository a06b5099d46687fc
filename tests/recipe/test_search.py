"""Exact search in chunks, and the approximate one, against the sorted matrix of all dot
products."""

import numpy as np
import pytest
import torch

from ml_embed.errors import UserError
from ml_embed.recipe import ann
from ml_embed.recipe.ann import ApproximateIndex, Approximation
from ml_embed.recipe.search import nearest

WIDTH = 16


def sorted_scores(queries, documents, excluded):
    scores = queries @ torch.from_numpy(documents).T
    scores[excluded[:, 0], excluded[:, 1]] = -torch.inf
    return scores.sort(dim=1, descending=True)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_search_in_chunks_is_the_whole_search(chunk):
    generator = torch.Generator().manual_seed(0)
    queries, documents = (
        torch.randn(5, 8, generator=generator),
        torch.randn(40, 8, generator=generator),
    )
    excluded = torch.tensor([[0, 3], [0, 39], [4, 0]])
    expected, rows = sorted_scores(queries, documents.numpy(), excluded)
    best, found = nearest(queries, documents.numpy(), 12, excluded, chunk)
    torch.testing.assert_close(best, expected[:, :12])
    assert torch.equal(found, rows[:, :12])


@pytest.fixture(scope="module")
def clustered():
    """(20, D) queries and (3000, D) documents of unit length around 60 centres."""
    pytest.importorskip("faiss")
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(60, WIDTH))

    def draw(count):
        vectors = centres[generator.integers(60, size=count)] + 0.5 * generator.normal(
            size=(count, WIDTH)
        )
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    return torch.from_numpy(draw(20)), draw(3000)


@pytest.fixture(scope="module")
def excluded(clustered):
    """Of query 0 its 50 nearest documents, which all candidates would be; of query 7 its
    nearest."""
    queries, documents = clustered
    order = (queries @ torch.from_numpy(documents).T).argsort(dim=1, descending=True)
    return torch.tensor([[0, int(row)] for row in order[0, :50]] + [[7, int(order[7, 0])]])


@pytest.mark.parametrize("code_bits", [8, 4])
def test_with_all_cells_the_approximate_search_is_exact(
    clustered, excluded, tmp_path, monkeypatch, code_bits
):
    """Also where few candidates are scored at a time, and codes are made block by block."""
    queries, documents = clustered
    monkeypatch.setattr(ann, "SCORED_FLOATS", 3 * 30 * WIDTH)
    monkeypatch.setattr(ann, "BLOCK", 700)
    index = ApproximateIndex(
        tmp_path, documents, Approximation(nprobe=10**6, code_bits=code_bits), progress=False
    )
    expected, rows = nearest(queries, documents, 10, excluded)
    scores, found = index.nearest(queries, documents, 10, excluded)
    torch.testing.assert_close(scores, expected)
    assert torch.equal(found, rows)
    assert ann.recall(index.nearest, queries, documents, 10, excluded) == 1


def test_shorter_codes_find_less(clustered, excluded, tmp_path):
    queries, documents = clustered
    index = ApproximateIndex(
        tmp_path, documents, Approximation(nprobe=10**6, code_bits=2), progress=False
    )
    assert 0.9 < ann.recall(index.nearest, queries, documents, 10, excluded) < 1
    bytes_of_code = (tmp_path / "codes.bin").stat().st_size / len(documents)
    assert bytes_of_code == WIDTH * 2 / 8 + 1, "and a byte that names one of 219 cells"


def test_with_few_cells_most_neighbours_are_found_and_every_score_is_exact(
    clustered, excluded, tmp_path
):
    queries, documents = clustered
    index = ApproximateIndex(tmp_path, documents, Approximation(nprobe=3), progress=False)
    scores, found = index.nearest(queries, documents, 10, excluded)
    exact = (queries @ torch.from_numpy(documents).T).gather(1, found)
    torch.testing.assert_close(scores, exact)
    assert (scores.diff(dim=1) <= 0).all(), "best first"
    _, rows = sorted_scores(queries, documents, excluded)
    hits = [
        len(set(a) & set(b)) for a, b in zip(rows[:, :10].tolist(), found.tolist(), strict=True)
    ]
    share = sum(hits) / 200
    assert index.cells == 219, "4 sqrt(3000)"
    assert 0.6 < share < 1
    assert ann.recall(index.nearest, queries, documents, 10, excluded) == pytest.approx(share)


def test_where_cells_hold_too_few_the_rest_is_marked(clustered, excluded, tmp_path):
    queries, documents = clustered
    index = ApproximateIndex(tmp_path, documents, Approximation(nprobe=1), progress=False)
    scores, found = index.nearest(queries, documents, 200, excluded)
    real = scores > -torch.inf
    assert 0 < real.sum() < real.numel()
    for row, there in zip(found, real, strict=True):
        assert len(row[there].unique()) == there.sum(), "no document twice"
    assert not set(found[0][real[0]].tolist()) & set(excluded[:50, 1].tolist())
    assert ann.recall(index.nearest, queries, documents, 200, excluded) == pytest.approx(
        int(real.sum()) / 4000, abs=0.25
    )


def test_the_same_documents_give_the_same_index(clustered, tmp_path):
    _, documents = clustered
    files = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        ApproximateIndex(folder, documents, Approximation(), progress=False)
        files.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert len(files[0]) == 4, "cells, codes, and two notes of which codes are done"
    assert files[0] == files[1]


def test_product_codes_need_a_length_that_four_divides(tmp_path):
    pytest.importorskip("faiss")
    with pytest.raises(UserError, match="that 4 divides, not 6; take 4 or 8"):
        ApproximateIndex(
            tmp_path, np.eye(6, dtype=np.float32), Approximation(code_bits=2), progress=False
        )
    assert not list(tmp_path.iterdir())


def test_the_recall_is_measured_with_distinct_queries():
    assert ann.sample_queries(7).tolist() == list(range(7))
    sample = ann.sample_queries(10_000)
    assert len(sample) == len(set(sample.tolist())) == ann.MEASURED_QUERIES
    assert sample.max() > 9_000
