"""Raw files to token files: contents, determinism, continuing, and errors that say where."""

import errno
import hashlib
import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from filelock import FileLock
from helpers import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ml_embed.commands import tokenize
from ml_embed.config import DatasetConfig
from ml_embed.data.manifest import Manifest
from ml_embed.data.store import open_store
from ml_embed.errors import UserError
from ml_embed.files.digests import sealed
from ml_embed.prepare import raw_parquet, tokenization
from ml_embed.prepare.numbering import TextNumbers, text_digest
from ml_embed.prepare.raw import (
    RawDataset,
    check_and_count_rows,
    list_raw_datasets,
    read_row_batches,
    read_rows,
    task_of_raw,
)
from ml_embed.prepare.summary import language_table
from ml_embed.prepare.tokenization import TokenizeOptions, select_rows, tokenize_folder
from ml_embed.prepare.tokenizer import append_eos_template, fingerprint, load_tokenizer

ROWS = [
    ("what is a cat", "a small animal", ["a stone", "a river of ice"]),
    ("was ist ein Hund", "ein Tier", []),
    ("what is a pebble", "a stone", ["a small animal"]),
    ("a stone", "a small animal", ["ein Tier", "a stone", "a stone"]),
    ("猫とは何ですか", "小さな動物 " * 60, ["a river of ice"]),
]
# Documents by first occurrence: each row's passage, then its negatives.
DOCUMENTS = ["a small animal", "a stone", "a river of ice", "ein Tier", "小さな動物 " * 60]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(DOCUMENTS, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def write_raw(
    folder: Path, name: str = "toy", rows=ROWS, form: str = "list", suffix: str = ".parquet"
) -> Path:
    """Rows as one raw file; `form` "list" has a column negatives, "numbered" has negative_1 ...
    negative_K."""
    folder.mkdir(exist_ok=True)
    records = []
    width = max(len(negatives) for _, _, negatives in rows)
    for query, passage, negatives in rows:
        record = {"query": query, "passage": passage}
        if form == "list":
            record["negatives"] = negatives
        else:
            record |= {
                f"negative_{k + 1}": negatives[k] if k < len(negatives) else None
                for k in range(width)
            }
        records.append(record)
    path = folder / f"{name}{suffix}"
    if suffix == ".parquet":
        table = pa.Table.from_pylist(records)
        pq.write_table(table, path, row_group_size=2)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def options(tokenizer_folder, tmp_path, **changes) -> TokenizeOptions:
    values = {
        "input": tmp_path / "raw",
        "output": tmp_path / "tokens",
        "max_seq_length": 32,
    } | changes
    return TokenizeOptions(str(tokenizer_folder), **values)


def contents(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if not path.name.startswith(".")
    }


def test_everything_written_is_right(tokenizer_folder, tmp_path):
    write_raw(tmp_path / "raw", "imdb")
    manifest = tokenize_folder(options(tokenizer_folder, tmp_path), progress=False).to_json()
    tokenizer = load_tokenizer(tokenizer_folder)

    def expected(texts):
        return [[*tokenizer(text).input_ids[:31], tokenizer.eos_token_id] for text in texts]

    table = pq.read_table(tmp_path / "tokens/imdb_query.parquet")
    assert table.schema.types == [pa.list_(pa.int32()), pa.int64(), pa.list_(pa.int64())]
    assert table.to_pydict() == {
        "query_input_ids": expected([query for query, _, _ in ROWS]),
        "passage_doc_id": [DOCUMENTS.index(passage) for _, passage, _ in ROWS],
        "negative_doc_ids": [
            [DOCUMENTS.index(text) for text in negatives] for _, _, negatives in ROWS
        ],
    }
    corpus = pq.read_table(tmp_path / "tokens/imdb_corpus.parquet")
    assert corpus.schema.types == [pa.list_(pa.int32())]
    assert corpus.to_pydict() == {"input_ids": expected(DOCUMENTS)}
    assert max(map(len, expected(DOCUMENTS))) == 32  # one was cut

    text = json.dumps(sealed(manifest), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert (tmp_path / "tokens/manifest.json").read_text() == text
    source = (tmp_path / "raw/imdb.parquet").read_bytes()
    assert manifest["datasets"]["imdb"] == {
        "rows": 5,
        "documents": 5,
        "tokens": sum(map(len, expected([query for query, _, _ in ROWS] + DOCUMENTS))),
        "negatives": {"min": 0, "max": 3, "total": 7},
        "task": "classification",
        "source": {
            "file": "imdb.parquet",
            "bytes": len(source),
            "sha256": hashlib.sha256(source).hexdigest(),
        },
        "bytes": {
            kind: (tmp_path / f"tokens/imdb_{kind}.parquet").stat().st_size
            for kind in ("query", "corpus")
        },
        "digests": {
            kind: xxhash.xxh3_128_hexdigest((tmp_path / f"tokens/imdb_{kind}.parquet").read_bytes())
            for kind in ("query", "corpus")
        },
        "texts_cut": {"queries": 0, "documents": 1},
    }
    del manifest["datasets"]
    assert manifest == {
        "format_version": 2,
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
        "vocab_size": len(tokenizer),
        "max_seq_length": 32,
        "max_samples": 80_000,
        "seed": 42,
    }


def test_store_reads_it_back(tokenizer_folder, tmp_path):
    write_raw(tmp_path / "raw")
    tokenize_folder(options(tokenizer_folder, tmp_path, max_seq_length=256), progress=False)
    store = open_store(tmp_path / "tokens", tmp_path / "cache", progress=False)
    tokenizer = load_tokenizer(tokenizer_folder)
    dataset = store.datasets["toy"]
    read = [
        (
            dataset.query(i),
            dataset.document(dataset.passage_documents[i]),
            *map(dataset.document, dataset.negatives(i)),
        )
        for i in range(dataset.num_rows)
    ]
    decoded = [[tokenizer.decode(ids[:-1]) for ids in texts] for texts in read]
    assert decoded == [[query, passage, *negatives] for query, passage, negatives in ROWS]


@pytest.mark.parametrize(
    ("form", "suffix"), [("numbered", ".parquet"), ("list", ".jsonl"), ("numbered", ".jsonl")]
)
def test_all_raw_forms_give_the_same_bytes(tokenizer_folder, tmp_path, form, suffix):
    outputs = []
    for i, kind in enumerate([("list", ".parquet"), (form, suffix)]):
        folder = write_raw(tmp_path / f"raw{i}", form=kind[0], suffix=kind[1])
        tokenize_folder(
            options(tokenizer_folder, tmp_path, input=folder, output=tmp_path / f"out{i}"),
            progress=False,
        )
        outputs.append(contents(tmp_path / f"out{i}"))
        outputs[-1].pop("manifest.json")  # names the source
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 2


def test_tokenizer_saved_with_eos_gives_the_same_bytes(tokenizer_folder, tmp_path):
    write_raw(tmp_path / "raw")
    tokenizer = load_tokenizer(tokenizer_folder)
    append_eos_template(tokenizer)
    tokenizer.save_pretrained(tmp_path / "with_eos")
    tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    tokenize_folder(
        options(tmp_path / "with_eos", tmp_path, output=tmp_path / "again"), progress=False
    )
    assert contents(tmp_path / "tokens") == contents(tmp_path / "again")


def test_script_gives_the_same_bytes_with_one_worker_as_with_all_cores(tokenizer_folder, tmp_path):
    rows = [
        (f"query {i}", f"passage {i % 70}", [f"negative {i * k}" for k in range(i % 4)])
        for i in range(300)
    ]
    write_raw(tmp_path / "raw", "many", rows)
    flags = {
        "--tokenizer": tokenizer_folder, "--input": tmp_path / "raw",
        "--output": tmp_path / "script", "--max-seq-length": 16, "--max-samples": 100,
        "--num-workers": 1, "--seed": 1,
    }  # fmt: skip
    # A process of its own: the number of threads is fixed by the first batch in a process.
    command = [
        sys.executable,
        "tokenize_data_qwen.py",
        *(str(part) for flag in flags.items() for part in flag),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "1 datasets, 100 rows" in done.stdout
    assert "many" in done.stderr  # its progress bar
    same = options(tokenizer_folder, tmp_path, max_seq_length=16, max_samples=100, seed=1)
    tokenize_folder(same, progress=False)
    assert contents(tmp_path / "tokens") == contents(tmp_path / "script")


def test_script_reports_a_user_error_without_traceback(
    tokenizer_folder, tmp_path, monkeypatch, capsys
):
    flags = [
        "--tokenizer",
        tokenizer_folder,
        "--input",
        tmp_path / "nowhere",
        "--output",
        tmp_path / "out",
    ]
    monkeypatch.setattr(sys, "argv", ["tokenize_data_qwen.py", *map(str, flags)])
    assert runpy.run_path(str(ROOT / "tokenize_data_qwen.py"))["main"]() == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: raw data folder")
    assert str(tmp_path / "nowhere") in printed
    assert not (tmp_path / "out").exists()


def test_blocks_do_not_change_the_result(tokenizer_folder, tmp_path, monkeypatch):
    write_raw(tmp_path / "raw")
    tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    monkeypatch.setattr(tokenization, "BLOCK_TEXTS", 1)
    monkeypatch.setattr(raw_parquet, "BATCH_ROWS", 1)
    tokenize_folder(options(tokenizer_folder, tmp_path, output=tmp_path / "small"), progress=False)
    for kind in ("query", "corpus"):
        one, other = (
            pq.read_table(tmp_path / folder / f"toy_{kind}.parquet")
            for folder in ("tokens", "small")
        )
        assert one.equals(other)
    assert pq.ParquetFile(tmp_path / "small/toy_query.parquet").num_row_groups == len(ROWS)


def test_max_samples_is_a_seeded_choice_in_file_order(tokenizer_folder, tmp_path):
    rows = [(f"query {i}", f"passage {i}", []) for i in range(40)]
    texts = {}
    for name, suffix in (("a", ".parquet"), ("b", ".jsonl")):
        write_raw(tmp_path / "raw", name, rows, suffix=suffix)
    for seed in (1, 2):
        output = tmp_path / f"seed{seed}"
        tokenize_folder(
            options(tokenizer_folder, tmp_path, max_samples=10, seed=seed, output=output),
            progress=False,
        )
        tokenizer = load_tokenizer(tokenizer_folder)
        for name in ("a", "b"):
            queries = pq.read_table(output / f"{name}_query.parquet")["query_input_ids"].to_pylist()
            kept = [int(tokenizer.decode(ids[:-1]).removeprefix("query ")) for ids in queries]
            assert kept == select_rows(name, 40, 10, seed).tolist() == sorted(set(kept))
            assert len(kept) == 10
            texts[seed, name] = kept
    assert len({tuple(kept) for kept in texts.values()}) == 4
    assert select_rows("a", 10, 10, 0) is select_rows("a", 99, 0, 0) is None


# --- continuing and refusing


def test_interrupted_run_is_continued(tokenizer_folder, tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        write_raw(tmp_path / "raw", name, [(f"{name} {query}", p, n) for query, p, n in ROWS])
    whole = options(tokenizer_folder, tmp_path, output=tmp_path / "whole")
    tokenize_folder(whole, progress=False)

    original, made = tokenization._tokenize_dataset, []

    def interrupted(name, *arguments):
        made.append(name)
        if made == ["a", "b"]:
            # As after a kill: one file has its final name, the other is half written, nothing is
            # recorded.
            (tmp_path / "tokens/b_query.parquet").write_bytes(b"PAR1")
            (tmp_path / "tokens/.b_corpus.parquet.partial").write_bytes(b"PAR1")
            raise KeyboardInterrupt
        return original(name, *arguments)

    monkeypatch.setattr(tokenization, "_tokenize_dataset", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    assert not (tmp_path / "tokens/manifest.json").exists()
    (tmp_path / "tokens/b_query.parquet").unlink()
    with pytest.raises(UserError, match="was not finished"):
        open_store(tmp_path / "tokens", tmp_path / "cache")
    (tmp_path / "tokens/b_query.parquet").write_bytes(b"PAR1")
    tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    assert made == ["a", "b", "b", "c"]
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")


def test_bad_row_leaves_no_half_written_file_and_is_continued(tokenizer_folder, tmp_path):
    write_raw(tmp_path / "raw", "a")
    write_raw(tmp_path / "raw", "b", [*ROWS, ("query", "", [])])
    with pytest.raises(UserError, match=r"b\.parquet, row 5: 'passage' is empty"):
        tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    assert contents(tmp_path / "tokens").keys() == {
        "a_query.parquet",
        "a_corpus.parquet",
        "manifest.partial.jsonl",
    }
    write_raw(tmp_path / "raw", "b")
    tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    tokenize_folder(options(tokenizer_folder, tmp_path, output=tmp_path / "whole"), progress=False)
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")


def interrupt_in(tokenizer_folder, tmp_path, monkeypatch, stopping: str, **changes) -> None:
    """Tokenize, and stop in the dataset `stopping` as a kill does: one file whole, the other half
    written."""

    def interrupted(name, *arguments):
        if name == stopping:
            (tmp_path / f"tokens/{name}_query.parquet").write_bytes(b"PAR1")
            (tmp_path / f"tokens/.{name}_corpus.parquet.partial").write_bytes(b"PAR1")
            raise KeyboardInterrupt
        return original(name, *arguments)

    original = tokenization._tokenize_dataset
    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "_tokenize_dataset", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokenize_folder(options(tokenizer_folder, tmp_path, **changes), progress=False)


@pytest.mark.parametrize("case", ["plain", "another is added", "overwritten twice"])
def test_an_unfinished_dataset_that_leaves_the_input_leaves_nothing(
    tokenizer_folder, tmp_path, monkeypatch, case
):
    overwrite = case == "overwritten twice"
    for name in ("a", "b"):
        write_raw(tmp_path / "raw", name)
    if overwrite:
        tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    write_raw(tmp_path / "raw", "d")
    interrupt_in(tokenizer_folder, tmp_path, monkeypatch, "d", overwrite=overwrite)
    (tmp_path / "raw/d.parquet").unlink()
    if case == "another is added":
        write_raw(tmp_path / "raw", "c")
    tokenize_folder(options(tokenizer_folder, tmp_path, overwrite=overwrite), progress=False)
    tokenize_folder(options(tokenizer_folder, tmp_path, output=tmp_path / "whole"), progress=False)
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")
    assert "b" in open_store(tmp_path / "tokens", tmp_path / "cache", progress=False).datasets


def test_two_unfinished_datasets_are_both_continued(tokenizer_folder, tmp_path, monkeypatch):
    for name in ("a", "d"):
        write_raw(tmp_path / "raw", name)
    interrupt_in(tokenizer_folder, tmp_path, monkeypatch, "d")
    for name in ("b", "c"):
        write_raw(tmp_path / "raw", name)
    interrupt_in(
        tokenizer_folder, tmp_path, monkeypatch, "c"
    )  # b is made, and must not make d forgotten
    tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    tokenize_folder(options(tokenizer_folder, tmp_path, output=tmp_path / "whole"), progress=False)
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")


def test_second_run_writes_nothing_and_a_new_dataset_is_added(
    tokenizer_folder, tmp_path, monkeypatch
):
    write_raw(tmp_path / "raw", "a")
    tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").glob("[!.]*")}
    assert len(times) == 3
    tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    write_raw(tmp_path / "raw", "b")
    manifest = tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    assert list(manifest.datasets) == ["a", "b"]
    a_query = tmp_path / "tokens/a_query.parquet"
    assert a_query.stat().st_mtime_ns == times[a_query]
    assert not (tmp_path / "tokens/manifest.partial.jsonl").exists()


def test_damaged_output_is_made_again(tokenizer_folder, tmp_path):
    write_raw(tmp_path / "raw", "a")
    tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    before = contents(tmp_path / "tokens")
    (tmp_path / "tokens/a_corpus.parquet").write_bytes(b"PAR1")
    tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    assert contents(tmp_path / "tokens") == before


def test_other_settings_or_sources_are_refused_unless_overwritten(tokenizer_folder, tmp_path):
    write_raw(tmp_path / "raw", "a")
    write_raw(tmp_path / "raw", "gone")
    tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    foreign = tmp_path / "tokens/notes.txt"
    foreign.write_text("mine")
    before = contents(tmp_path / "tokens")
    with pytest.raises(UserError, match="max_seq_length was 32, now 16; seed was 42, now 1"):
        tokenize_folder(
            options(tokenizer_folder, tmp_path, max_seq_length=16, seed=1), progress=False
        )
    write_raw(tmp_path / "raw", "a", ROWS[:2])
    with pytest.raises(UserError, match="'a' made from another file"):
        tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    write_raw(tmp_path / "raw", "a")
    (tmp_path / "raw/gone.parquet").unlink()
    with pytest.raises(UserError, match="'gone', which the input does not have"):
        tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    assert contents(tmp_path / "tokens") == before
    changed = options(tokenizer_folder, tmp_path, max_seq_length=16, overwrite=True)
    assert tokenize_folder(changed, progress=False).max_seq_length == 16
    after = contents(tmp_path / "tokens")
    assert after.keys() == {"a_query.parquet", "a_corpus.parquet", "manifest.json", "notes.txt"}
    assert foreign.read_text() == "mine"


def interrupt_overwriting(tokenizer_folder, tmp_path, monkeypatch):
    """Datasets a, b, c and gone in tmp_path/tokens; then gone leaves the input, and a run with
    other settings and `overwrite` stops at b. Returns the changed options and the list to which
    datasets are added as they are made."""
    for name in ("a", "b", "c", "gone"):
        write_raw(tmp_path / "raw", name, [(f"{name} {query}", p, n) for query, p, n in ROWS])
    tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    (tmp_path / "raw/gone.parquet").unlink()
    original, made, stop_at = tokenization._tokenize_dataset, [], ["b"]

    def interrupted(name, *arguments):
        made.append(name)
        if name in stop_at:
            stop_at.clear()
            raise KeyboardInterrupt
        return original(name, *arguments)

    monkeypatch.setattr(tokenization, "_tokenize_dataset", interrupted)
    changed = options(tokenizer_folder, tmp_path, max_seq_length=10, overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        tokenize_folder(changed, progress=False)
    return changed, made


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_overwrite_is_continued(tokenizer_folder, tmp_path, monkeypatch, overwrite):
    changed, made = interrupt_overwriting(tokenizer_folder, tmp_path, monkeypatch)
    with pytest.raises(UserError, match="max_seq_length was 10, now 32"):
        tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    tokenize_folder(replace(changed, overwrite=overwrite), progress=False)
    assert made == ["a", "b", "b", "c"]
    tokenize_folder(replace(changed, output=tmp_path / "whole"), progress=False)
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole"), (
        "nothing of the replaced data is left"
    )
    made.clear()
    tokenize_folder(changed, progress=False)
    assert made == ["a", "b", "c"], "a finished one begins anew"


def test_an_interrupted_overwrite_with_other_data_makes_that_anew(
    tokenizer_folder, tmp_path, monkeypatch
):
    changed, made = interrupt_overwriting(tokenizer_folder, tmp_path, monkeypatch)
    write_raw(tmp_path / "raw", "a", ROWS[:2])
    with pytest.raises(UserError, match="'a' made from another file"):
        tokenize_folder(replace(changed, overwrite=False), progress=False)
    tokenize_folder(changed, progress=False)
    assert made[:2] == ["a", "b"]
    assert sorted(made[2:]) == ["a", "b", "c"]
    tokenize_folder(replace(changed, output=tmp_path / "whole"), progress=False)
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")


def test_an_interrupted_overwrite_of_unrecorded_files_is_continued(tokenizer_folder, tmp_path):
    write_raw(tmp_path / "raw", "a")
    write_raw(tmp_path / "raw", "b", [*ROWS, ("query", "", [])])
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/b_query.parquet").write_text("of somebody")
    with pytest.raises(UserError, match="'passage' is empty"):
        tokenize_folder(options(tokenizer_folder, tmp_path, overwrite=True), progress=False)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").glob("a_*")}
    write_raw(tmp_path / "raw", "b")
    tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    assert made == {path: path.stat().st_mtime_ns for path in made}
    assert len(pq.read_table(tmp_path / "tokens/b_query.parquet")) == len(ROWS)


def test_unrecorded_files_are_not_replaced(tokenizer_folder, tmp_path):
    write_raw(tmp_path / "raw", "a")
    (tmp_path / "tokens").mkdir()
    foreign = tmp_path / "tokens/a_query.parquet"
    foreign.write_text("mine")
    with pytest.raises(UserError, match=r"a_query\.parquet exists, but is not recorded"):
        tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    assert foreign.read_text() == "mine"


def test_full_disk_is_a_user_error_and_leaves_no_half_written_file(
    tokenizer_folder, tmp_path, monkeypatch
):
    def full(file, columns):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_raw(tmp_path / "raw", "a")
    monkeypatch.setattr(tokenization, "append_columns", full)
    with pytest.raises(UserError, match=r"no space left while writing to .*it continues"):
        tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    assert contents(tmp_path / "tokens").keys() == {"manifest.partial.jsonl"}


def test_a_dataset_that_nobody_noted_as_made_is_not_left_out(
    tokenizer_folder, tmp_path, monkeypatch
):
    write_raw(tmp_path / "raw")
    monkeypatch.setattr(tokenization, "work_through", lambda *_: None)
    with pytest.raises(UserError, match="no process noted there that it made"):
        tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)
    assert not (tmp_path / "tokens" / "manifest.json").exists()


def test_a_raw_file_that_only_some_machines_have_is_a_difference_between_them(tmp_path):
    here, gone = (RawDataset(name, tmp_path / f"{name}.jsonl") for name in ("here", "gone"))
    here.path.write_text("{}")
    jobs = {raw.name: tokenization._Job(raw, None, "retrieval", {}) for raw in (here, gone)}
    assert tokenization._sizes(jobs) == {"here.jsonl": 2, "gone.jsonl": None}


def test_two_runs_into_one_folder_are_refused(tokenizer_folder, tmp_path):
    write_raw(tmp_path / "raw", "a")
    (tmp_path / "tokens").mkdir()
    with (
        FileLock(tmp_path / "tokens" / tokenization.LOCK),
        pytest.raises(UserError, match="another process"),
    ):
        tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seq_length": 1}, "--max-seq-length is 1: it must be at least 2"),
        ({"max_samples": -1}, "--max-samples is -1"),
        ({"num_workers": 0}, "--num-workers is 0"),
    ],
)
def test_flags_out_of_range(tokenizer_folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        tokenize_folder(options(tokenizer_folder, tmp_path, **changes), progress=False)


def test_input_and_output_must_differ(tokenizer_folder, tmp_path):
    write_raw(tmp_path / "raw")
    with pytest.raises(UserError, match="write to another folder"):
        tokenize_folder(
            options(tokenizer_folder, tmp_path, output=tmp_path / "raw"), progress=False
        )


# --- numbering


@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_numbers_are_those_of_a_dictionary(limit):
    texts = [f"{i * i % 37}" for i in range(200)]
    numbers, expected = TextNumbers(recent_limit=limit), {}
    for start in range(0, 200, 7):
        batch = texts[start : start + 7]
        known = set(expected)
        got, new = numbers.number([text_digest(text.encode()) for text in batch])
        assert got == [expected.setdefault(text, len(expected)) for text in batch]
        assert [batch[i] for i in new] == [
            text for text in dict.fromkeys(batch) if text not in known
        ]
    assert numbers.count == len(expected)


def test_numbers_of_digests_that_share_their_first_half():
    digests = [b"same 8 b" + bytes([i] * 8) for i in range(20)]
    numbers = TextNumbers(recent_limit=4)
    for i, digest in enumerate(digests):
        assert numbers.number([digest]) == ([i], [0])
    assert numbers.number(digests[::-1]) == (list(range(20))[::-1], [])


# --- raw files


def texts_of(dataset, selected=None) -> list[tuple]:
    """(query, passage, negatives) of each row."""
    return [row[:3] for row in read_rows(dataset, selected)]


def test_empty_negatives_are_none_and_columns_are_in_numeric_order(tmp_path):
    columns = {f"negative_{k}": [f"n{k}", "" if k % 2 else None] for k in (10, 2, 1)}
    pq.write_table(
        pa.table({"query": ["q", "r"], "passage": ["p", "s"], **columns}), tmp_path / "x.parquet"
    )
    rows = texts_of(RawDataset("x", tmp_path / "x.parquet"))
    assert rows == [("q", "p", ["n1", "n2", "n10"]), ("r", "s", [])]


def test_rows_without_negative_columns_and_with_null_lists(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"query": ["q"], "passage": ["p"]}), path)
    assert texts_of(RawDataset("x", path)) == [("q", "p", [])]
    lists = pa.array([None, ["n", None, ""]], pa.list_(pa.string()))
    pq.write_table(pa.table({"query": ["q", "q"], "passage": ["p", "p"], "negatives": lists}), path)
    assert texts_of(RawDataset("x", path)) == [("q", "p", []), ("q", "p", ["n"])]


@pytest.mark.parametrize("selected", [None, np.array([0, 2, 5, 6])])
@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string()),
        pa.large_list(pa.large_string()),
        pa.list_(pa.string(), 3),
        pa.list_(pa.dictionary(pa.int32(), pa.string())),
    ],
)
def test_every_type_of_text_gives_the_same_rows(tmp_path, monkeypatch, kind, selected):
    monkeypatch.setattr(raw_parquet, "BATCH_ROWS", 3)
    lists = [
        ["n1", "", "ñ2"],
        None,
        ["n3", None, "n1"],
        None,
        ["", None, ""],
        ["n4", "n5", "n6"],
        ["🙂", "b", "c"],
    ]
    queries, passages = [f"q{i}" for i in range(7)], ["p", "é", "p", "🙂", "p4", "p5", "p"]
    expected = [
        (query, passage, [text for text in negatives or () if text])
        for query, passage, negatives in zip(queries, passages, lists, strict=True)
    ]
    expected = expected if selected is None else [expected[i] for i in selected]
    numbered = {f"negative_{k + 1}": [row[k] if row else None for row in lists] for k in range(3)}
    text = kind.value_type
    for negatives in (
        {"negatives": pa.array(lists, kind)},
        {k: pa.array(v, text) for k, v in numbered.items()},
    ):
        columns = {
            "query": pa.array(queries, text),
            "passage": pa.array(passages, text),
            **negatives,
        }
        try:
            pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=5)
        except (
            pa.ArrowNotImplementedError
        ):  # pyarrow 21 writes no null in place of a list of fixed size
            assert pa.types.is_fixed_size_list(kind)
            columns["negatives"] = pa.array([row or [None] * 3 for row in lists], kind)
            pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=5)
        dataset = RawDataset("x", tmp_path / "x.parquet")
        assert texts_of(dataset, selected) == expected
        batches = list(read_row_batches(dataset, selected))
        assert [
            text for batch in batches for text in batch.decode(range(len(batch.documents)))
        ] == [text for _, passage, negatives in expected for text in (passage, *negatives)]
        assert [count for batch in batches for count in batch.characters] == [
            len(text) for _, passage, negatives in expected for text in (passage, *negatives)
        ]


@pytest.mark.parametrize("column", ["query", "passage", "negatives", "negative_2"])
def test_text_that_is_not_utf8_is_named(tokenizer_folder, tmp_path, monkeypatch, column):
    monkeypatch.setattr(raw_parquet, "BATCH_ROWS", 2)
    bad = pa.array([b"a", b"b", b"c", b"d\xff", b"e"], pa.binary()).view(pa.string())
    good = pa.array(list("vwxyz"))
    columns = {"query": good, "passage": good, column: bad}
    if column == "negatives":
        columns[column] = pa.ListArray.from_arrays(pa.array(range(6), pa.int32()), bad)
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "raw/x.parquet")
    message = (
        r"x\.parquet: text that is not UTF-8 in rows 2 to 3: "
        "'utf-8' codec can't decode byte 0xff in position 1"
    )
    with pytest.raises(UserError, match=message):
        list(read_rows(RawDataset("x", tmp_path / "raw/x.parquet")))
    with pytest.raises(UserError, match=message):
        tokenize_folder(options(tokenizer_folder, tmp_path), progress=False)


def test_listing_passes_over_other_files_and_refuses_doubles(tmp_path):
    for name in (".hidden.parquet", "README.md", "b.jsonl", "a.parquet"):
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.parquet").mkdir()
    assert [dataset.name for dataset in list_raw_datasets(tmp_path)] == ["a", "b"]
    (tmp_path / "b.parquet").write_text("x")
    with pytest.raises(UserError, match="both dataset 'b'"):
        list_raw_datasets(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        list_raw_datasets(tmp_path / "nowhere")
    (tmp_path / "folder.parquet/faq.csv").write_text("query,passage")
    with pytest.raises(UserError, match=r"holds no .*tokenize_data_qwen\.py --columns"):
        list_raw_datasets(tmp_path / "folder.parquet")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_suffixes_in_capitals_are_read_alike(tmp_path, suffix):
    path = write_raw(tmp_path / "raw", suffix=suffix) / f"toy{suffix}"
    expected = list(read_rows(RawDataset("toy", path)))
    path.rename(path.with_suffix(suffix.upper()))
    [dataset] = list_raw_datasets(tmp_path / "raw")
    assert check_and_count_rows(dataset) == len(ROWS)
    assert list(read_rows(dataset)) == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"query": ["q"], "text": ["p"]}, "no column 'passage'; its columns are 'query', 'text'"),
        ({"query": [1], "passage": ["p"]}, "'query' is int64; it must be string"),
        ({"query": ["q"], "passage": ["p"], "negative_2": [7]}, "'negative_2' is int64"),
        (
            {"query": ["q"], "passage": ["p"], "negatives": ["n"]},
            "'negatives' is string; it must be list<string>",
        ),
        (
            {"query": ["q"], "passage": ["p"], "negatives": [["n"]], "negative_1": ["n"]},
            "both 'negatives' and",
        ),
        ({"query": ["q", None], "passage": ["p", "p"]}, r"row 1: 'query' is null"),
        ({"query": ["q", "q"], "passage": ["p", ""]}, r"row 1: 'passage' is empty"),
        ({"query": pa.array([], pa.string()), "passage": pa.array([], pa.string())}, "has no rows"),
    ],
)
def test_wrong_parquet_is_named(tmp_path, columns, message):
    dataset = RawDataset("x", tmp_path / "x.parquet")
    pq.write_table(pa.table(columns), dataset.path)
    with pytest.raises(UserError, match=rf"x\.parquet.*{message}"):
        check_and_count_rows(dataset), list(read_rows(dataset))


def test_broken_parquet_is_named(tmp_path):
    dataset = RawDataset("x", tmp_path / "x.parquet")
    dataset.path.write_bytes(b"PAR1 no footer")
    with pytest.raises(UserError, match=r"x\.parquet is not a readable parquet file"):
        check_and_count_rows(dataset)
    write_raw(tmp_path, "x")
    whole = dataset.path.read_bytes()
    dataset.path.write_bytes(whole[:4] + bytes(60) + whole[64:])
    with pytest.raises(UserError, match=r"x\.parquet"):
        list(read_rows(dataset))


GOOD_LINE = b'{"query": "q", "passage": "p"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"query": "q", "passage": ', "not valid JSON"),
        (b'{"query": "\xff", "passage": "p"}', "not valid JSON"),
        (b'["q", "p"]', "list instead of an object"),
        (b'{"query": "q"}', "no column 'passage'; its columns are 'query'"),
        (b'{"query": 3, "passage": "p"}', "'query' is int instead of a string"),
        (b'{"query": null, "passage": "p"}', "'query' is null"),
        (b'{"query": "q", "passage": ""}', "'passage' is empty"),
        (b'{"query": "q", "passage": "p", "negatives": "n"}', "'negatives' is str"),
        (
            b'{"query": "q", "passage": "p", "negatives": [1]}',
            "'negatives' is int instead of a string",
        ),
        (
            b'{"query": "q", "passage": "p", "negatives": [], "negative_1": "n"}',
            "both 'negatives' and 'negative_1'",
        ),
        (b'{"query": "q", "passage": "\\ud800"}', "'passage' is not valid Unicode"),
    ],
)
def test_wrong_json_line_is_named(tmp_path, line, message):
    dataset = RawDataset("x", tmp_path / "x.jsonl")
    dataset.path.write_bytes(b"\xef\xbb\xbf" + GOOD_LINE + b"\r\n\n" + line + b"\n")
    assert check_and_count_rows(dataset) == 2
    rows = read_rows(dataset)
    assert next(rows)[:3] == ("q", "p", [])
    with pytest.raises(UserError, match=rf"x\.jsonl, line 3: .*{message}"):
        next(rows)


def test_empty_json_file_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"x\.jsonl has no rows"):
        check_and_count_rows(RawDataset("x", tmp_path / "x.jsonl"))


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_columns_that_are_not_read_are_said(tokenizer_folder, tmp_path, capsys, suffix):
    """A misspelt one would train other negatives, or none, without a word."""
    rows = [
        {"query": "a", "passage": "b", "negativms": ["c"], "source": "web", "language": "eng"},
        {"query": "d", "passage": "e", "negativms": ["f"], "source": "web", "language": "eng"},
    ]
    folder = tmp_path / "raw"
    folder.mkdir()
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "own.parquet")
    else:
        (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--tokenizer", str(tokenizer_folder), "--input", str(folder)]
    assert tokenize.main([*flags, "--output", str(tmp_path / "tokens")]) == 0
    said = capsys.readouterr().err
    assert f"own.{suffix}: the column 'negativms' is not read; did you mean 'negatives'?" in said
    assert f"own.{suffix}: columns that are not read: 'negativms', 'source'" in said


def test_rows_that_are_all_bad_are_no_scored_pairs(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"query": "", "passage": "", "score": 1}\n')
    assert task_of_raw(RawDataset("x", tmp_path / "x.jsonl")) == "retrieval"


def test_tokens_per_character_are_told_by_language(tokenizer_folder, tmp_path, capsys):
    """Of the texts as they are: those with a prompt do not count, nor those that were cut."""
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = [
        ("what is a cat", "a small animal", "eng"),
        ("was ist ein Hund", "ein Tier", "deu"),
        ("a stone?", "a small animal", "eng"),  # its passage stands first in another row
        ("猫とは何ですか", "小さな動物 " * 60, "jpn"),
        ("?", "a river", None),
    ]
    for name, own in (("plain", rows), ("asked", rows[:2])):
        (raw / f"{name}.jsonl").write_text(
            "".join(
                json.dumps({"query": q, "passage": p} | ({"language": code} if code else {})) + "\n"
                for q, p, code in own
            )
        )
    settings = options(
        tokenizer_folder,
        tmp_path,
        input=raw,
        datasets={"asked": DatasetConfig(prompt="Find: ")},
    )
    manifest = tokenize_folder(settings, progress=False)
    tokenizer = load_tokenizer(tokenizer_folder)
    wanted = {
        "plain": {
            "eng": ["what is a cat", "a small animal", "a stone?"],
            "deu": ["was ist ein Hund", "ein Tier"],
            "jpn": ["猫とは何ですか"],
        },
        "asked": {"eng": ["a small animal"], "deu": ["ein Tier"]},
    }
    for name, by_language in wanted.items():
        assert manifest.datasets[name].text_sizes == {
            code: {
                "characters": sum(map(len, texts)),
                "tokens": sum(len(tokenizer.tokenize(text)) for text in texts),
            }
            for code, texts in by_language.items()
        }
    table = language_table(Manifest.read(settings.output / "manifest.json"))
    sizes = [manifest.datasets[name].text_sizes["deu"] for name in wanted]
    rate = sum(own["tokens"] for own in sizes) / sum(own["characters"] for own in sizes)
    (line,) = (line for line in table.splitlines() if line.startswith("deu"))
    assert line.split() == ["deu", "2", str(sum(s["tokens"] for s in sizes)), f"{rate:.3f}"]
    flags = {"tokenizer": tokenizer_folder, "input": raw, "output": tmp_path / "again"}
    tokenize.main([word for key, value in flags.items() for word in (f"--{key}", str(value))])
    assert "tokens per character" in capsys.readouterr().out
