"""A process's share of a global batch: the right texts, indices, weights and masks."""

import numpy as np
import pytest
import torch

from ml_embed.config import parse_config
from ml_embed.data.batch import slice_texts, token_chunks
from ml_embed.data.batch_builder import ID_BYTES, BatchBuilder, cut_to_length
from ml_embed.data.schedule import plan_dataset
from ml_embed.data.store import open_store

EOS = 1


@pytest.fixture(scope="module")
def store(world, tmp_path_factory):
    return open_store(world.tokenized, tmp_path_factory.mktemp("cache"), progress=False)


@pytest.fixture(scope="module")
def config(world):
    return parse_config(world.config())


def builder(process=0, processes=1, max_length=64, mask=True) -> BatchBuilder:
    return BatchBuilder(0, max_length, EOS, mask, process, processes)


def texts_of(batch) -> list[list[int]]:
    return [ids.tolist() for ids in batch.texts.input_ids.split(batch.texts.packed.lengths)]


def build(store, config, name="facts", rows=range(8), **settings):
    dataset = store.datasets[name]
    plan = plan_dataset(dataset, config)
    return dataset, builder(**settings).build(dataset, plan, np.array(rows), epoch=0)


def test_indices_point_to_the_rows_own_texts(store, config):
    dataset, batch = build(store, config)
    texts = texts_of(batch)
    for row in range(8):
        assert texts[batch.query[row]] == dataset.query(row).tolist()
        assert (
            texts[batch.passage[row]] == dataset.document(dataset.passage_documents[row]).tolist()
        )
        own = {tuple(dataset.document(d)) for d in dataset.negatives(row)}
        used = batch.negatives[row][batch.negative_weights[row] > 0]
        assert len(used) == min(2, len(dataset.negatives(row)))
        assert {tuple(texts[i]) for i in used} <= own


def test_texts_are_distinct_and_sorted_by_length(store, config):
    _, batch = build(store, config, "sentiment", range(10))
    texts = texts_of(batch)
    assert len(texts) == 12, "ten queries and the two labels, once each"
    assert len({tuple(text) for text in texts}) == len(texts)
    assert list(batch.texts.packed.lengths) == sorted(batch.texts.packed.lengths)


def test_tokens_are_counted_with_and_without_repetition(store, config):
    dataset, batch = build(store, config, "sentiment", range(10))
    labels = [
        len(dataset.document(d))
        for row in range(10)
        for d in (dataset.passage_documents[row], *dataset.negatives(row))
    ]
    assert batch.num_tokens == sum(len(dataset.query(row)) for row in range(10)) + sum(labels)
    assert batch.num_encoded_tokens == len(batch.texts.input_ids) < batch.num_tokens


def test_a_negative_that_is_the_own_positive_is_left_out(store, config):
    dataset, batch = build(store, config)
    row = next(r for r in range(8) if dataset.passage_documents[r] in dataset.negatives(r))
    same = batch.negatives[row] == batch.passage[row]
    assert batch.excluded_candidates[row, 1:][same].all()
    _, unmasked = build(store, config, mask=False)
    assert not unmasked.excluded_candidates[row, 1:][same].any()


def test_the_same_document_in_another_row_is_left_out(store, config):
    dataset, batch = build(store, config, rows=range(21))
    documents = np.asarray(dataset.passage_documents)
    expected = (documents[:, None] == documents[None, :]) & ~np.eye(21, dtype=bool)
    assert expected.any()
    assert np.array_equal(batch.excluded_passages.numpy(), expected)
    assert build(store, config, rows=range(21), mask=False)[1].excluded_passages is None


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_shares_put_together_are_the_batch_of_one_process(store, config, num_rows, processes):
    dataset, whole = build(store, config, rows=range(num_rows))
    shares = [
        build(store, config, rows=range(num_rows), process=p, processes=processes)[1]
        for p in range(processes)
    ]
    assert len({len(share.query) for share in shares}) == 1, "collectives need equal shapes"
    assert sum(share.sample_weights.sum() for share in shares) / processes == pytest.approx(1)
    assert sum(share.negative_weights.sum() for share in shares) / processes == pytest.approx(
        float(whole.negative_weights.sum() > 0), abs=1e-6
    )
    passages = [texts_of(share)[i] for share in shares for i in share.passage]
    gathered = [passages[i] for i in shares[0].gathered_rows]
    assert gathered == [texts_of(whole)[i] for i in whole.passage]
    for share in shares:
        texts = texts_of(share)
        for query, passage, target, weight in zip(
            share.query, share.passage, share.target, share.sample_weights, strict=True
        ):
            if weight > 0:
                assert gathered[target] == texts[passage]
                assert texts[query] == dataset.query(int(target)).tolist()
    assert sum(share.num_tokens for share in shares) == whole.num_tokens


def test_cut_texts_end_in_eos():
    def cut(*ids: int) -> list[int]:
        as_bytes = np.array(ids, np.int32).tobytes()
        return np.frombuffer(
            cut_to_length(as_bytes, 3 * ID_BYTES, np.int32(EOS).tobytes()), np.int32
        ).tolist()

    assert cut(5, 6, 7, EOS) == [5, 6, EOS]
    assert cut(5, 6, EOS) == [5, 6, EOS]


@pytest.mark.parametrize("budget", [1, 20, 50, 10_000])
def test_chunks_cover_all_texts_within_the_budget(store, config, budget):
    _, batch = build(store, config)
    chunks = token_chunks(batch.texts.packed, budget)
    assert [chunk[0] for chunk in chunks] == [0, *(chunk[1] for chunk in chunks[:-1])]
    pieces = [slice_texts(batch.texts, *chunk) for chunk in chunks]
    assert torch.equal(torch.cat([piece.input_ids for piece in pieces]), batch.texts.input_ids)
    assert all(len(p.input_ids) <= budget or len(p.packed.lengths) == 1 for p in pieces)
