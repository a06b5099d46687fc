"""The store against the lists it was made from, in both layouts; errors; concurrency."""

import errno
import json
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ml_embed.data import convert as convert_module
from ml_embed.data.document_ids import DocumentIds, hash_strings
from ml_embed.data.store import open_converted, open_store
from ml_embed.errors import UserError
from ml_embed.files import digests
from ml_embed.files.arrays import ArrayFile

QUERIES = [[1, 2, 9], [3, 9], [4, 4, 4, 9], [5, 9]]
DOCUMENTS = [[10, 9], [11, 12, 9], [13, 9], [14, 14, 9], [15, 9]]
PASSAGES = [0, 1, 0, 4]
NEGATIVES = [[1, 2], [], [3], [0, 1, 2]]


def write_own(folder: Path, name: str = "toy", **changes) -> Path:
    """One dataset in our own layout; `changes` replaces columns (by name) or manifest entries."""
    folder.mkdir(exist_ok=True)
    query = {
        "query_input_ids": pa.array(QUERIES, pa.list_(pa.int32())),
        "passage_doc_id": pa.array(PASSAGES, pa.int64()),
        "negative_doc_ids": pa.array(NEGATIVES, pa.list_(pa.int64())),
    }
    query |= {key: value for key, value in changes.items() if key in query}
    corpus = {"input_ids": changes.get("input_ids", pa.array(DOCUMENTS, pa.list_(pa.int32())))}
    pq.write_table(
        pa.table({k: v for k, v in query.items() if v is not None}),
        folder / f"{name}_query.parquet",
    )
    pq.write_table(pa.table(corpus), folder / f"{name}_corpus.parquet")
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) if path.exists() else {"datasets": {}}
    manifest |= {
        "format_version": 1,
        "eos_id": 9,
        "vocab_size": 20,
        "tokenizer_fingerprint": "f" * 64,
    }
    manifest["datasets"][name] = {
        "rows": len(query["query_input_ids"]),
        "documents": len(corpus["input_ids"]),
    }
    path.write_text(json.dumps(manifest | changes.get("manifest", {})))
    return folder


def write_released(folder: Path, names=("toy",), shared: bool = True) -> Path:
    """The same data in the released layout: documents in another order, their ids as strings."""
    folder.mkdir()
    order = [3, 0, 4, 2, 1]
    corpus = pa.table(
        {
            "doc_id": pa.array([f"doc-{i}" for i in order], pa.string()),
            "input_ids": pa.array([DOCUMENTS[i] for i in order], pa.list_(pa.int64())),
        }
    )
    for name in names:
        columns = {
            "query_input_ids": pa.array(QUERIES, pa.list_(pa.int64())),
            "passage_input_ids": pa.array([f"doc-{i}" for i in PASSAGES]),
        }
        for k in range(3):
            ids = [f"doc-{row[k]}" if k < len(row) else (None if k else "") for row in NEGATIVES]
            columns[f"negative_{k + 1}_input_ids"] = pa.array(ids, pa.string())
        columns["negative_4_input_ids"] = pa.nulls(len(QUERIES))
        pq.write_table(pa.table(columns), folder / f"{name}_query.parquet")
        if not shared:
            pq.write_table(corpus, folder / f"{name}_corpus.parquet")
    if shared:
        pq.write_table(corpus, folder / "corpus.parquet")
    return folder


def rows(dataset) -> list:
    """Everything a dataset says, with documents as their tokens."""
    return [
        (
            dataset.query(row).tolist(),
            dataset.document(dataset.passage_documents[row]).tolist(),
            [dataset.document(document).tolist() for document in dataset.negatives(row)],
        )
        for row in range(dataset.num_rows)
    ]


EXPECTED = [
    (query, DOCUMENTS[passage], [DOCUMENTS[i] for i in negatives])
    for query, passage, negatives in zip(QUERIES, PASSAGES, NEGATIVES, strict=True)
]


def expected_counts() -> np.ndarray:
    return np.bincount([token for text in QUERIES + DOCUMENTS for token in text])


def test_own_layout_gives_back_what_was_written(tmp_path):
    store = open_store(write_own(tmp_path / "data"), tmp_path / "cache", progress=False)
    dataset = store.datasets["toy"]
    assert rows(dataset) == EXPECTED
    assert (store.eos_id, store.max_token_id, store.manifest.vocab_size) == (9, 15, 20)
    assert dataset.query(0).dtype == dataset.document(0).dtype == np.int32
    assert dataset.query_lengths.tolist() == [3, 2, 4, 2]
    assert dataset.document_lengths.tolist() == [2, 3, 2, 3, 2]
    assert dataset.negative_offsets.tolist() == [0, 2, 2, 3, 6]
    assert not dataset.passage_documents.flags.writeable
    assert not dataset.document(0).flags.owndata
    np.testing.assert_array_equal(dataset.token_counts, expected_counts())


def test_blocks_are_joined_rightly(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "BLOCK_ROWS", 2)
    monkeypatch.setattr(convert_module, "COUNTED_DOCUMENTS", 2)
    own = open_store(write_own(tmp_path / "own"), tmp_path / "cache", progress=False)
    released = open_store(write_released(tmp_path / "released"), tmp_path / "cache", progress=False)
    for store in (own, released):
        assert rows(store.datasets["toy"]) == EXPECTED
        np.testing.assert_array_equal(store.datasets["toy"].token_counts, expected_counts())


@pytest.mark.parametrize("shared", [True, False])
def test_released_layout_equals_own_layout(tmp_path, shared):
    folder = write_released(tmp_path / "data", names=("b", "a"), shared=shared)
    store = open_store(folder, tmp_path / "cache", progress=False)
    assert list(store.datasets) == ["a", "b"]
    assert (store.manifest, store.eos_id, store.max_token_id) == (None, None, 15)
    for dataset in store.datasets.values():
        assert rows(dataset) == EXPECTED
        np.testing.assert_array_equal(dataset.token_counts, expected_counts())
    a, b = store.datasets.values()
    same = a.document(0).__array_interface__["data"] == b.document(0).__array_interface__["data"]
    assert same == shared


def test_counts_leave_out_documents_of_other_datasets(tmp_path):
    folder = write_released(tmp_path / "data", names=("a", "b"))
    # Query [3, 9], passage [11, 12, 9], no negatives.
    table = pq.read_table(folder / "a_query.parquet").slice(1, 1)
    pq.write_table(table, folder / "a_query.parquet")
    store = open_store(folder, tmp_path / "cache", progress=False)
    assert {i: n for i, n in enumerate(store.datasets["a"].token_counts) if n} == {
        3: 1,
        9: 2,
        11: 1,
        12: 1,
    }
    assert len(store.datasets["a"].token_counts) == 16


def test_dataset_without_negatives(tmp_path):
    folder = write_own(tmp_path / "data", negative_doc_ids=pa.array([[]] * 4, pa.list_(pa.int64())))
    dataset = open_store(folder, tmp_path / "cache", progress=False).datasets["toy"]
    assert [len(dataset.negatives(row)) for row in range(4)] == [0, 0, 0, 0]
    assert len(dataset.negative_documents) == 0


def test_second_opening_converts_nothing_and_a_change_converts_again(tmp_path, monkeypatch):
    folder = write_own(tmp_path / "data")
    first = open_store(folder, tmp_path / "cache", progress=False)
    monkeypatch.setattr(convert_module, "_convert_all", lambda *_: pytest.fail("converted again"))
    assert open_store(folder, tmp_path / "cache", progress=False).folder == first.folder
    monkeypatch.undo()
    write_own(folder, name="more")
    again = open_store(folder, tmp_path / "cache", progress=False)
    assert again.folder != first.folder
    assert list(again.datasets) == ["more", "toy"]


def test_a_cache_is_known_by_content_and_not_by_names_and_dates(tmp_path):
    """Another folder's data, or the same folder's with its dates set back, is other data."""
    one, other = write_own(tmp_path / "one"), write_own(tmp_path / "other")
    exchanged = pa.array([0, 0, 1, 4], pa.int64())
    open_store(one, tmp_path / "cache", progress=False)
    for folder in (one, other):
        dates = {path.name: path.stat().st_mtime_ns for path in one.iterdir()}
        size = (folder / "toy_query.parquet").stat().st_size
        write_own(folder, passage_doc_id=exchanged)
        for path in folder.iterdir():
            os.utime(path, ns=(dates.get(path.name, 0),) * 2)
        assert (folder / "toy_query.parquet").stat().st_size == size, "or sizes would tell"
        found = rows(open_store(folder, tmp_path / "cache", progress=False).datasets["toy"])
        assert [passage for _, passage, _ in found] == [DOCUMENTS[i] for i in (0, 0, 1, 4)]


def test_a_known_folder_is_not_read_again_unless_verified(tmp_path, caplog):
    caplog.set_level("INFO", "ml_embed")
    folder = write_own(tmp_path / "data")
    for verify, read in ((False, True), (False, False), (True, True)):
        time.sleep(0.06)  # a file that was just written is not taken for settled
        digests._file_digest.cache_clear()
        caplog.clear()
        open_store(folder, tmp_path / "cache", progress=False, verify=verify)
        assert ("read 2 files" in caplog.text) == read
    assert sorted(path.name for path in folder.glob(".*")) == [digests.MEMORY]


def test_digests_of_data_that_cannot_be_written_beside_are_remembered_in_the_cache(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", "ml_embed")
    folder, cache = write_own(tmp_path / "data"), tmp_path / "cache"
    make = digests.tempfile.mkstemp

    def read_only_data(suffix, prefix, place):
        if place == folder:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return make(suffix, prefix, place)

    monkeypatch.setattr(digests.tempfile, "mkstemp", read_only_data)
    time.sleep(0.06)  # a file that was just written is not taken for settled
    open_store(folder, cache, progress=False)
    assert not (folder / digests.MEMORY).exists()
    assert (cache / digests.MEMORY).is_file()
    digests._file_digest.cache_clear()
    caplog.clear()
    open_store(folder, cache, progress=False)
    assert "read 2 files" not in caplog.text


@pytest.mark.parametrize("where", ["query", "corpus"])
def test_a_file_that_is_not_the_manifests_is_named(tmp_path, where):
    folder = write_own(tmp_path / "data")
    path = folder / f"toy_{where}.parquet"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["datasets"]["toy"]["digests"] = {where: digests.file_digest(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    open_store(folder, tmp_path / "cache", progress=False)
    damaged = bytearray(path.read_bytes())
    damaged[40] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=rf"{path.name} is not the file .* its digest was"):
        open_store(folder, tmp_path / "cache", progress=False)


@pytest.mark.parametrize("file", ["document_tokens.npy", "scores.npy", "index.json"])
def test_a_flipped_bit_of_the_cache_is_noticed(tmp_path, file):
    folder = write_own(tmp_path / "data")
    path = open_store(folder, tmp_path / "cache", progress=False).folder / file
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    open_converted.cache_clear()
    with pytest.raises(UserError, match=f"{file} does not match its digest|is damaged"):
        open_store(folder, tmp_path / "cache", progress=False)


def test_damage_that_leaves_no_trace_in_the_dates_shows_with_verify(tmp_path, monkeypatch):
    """As of a disk that gives back other bytes than were written."""
    folder = write_own(tmp_path / "data")
    monkeypatch.setattr(digests, "_state", lambda path: f"1:{path.stat().st_ino}:1:1:1")
    monkeypatch.setattr(digests, "_SETTLED", 0)
    store = open_store(folder, tmp_path / "cache", progress=False)
    path = store.folder / "document_tokens.npy"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    digests._file_digest.cache_clear()
    open_store(folder, tmp_path / "cache", progress=False)
    with pytest.raises(UserError, match=r"document_tokens\.npy does not match its digest"):
        open_store(folder, tmp_path / "cache", progress=False, verify=True)


def test_pickle_passes_only_the_place(tmp_path):
    store = open_store(write_own(tmp_path / "data"), tmp_path / "cache", progress=False)
    for pickled in (pickle.dumps(store), pickle.dumps(store.datasets["toy"])):
        assert len(pickled) < 500
    assert rows(pickle.loads(pickle.dumps(store.datasets["toy"]))) == EXPECTED


@pytest.mark.alone
def test_opening_many_datasets_is_quick(tmp_path):
    """No file handle or map per dataset: hundreds of datasets open as fast as one."""
    for i in range(150):
        write_own(tmp_path / "data", name=f"set{i}")
    store = open_store(tmp_path / "data", tmp_path / "cache", progress=False)
    begin = time.perf_counter()
    again = pickle.loads(pickle.dumps(store))
    open_converted.cache_clear()
    fresh = open_store(tmp_path / "data", tmp_path / "cache", progress=False)
    assert time.perf_counter() - begin < 1.0
    assert len(fresh.datasets) == len(again.datasets) == 150
    assert rows(fresh.datasets["set149"]) == EXPECTED


def _open_and_sum(folder: Path, cache: Path, barrier, results) -> None:
    barrier.wait()
    store = open_store(folder, cache, progress=False)
    results.put((str(store.folder), int(store.datasets["toy"].token_counts.sum())))


def test_two_conversions_at_once(tmp_path):
    folder, cache = write_own(tmp_path / "data"), tmp_path / "cache"
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=_open_and_sum, args=(folder, cache, barrier, results))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    answers = {results.get(timeout=30) for _ in processes}
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert {total for _, total in answers} == {int(expected_counts().sum())}
    assert len(answers) == 1
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [Path(answers.pop()[0]).name]


def test_leftovers_of_a_killed_conversion_are_removed(tmp_path):
    folder, cache = write_own(tmp_path / "data"), tmp_path / "cache"
    name = open_store(folder, cache, progress=False).folder.name
    (cache / name / "index.json").unlink()
    (cache / name).rename(cache / f"{name}.partial-abc")
    store = open_store(folder, cache, progress=False)
    assert rows(store.datasets["toy"]) == EXPECTED
    assert not (cache / f"{name}.partial-abc").exists()


def test_full_disk_is_a_user_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, values):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ArrayFile, "append", full)
    with pytest.raises(UserError, match="no space left"):
        open_store(write_own(tmp_path / "data"), tmp_path / "cache", progress=False)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_damaged_cache_is_named(tmp_path):
    folder = write_own(tmp_path / "data")
    store = open_store(folder, tmp_path / "cache", progress=False)
    open_converted.cache_clear()
    tokens = store.folder / "document_tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-8])
    with pytest.raises(UserError, match="damaged"):
        open_store(folder, tmp_path / "cache", progress=False)


int32_lists = pa.list_(pa.int32())
int64_lists = pa.list_(pa.int64())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"query_input_ids": pa.array([[1], [2], [], [3]], int32_lists)},
            r"'query_input_ids' has no tokens in row 2",
        ),
        (
            {"query_input_ids": pa.array([[1], [2, 3], [4, -7], [3]], int32_lists)},
            r"token id -7 in row 2",
        ),
        ({"query_input_ids": pa.array([[1], None, [2], [3]], int32_lists)}, r"null in row 1"),
        (
            {"query_input_ids": pa.array([[1], [2], [3], [4, None]], int32_lists)},
            r"null in the list of row 3",
        ),
        ({"query_input_ids": pa.array(["a", "b", "c", "d"])}, r"'query_input_ids' is string"),
        (
            {"input_ids": pa.array([[1], [2], [1 << 30], [3], [4]], int32_lists)},
            r"token id 1073741824 in row 2",
        ),
        ({"passage_doc_id": pa.array([0, 1, 5, 2])}, r"'passage_doc_id' names document 5 in row 2"),
        ({"passage_doc_id": pa.array([0, None, 1, 2])}, r"'passage_doc_id' is null in row 1"),
        (
            {"negative_doc_ids": pa.array([[], [1], [0, -1], []], int64_lists)},
            r"names document -1 in row 2",
        ),
        (
            {"negative_doc_ids": None},
            r"no column 'negative_doc_ids'; its columns are 'query_input_ids'",
        ),
        ({"input_ids": pa.array([], int32_lists)}, r"toy_corpus.parquet has no rows"),
        ({"manifest": {"format_version": 7}}, r"format version 7"),
        (
            {"manifest": {"datasets": {"toy": {"rows": 3, "documents": 5}}}},
            r"has 4 rows, but the manifest promises 3",
        ),
        ({"manifest": {"datasets": {}}}, r"does not list toy_query.parquet"),
        ({"manifest": {"datasets": {"toy": []}}}, r"manifest.json is damaged"),
        ({"manifest": {"datasets": {"toy": {"rows": "4"}}}}, r'rows cannot be "4"'),
        ({"manifest": {"eos_id": True}}, r"eos_id cannot be true\); run tokenize"),
    ],
)
def test_wrong_data_is_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        open_store(write_own(tmp_path / "data", **changes), tmp_path / "cache", progress=False)


@pytest.mark.parametrize("text", ["", "5", "[]", "[" * 100_000, '{"eos_id": ' + "9" * 5000 + "}"])
def test_manifests_that_are_none(tmp_path, text):
    folder = write_own(tmp_path / "data")
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json is damaged .*tokenize_data_qwen"):
        open_store(folder, tmp_path / "cache", progress=False)


@pytest.mark.parametrize("write", [write_own, write_released])
def test_columns_that_stand_twice(tmp_path, write):
    for number, path in enumerate(sorted(write(tmp_path / "data").glob("*.parquet"))):
        table = pq.read_table(path)
        for name in table.schema.names:
            if name == "negative_4_input_ids":
                continue
            pq.write_table(table.append_column(name, table.column(name)), path)
            with pytest.raises(UserError, match=f"{path.name} has several columns '{name}'"):
                open_store(path.parent, tmp_path / f"cache-{number}", progress=False)
        pq.write_table(table, path)


def test_ids_that_are_not_utf8(tmp_path):
    folder = write_released(tmp_path / "data")
    path = folder / "toy_query.parquet"
    table = pq.read_table(path)
    column = table.schema.get_field_index("passage_input_ids")
    broken = pa.array([b"doc-0", b"\xff\xfe", b"doc-1", b"doc-2"]).view(pa.string())
    pq.write_table(table.set_column(column, "passage_input_ids", broken), path)
    with pytest.raises(UserError, match=r"toy_query\.parquet is not a readable parquet file"):
        open_store(folder, tmp_path / "cache", progress=False)


def test_missing_files_are_named(tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match="does not exist"):
        open_store(tmp_path / "nowhere", cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \*_query.parquet"):
        open_store(tmp_path / "empty", cache)
    own = write_own(tmp_path / "own")
    (own / "toy_corpus.parquet").write_bytes(b"PAR1 this is no parquet file")
    with pytest.raises(UserError, match=r"toy_corpus.parquet is not a readable parquet file"):
        open_store(own, cache, progress=False)
    (own / "toy_corpus.parquet").unlink()
    with pytest.raises(UserError, match=r"toy_corpus.parquet is missing"):
        open_store(own, cache)
    released = write_released(tmp_path / "released")
    (released / "corpus.parquet").unlink()
    with pytest.raises(UserError, match=r"no corpus for .*toy_query.parquet"):
        open_store(released, cache)


def test_unfinished_tokenization_is_not_taken_for_the_released_layout(tmp_path):
    folder = write_own(tmp_path / "data")
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="was not finished"):
        open_store(folder, tmp_path / "cache")


def test_unknown_document_id_is_named(tmp_path):
    folder = write_released(tmp_path / "data")
    table = pq.read_table(folder / "toy_query.parquet").to_pydict()
    table["negative_2_input_ids"][3] = "doc-77"
    pq.write_table(pa.table(table), folder / "toy_query.parquet")
    with pytest.raises(UserError, match=r"'negative_2_input_ids' names document 'doc-77' in row 3"):
        open_store(folder, tmp_path / "cache", progress=False)


@pytest.mark.parametrize("same", [True, False])
def test_repeated_document_ids(tmp_path, same):
    """A repeated id is harmless if its document is the same, an error otherwise."""
    folder = write_released(tmp_path / "data")
    table = pq.read_table(folder / "corpus.parquet")
    again = pa.table({"doc_id": ["doc-0"], "input_ids": [DOCUMENTS[0 if same else 1]]})
    pq.write_table(pa.concat_tables([table, again]), folder / "corpus.parquet")
    if same:
        dataset = open_store(folder, tmp_path / "cache", progress=False).datasets["toy"]
        assert rows(dataset) == EXPECTED
        assert dataset.passage_documents[0] == 1
    else:
        with pytest.raises(
            UserError, match="rows 1 and 5 have the same 'doc_id' but different tokens"
        ):
            open_store(folder, tmp_path / "cache", progress=False)


def test_the_released_layout_with_string_views(tmp_path):
    folder = write_released(tmp_path / "data")
    expected = rows(open_store(folder, tmp_path / "cache", progress=False).datasets["toy"])
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path)
        kinds = [
            pa.string_view() if pa.types.is_string(kind) else kind for kind in table.schema.types
        ]
        views = zip(table.columns, kinds, strict=True)
        arrays = [column.cast(kind) for column, kind in views]
        pq.write_table(pa.table(arrays, names=table.column_names), path)
    store = open_store(folder, tmp_path / "other", progress=False)
    assert rows(store.datasets["toy"]) == expected


def test_document_ids_against_a_dictionary():
    rng = np.random.default_rng(0)
    names = ["", "a", "a\0", "\0", "é", "a" * 300] + [
        f"{rng.integers(1 << 40):x}" for _ in range(5000)
    ]
    ids = DocumentIds()
    ids.add(pa.array(names[:7]))
    ids.add(pa.array(names, pa.large_string()).slice(7))
    assert len(ids.finish()) == 0
    rng.shuffle(order := list(range(len(names))))
    assert ids.rows_of(pa.array([names[i] for i in order])).tolist() == order
    assert ids.rows_of(pa.array(["b", "aa", "a" * 301])).tolist() == [-1, -1, -1]
    assert len(np.unique(hash_strings(pa.array(names)))) == len(names)


@pytest.mark.parametrize("pieces", [[], [0], [3, 0, 2]])
def test_array_file_is_a_plain_npy_file(tmp_path, pieces):
    file = ArrayFile(tmp_path / "x.npy", np.int32)
    for length in pieces:
        file.append(np.arange(length, dtype=np.int64))
    np.testing.assert_array_equal(file.mapped(), [i for length in pieces for i in range(length)])
    file.close()
    loaded = np.load(tmp_path / "x.npy", allow_pickle=False)
    assert loaded.dtype == np.int32
    assert loaded.tolist() == [i for length in pieces for i in range(length)]
