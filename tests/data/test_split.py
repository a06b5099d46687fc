"""What is held out has neither a document nor a query in common with what is trained on."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny_models import make_tokenizer
from helpers.tiny_runs import write_tokenized

from ml_embed.data.split import split_dataset
from ml_embed.data.store import open_store


def open_pairs(folder, queries: list[int], passages: list[int], documents: list[list[int]]):
    """A dataset `pairs` whose query number q is the token q + 3, and of `documents` as given."""
    write_tokenized(folder / "tokenized", make_tokenizer(), {"pairs": ("retrieval", 1, 1, (0, 0))})
    rows = {
        "query_input_ids": pa.array([[q + 3, 1] for q in queries], pa.list_(pa.int32())),
        "passage_doc_id": pa.array(passages, pa.int64()),
        "negative_doc_ids": pa.array([[] for _ in queries], pa.list_(pa.int64())),
    }
    pq.write_table(pa.table(rows), folder / "tokenized" / "pairs_query.parquet")
    corpus = pa.table({"input_ids": pa.array(documents, pa.list_(pa.int32()))})
    pq.write_table(corpus, folder / "tokenized" / "pairs_corpus.parquet")
    manifest = (folder / "tokenized" / "manifest.json").read_text()
    manifest = manifest.replace('"rows": 1', f'"rows": {len(queries)}')
    manifest = manifest.replace('"documents": 1', f'"documents": {len(documents)}')
    (folder / "tokenized" / "manifest.json").write_text(manifest)
    return open_store(folder / "tokenized", folder / "cache", progress=False).datasets["pairs"]


def texts(*numbers: int) -> list[list[int]]:
    return [[number + 3, 1] for number in numbers]


def parts(split) -> tuple[list[int], list[int]]:
    return split.training_rows(np.arange(split.train_rows)).tolist(), split.held_out.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_no_document_and_no_query_is_on_both_sides(tmp_path, seed):
    """400 rows: each document twice, every fifth query too."""
    queries = [row - 1 if row % 5 == 0 and row else row for row in range(400)]
    dataset = open_pairs(tmp_path, queries, [row % 200 for row in range(400)], texts(*range(200)))
    split = split_dataset(dataset, "retrieval", 0.1, seed)
    trained, held_out = parts(split)
    assert len(set(trained)) == len(trained)
    assert not {row % 200 for row in trained} & {row % 200 for row in held_out}
    assert not {queries[row] for row in trained} & {queries[row] for row in held_out}
    left_out = set(range(400)) - set(trained)
    assert len(left_out) == 40
    assert set(held_out) < left_out, "some rows are for neither: their query is trained on"
    others = {queries[row] for row in trained}
    assert {row for row in left_out if queries[row] not in others} == set(held_out)


def test_equal_texts_under_two_numbers_are_one_document(tmp_path):
    """As in the released layout, where ids name documents."""
    documents = texts(*range(50), *range(50))
    dataset = open_pairs(tmp_path, list(range(100)), list(range(100)), documents)
    trained, held_out = parts(split_dataset(dataset, "retrieval", 0.2, seed=0))
    assert (len(trained), len(held_out)) == (80, 20)
    assert not {row % 50 for row in trained} & {row % 50 for row in held_out}


def test_a_document_of_too_many_rows_is_passed_over(tmp_path):
    """Half of all rows have the passage 0: never held out, and enough others are."""
    passages = [0 if row % 2 else row for row in range(200)]
    dataset = open_pairs(tmp_path, list(range(200)), passages, texts(*range(200)))
    for seed in range(5):
        trained, held_out = parts(split_dataset(dataset, "retrieval", 0.1, seed))
        assert len(held_out) == 20
        assert all(passages[row] for row in held_out)
        assert sorted(trained + held_out) == list(range(200))


@pytest.mark.parametrize("task", ["retrieval", "clustering"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_something_is_left_to_train_on(tmp_path, rows, task):
    dataset = open_pairs(tmp_path, list(range(rows)), [0] * rows, texts(0))
    split = split_dataset(dataset, task, 0.5, seed=0)
    assert split.train_rows >= 1
    trained, held_out = parts(split)
    assert sorted(trained + held_out) == list(range(rows))


def test_the_seed_alone_decides(tmp_path):
    dataset = open_pairs(tmp_path, list(range(90)), list(range(90)), texts(*range(90)))
    first, again = (parts(split_dataset(dataset, "retrieval", 0.1, seed)) for seed in (1, 1))
    other = parts(split_dataset(dataset, "retrieval", 0.1, 2))
    assert first == again != other
    everything = split_dataset(dataset, "retrieval", 0, 1)
    assert (everything.train_rows, len(everything.held_out)) == (90, 0)
