"""Raw contrastive data: a folder of .parquet or .jsonl files, one file per dataset.

Columns: `query`, `passage`, and negatives as `negative_1 ... negative_K` or as one list
`negatives`. A null, absent or empty negative means "none in that place". An empty query or passage
is an error: nothing can be learned from it, and it is a sign of a column that was filled wrongly.
Errors name the row of a parquet file, counted from 0, or the line of a .jsonl file, counted from 1;
blank lines are no rows. Suffixes may be in capitals. All is read in bounded memory.

A format is one function from a file to `RawRow`s, whose records go through `row_of`. Parquet is
read column by column instead, as `RowBatch`es, because most documents of a dataset are known.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ml_embed.config import TASKS, Task
from ml_embed.errors import UserError
from ml_embed.files.parquet import open_parquet, parquet_writer, read_batches, require_columns

SUFFIXES = (".parquet", ".jsonl")
SCHEMA = pa.schema(
    [("query", pa.string()), ("passage", pa.string()), ("negatives", pa.list_(pa.string()))]
)
"""Of the raw files that this project writes."""
WRITTEN_ROWS = 4096
BATCH_ROWS = 256  # texts of 25 documents of 10 kB each: 64 MB
NEGATIVE_COLUMN = re.compile(r"negative_(\d+)")
TASK_METADATA = b"ml_embed_task"
"""Key of a parquet file's schema under which it says its task itself."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RawDataset:
    """One file of raw data; `name` is its stem."""

    name: str
    path: Path

    @property
    def is_parquet(self) -> bool:
        """Or .jsonl."""
        return self.path.suffix.lower() == ".parquet"


class RawRow(NamedTuple):
    """One contrastive sample. No text is empty."""

    query: str
    passage: str
    negatives: list[str]


@dataclass(frozen=True)
class RowBatch:
    """Consecutive samples. Documents stay bytes, because most of them are known already."""

    queries: list[str]
    """(rows,)"""
    documents: Sequence[bytes | memoryview]
    """UTF-8 of each row's passage, then its negatives, of all rows joined; `decode` checks it"""
    characters: np.ndarray
    """(documents,) characters of each"""
    counts: np.ndarray
    """(rows,) documents of each row, at least 1"""
    where: str
    """file and rows, for messages"""

    def decode(self, documents: Iterable[int]) -> list[str]:
        """The texts of some of the documents. Raises UserError for what is not UTF-8."""
        return _decoded((self.documents[i] for i in documents), self.where)


def list_raw_datasets(folder: Path) -> list[RawDataset]:
    """The datasets of a folder, sorted by name; hidden files and other file types do not count.

    Raises:
        UserError: there is no folder or no dataset, or two files have one name.
    """
    if not folder.is_dir():
        raise UserError(f"raw data folder {folder} does not exist or is no folder.")
    datasets: dict[str, RawDataset] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith(".") or not path.is_file():
            continue
        if path.stem in datasets:
            raise UserError(
                f"{datasets[path.stem].path} and {path} are both dataset {path.stem!r}: rename one "
                "of them."
            )
        datasets[path.stem] = RawDataset(path.stem, path)
    if not datasets:
        raise UserError(
            f"{folder} holds no .parquet or .jsonl file. Put one file per dataset there; of .csv, "
            ".tsv, .json or .arrow files, tokenize_data_qwen.py --columns query=...,passage=... "
            "makes such ones."
        )
    return sorted(datasets.values(), key=lambda dataset: dataset.name)


def check_and_count_rows(dataset: RawDataset) -> int:
    """Rows of a dataset, after checking what can be checked without reading its texts.

    Raises UserError for a broken file, a missing column, a column of the wrong type, or no rows.
    """
    if dataset.is_parquet:
        with open_parquet(dataset.path) as file:
            _check_schema(dataset.path, file.schema_arrow)
            rows = file.metadata.num_rows
    else:
        rows = sum(1 for _ in _lines(dataset.path))
    if rows == 0:
        raise UserError(f"{dataset.path} has no rows. Remove the file or fill it.")
    return rows


def task_in_file(dataset: RawDataset) -> Task | None:
    """The task that a parquet file names in its metadata; None where it names none."""
    if not dataset.is_parquet:
        return None
    with open_parquet(dataset.path) as file:
        said = (file.schema_arrow.metadata or {}).get(TASK_METADATA, b"").decode()
    return said if said in TASKS else None


def describe_source(path: Path) -> dict[str, Any]:
    """Name, size in bytes and SHA-256 of a raw file."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}.") from error
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}


@dataclass(frozen=True)
class RawCounts:
    """What a raw file holds."""

    rows: int = 0
    negatives: int = 0
    rows_without_negatives: int = 0


def write_raw(path: Path, rows: Iterable[RawRow], task: Task | None = None) -> RawCounts:
    """Write rows as a raw parquet file, in row groups of WRITTEN_ROWS.

    Args:
        path: the file; whoever needs it to appear whole gives an `atomic_file`.
        rows: are read one row group at a time.
        task: is noted in the file, for `task_in_file`.
    """
    schema = SCHEMA.with_metadata({TASK_METADATA: task}) if task else SCHEMA
    remaining, counts = iter(rows), []
    with parquet_writer(path, schema) as writer:
        while group := list(islice(remaining, WRITTEN_ROWS)):
            columns = zip(zip(*group, strict=True), schema.types, strict=True)
            arrays = [pa.array(column, kind) for column, kind in columns]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            counts += [len(row.negatives) for row in group]
    return RawCounts(len(counts), sum(counts), counts.count(0))


def read_rows(dataset: RawDataset, selected: np.ndarray | None = None) -> Iterator[RawRow]:
    """The rows of a dataset in file order.

    Args:
        dataset: the file.
        selected: sorted numbers of the rows that are wanted; None = all.
    Raises:
        UserError: a row is bad; the message names it.
    """
    if not dataset.is_parquet:
        yield from _read_jsonl(dataset.path, selected)
        return
    for batch in _read_parquet(dataset.path, selected):
        texts = batch.decode(range(len(batch.documents)))
        ends = np.cumsum(batch.counts).tolist()
        for query, (start, end) in zip(batch.queries, pairwise([0, *ends]), strict=True):
            yield RawRow(query, texts[start], texts[start + 1 : end])


def read_row_batches(dataset: RawDataset, selected: np.ndarray | None = None) -> Iterator[RowBatch]:
    """The same rows, BATCH_ROWS of them at most at a time."""
    if dataset.is_parquet:
        yield from _read_parquet(dataset.path, selected)
        return
    rows = _read_jsonl(dataset.path, selected)
    while batch := list(islice(rows, BATCH_ROWS)):
        texts = [text for row in batch for text in (row.passage, *row.negatives)]
        yield RowBatch(
            queries=[row.query for row in batch],
            documents=[text.encode() for text in texts],
            characters=np.array([len(text) for text in texts]),
            counts=np.array([1 + len(row.negatives) for row in batch]),
            where=str(dataset.path),
        )


def _read_parquet(path: Path, selected: np.ndarray | None) -> Iterator[RowBatch]:
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        group_rows = [
            file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)
        ]
    columns = [
        "query",
        "passage",
        *(["negatives"] if "negatives" in names else _numbered_negatives(names)),
    ]
    start = 0
    for group, rows in enumerate(group_rows):
        if selected is None or _chosen(selected, start, rows).size:
            first = start
            for batch in read_batches(path, columns, BATCH_ROWS, [group]):
                numbers = np.arange(first, first + batch.num_rows)
                chosen = numbers if selected is None else _chosen(selected, first, batch.num_rows)
                if len(chosen):
                    part = (
                        batch
                        if len(chosen) == len(numbers)
                        else batch.take(pa.array(chosen - first))
                    )
                    yield _row_batch(path, part.select(columns), chosen)
                first += batch.num_rows
        start += rows


def _row_batch(path: Path, batch: pa.RecordBatch, numbers: np.ndarray) -> RowBatch:
    """The columns query, passage and negatives, of the rows with these numbers."""
    rows = np.arange(len(numbers))
    columns, owners = [], []  # texts, and the row that each belongs to
    for column in batch.columns[1:]:
        owner = rows
        if _is_list(column.type):
            owner = np.repeat(rows, pc.fill_null(pc.list_value_length(column), 0))
            column = column.flatten()
        columns.append(column.cast(pa.large_string()))
        owners.append(owner)
    queries = batch.column(0).cast(pa.large_string())
    documents, owner = pa.concat_arrays(columns), np.concatenate(owners)
    empty = (_lengths(queries) == 0) | (_lengths(columns[0]) == 0)
    if empty.any():
        row = int(np.argmax(empty))
        query, passage = queries[row].as_py(), columns[0][row].as_py()
        wrong = ("passage", passage) if query else ("query", query)
        _raise_empty(f"{path}, row {numbers[row]}", *wrong)
    there = np.flatnonzero(_lengths(documents))
    # Each row's passage, then its negatives as they stand.
    order = there[np.argsort(owner[there], kind="stable")]
    where = f"{path}: text that is not UTF-8 in rows {numbers[0]} to {numbers[-1]}"
    return RowBatch(
        queries=_decoded(_views(queries, rows), where),
        documents=_views(documents, order),
        characters=pc.utf8_length(documents).to_numpy(zero_copy_only=False)[order],
        counts=np.bincount(owner[there]),
        where=where,
    )


def _lengths(texts: pa.LargeStringArray) -> np.ndarray:
    """(texts,) bytes of each; 0 for null."""
    return pc.fill_null(pc.binary_length(texts), 0).to_numpy()


def _views(texts: pa.LargeStringArray, places: np.ndarray) -> list[memoryview]:
    """The bytes of some of the texts, without copying."""
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset :]
    view = memoryview(texts.buffers()[2])
    return [
        view[start:end]
        for start, end in zip(offsets[places].tolist(), offsets[places + 1].tolist(), strict=True)
    ]


def _decoded(texts: Iterable[bytes | memoryview], where: str) -> list[str]:
    try:
        return [str(text, "utf-8") for text in texts]
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {error}.") from error


def _read_jsonl(path: Path, selected: np.ndarray | None) -> Iterator[RawRow]:
    wanted = None if selected is None else iter(selected.tolist())
    next_row = next(wanted, None) if wanted is not None else None
    for row, (line_number, line) in enumerate(_lines(path)):
        if wanted is not None:
            if next_row is None:
                return
            if row != next_row:
                continue
            next_row = next(wanted, None)
        yield _parse_line(line, f"{path}, line {line_number}")


def _parse_line(line: bytes, where: str) -> RawRow:
    try:
        record = json.loads(line)
    except ValueError as error:  # invalid JSON, or bytes that are not UTF-8
        raise UserError(
            f"{where}: not valid JSON ({error}). Every line must be one object."
        ) from error
    if not isinstance(record, dict):
        raise UserError(
            f"{where}: {type(record).__name__} instead of an object with 'query' and 'passage'."
        )
    numbered = _numbered_negatives(list(record))
    if "negatives" in record and numbered:
        raise UserError(f"{where}: both 'negatives' and {numbered[0]!r}. Keep one form.")
    listed = ["negatives"] if "negatives" in record else []
    return row_of(record, {name: name for name in ("query", "passage", *listed, *numbered)}, where)


def row_of(record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> RawRow:
    """The row that a record of any format holds.

    Args:
        record: column -> value.
        columns: query, passage, negatives, negative_1, ... -> the record's column of it.
        where: file and row, for messages.
    Raises:
        UserError: a column is missing, or a text is none or empty.
    """
    negatives = [
        value_of(record, column, where)
        for role, column in columns.items()
        if NEGATIVE_COLUMN.fullmatch(role)
    ]
    if "negatives" in columns:
        listed = value_of(record, columns["negatives"], where)
        if not isinstance(listed, list | None):
            raise UserError(
                f"{where}: {columns['negatives']!r} is {type(listed).__name__}; it must be a list "
                "of strings."
            )
        negatives += listed or []
    texts = [_checked_text(text, "negatives", where) for text in negatives]
    query, passage = (text_of(record, columns[role], where) for role in ("query", "passage"))
    return RawRow(query, passage, [text for text in texts if text])


def text_of(record: Mapping[str, Any], column: str, where: str) -> str:
    """A text that must be there. Raises UserError, also for an empty one."""
    text = _checked_text(value_of(record, column, where), column, where)
    if not text:
        _raise_empty(where, column, text)
    return text


def value_of(record: Mapping[str, Any], column: str, where: str) -> Any:
    """What stands in a column. Raises UserError if there is no such column."""
    if column not in record:
        names = ", ".join(map(repr, record))
        raise UserError(f"{where}: no column {column!r}; its columns are {names}.")
    return record[column]


def _checked_text(text: Any, column: str, where: str) -> str | None:
    if not isinstance(text, str | None):
        raise UserError(f"{where}: {column!r} is {type(text).__name__} instead of a string.")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can spell
        raise UserError(f"{where}: {column!r} is not valid Unicode ({error.reason}).") from error
    return text


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, content) of the lines that are not blank."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                content = line.strip()
                if number == 1:
                    content = content.removeprefix(BYTE_ORDER_MARK)
                if content:
                    yield number, content
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}.") from error


def _check_schema(path: Path, schema: pa.Schema) -> None:
    require_columns(path, schema, ["query", "passage"])
    numbered = _numbered_negatives(schema.names)
    if "negatives" in schema.names and numbered:
        raise UserError(f"{path} has both 'negatives' and {numbered[0]!r}. Keep one form.")
    for name in ("query", "passage", *numbered):
        if not _is_text(schema.field(name).type, may_be_null=name in numbered):
            raise UserError(
                f"{path}: column {name!r} is {schema.field(name).type}; it must be string."
            )
    if "negatives" in schema.names and not _is_text_list(schema.field("negatives").type):
        raise UserError(
            f"{path}: column 'negatives' is {schema.field('negatives').type}; it must be "
            "list<string>."
        )


def _is_text(kind: pa.DataType, may_be_null: bool) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )
    return text or (may_be_null and pa.types.is_null(kind))


def _is_text_list(kind: pa.DataType) -> bool:
    return pa.types.is_null(kind) or (
        _is_list(kind) and _is_text(kind.value_type, may_be_null=True)
    )


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _numbered_negatives(names: list[str]) -> list[str]:
    """negative_1, negative_2, ... in the order of their numbers."""
    return sorted(
        filter(NEGATIVE_COLUMN.fullmatch, names),
        key=lambda name: int(name.removeprefix("negative_")),
    )


def _chosen(selected: np.ndarray, start: int, rows: int) -> np.ndarray:
    """The numbers of `selected` (sorted) in [start, start + rows)."""
    return selected[slice(*np.searchsorted(selected, [start, start + rows]))]


def _raise_empty(where: str, column: str, text: str | None) -> NoReturn:
    raise UserError(
        f"{where}: {column!r} is {'null' if text is None else 'empty'}. Fill it or remove the row."
    )
