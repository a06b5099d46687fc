"""Raw data in parquet files: written row by row, read column by column in bounded memory."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ml_embed.config import Task
from ml_embed.errors import UserError
from ml_embed.files.parquet import (
    broken_file_is_user_error,
    is_list,
    is_text,
    open_parquet,
    parquet_writer,
    read_batches,
    refuse_doubles,
    require_columns,
)
from ml_embed.prepare.rows import (
    OPTIONAL_COLUMNS,
    OPTIONAL_NAMES,
    Faults,
    FaultyRow,
    RawRow,
    RowBatch,
    decoded,
    raw_columns,
    row_of,
)

SCHEMA = pa.schema(
    [("query", pa.string()), ("passage", pa.string()), ("negatives", pa.list_(pa.string()))]
)
"""Of the raw files that this project writes."""
TASK_METADATA = b"ml_embed_task"
"""Key of a parquet file's schema under which it says its task itself."""
NOTES_METADATA = b"ml_embed_notes"
"""Key of a parquet file's metadata under which it says what was left out when it was made."""
WRITTEN_ROWS = 4096
CHECKED_ROWS = 4096
BATCH_ROWS = 256  # texts of 25 documents of 10 kB each: 64 MB


@dataclass(frozen=True)
class RawCounts:
    """What a raw file holds."""

    rows: int = 0
    negatives: int = 0
    rows_without_negatives: int = 0


def write_raw(
    path: Path,
    rows: Iterable[RawRow],
    task: Task | None = None,
    notes: Callable[[], Mapping[str, Any]] | None = None,
) -> RawCounts:
    """Write rows as a raw parquet file, in row groups of WRITTEN_ROWS.

    The file has those of OPTIONAL_COLUMNS that some row has.

    Args:
        path: the file; whoever needs it to appear whole gives an `atomic_file`.
        rows: are read one row group at a time.
        task: is noted in the file, for `task_in_file`.
        notes: gives what else is known after the last row, for `notes_in_file`.
    """
    remaining, counts = iter(rows), []
    with _RawWriter(path, task) as writer:
        while group := list(islice(remaining, WRITTEN_ROWS)):
            writer.write(group)
            counts += [len(row.negatives) for row in group]
        if notes is not None and (said := notes()):
            writer.note(said)
    return RawCounts(len(counts), sum(counts), counts.count(0))


class _RawWriter:
    """A raw file whose optional columns are not known before all rows were seen."""

    def __init__(self, path: Path, task: Task | None):
        self.path = path
        self.schema = SCHEMA.with_metadata({TASK_METADATA: task}) if task else SCHEMA
        self._open = ExitStack()

    def __enter__(self) -> "_RawWriter":
        self._file = self._open.enter_context(parquet_writer(self.path, self.schema))
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def write(self, rows: list[RawRow]) -> None:
        """Append a row group."""
        new = [
            column
            for column in OPTIONAL_COLUMNS
            if column.name not in self.schema.names
            and any(getattr(row, column.name) is not None for row in rows)
        ]
        if new:
            self._widen(new)
        columns = {field.name: [getattr(row, field.name) for row in rows] for field in self.schema}
        self._file.write_table(pa.table(columns, self.schema))

    def note(self, notes: Mapping[str, Any]) -> None:
        self._file.add_key_value_metadata({NOTES_METADATA: json.dumps(notes)})

    def _widen(self, columns: list[pa.Field]) -> None:
        """Give the file more columns, null so far."""
        self._open.close()
        former = self.path.with_name(f".former{self.path.name}")
        self.path.replace(former)
        present = {*self.schema.names, *(column.name for column in columns)}
        optional = [column for column in OPTIONAL_COLUMNS if column.name in present]
        self.schema = pa.schema([*SCHEMA, *optional], self.schema.metadata)
        self.__enter__()
        try:
            with pq.ParquetFile(former) as file:
                for number in range(file.metadata.num_row_groups):
                    table = file.read_row_group(number)
                    arrays = [
                        table[field.name]
                        if field.name in table.column_names
                        else pa.nulls(len(table), field.type)
                        for field in self.schema
                    ]
                    self._file.write_table(pa.Table.from_arrays(arrays, schema=self.schema))
        finally:
            former.unlink()


def read_parquet(path: Path, selected: np.ndarray | None, faults: Faults) -> Iterator[RowBatch]:
    """The rows of a raw file without `neg_scores`; faulty ones go to `faults`."""
    with open_parquet(path) as file:
        columns = list(raw_columns(file.schema_arrow.names, str(path)))
        group_rows = [
            file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)
        ]
    start = 0
    for group, rows in enumerate(group_rows):
        if selected is None or _chosen(selected, start, rows).size:
            first = start
            for batch in read_batches(path, columns, BATCH_ROWS, [group]):
                numbers = np.arange(first, first + batch.num_rows)
                chosen = numbers if selected is None else _chosen(selected, first, batch.num_rows)
                first += batch.num_rows
                part = batch.select(columns)
                faulty = _count_faults(path, part, numbers, chosen, faults)
                chosen = np.setdiff1d(chosen, faulty, assume_unique=True)
                if len(chosen) and faults.tolerated:
                    if len(chosen) < len(numbers):
                        part = part.take(pa.array(chosen - numbers[0]))
                    yield _row_batch(path, part, chosen)
        start += rows
    faults.finish()


def faulty_rows(path: Path, faults: Faults) -> tuple[int, np.ndarray]:
    """Rows of a raw file without `neg_scores`, and the sorted numbers of those that are faulty."""
    with open_parquet(path) as file:
        there = file.schema_arrow.names
    columns = [name for name in ("query", "passage", *_SCORES) if name in there]
    rows, found = 0, []
    for batch in read_batches(path, columns, CHECKED_ROWS):
        numbers = np.arange(rows, rows + batch.num_rows)
        found.append(_count_faults(path, batch, numbers, numbers, faults))
        rows += batch.num_rows
    faults.finish()
    return rows, np.concatenate([np.empty(0, np.int64), *found])


_SCORES = ("score", "pos_score")


def _count_faults(
    path: Path, batch: pa.RecordBatch, numbers: np.ndarray, chosen: np.ndarray, faults: Faults
) -> np.ndarray:
    """Those of the chosen rows that are faulty.

    Args:
        path: the file.
        batch: some of its rows.
        numbers: theirs, (rows,).
        chosen: those of `numbers` that count.
        faults: gets them.
    """
    wrong = np.zeros(batch.num_rows, bool)
    for name in ("query", "passage"):
        wrong |= _lengths(batch[name].cast(pa.large_string())) == 0
    for name in _SCORES:
        if name in batch.schema.names:
            wrong |= np.isinf(_numbers(batch[name]))
    found = np.intersect1d(numbers[wrong], chosen, assume_unique=True)
    for number in found.tolist():
        with broken_file_is_user_error(path):
            values = batch.slice(number - int(numbers[0]), 1).to_pylist()[0]
        try:
            row_of(values, raw_columns(values, str(path)), f"{path}, row {number}")
        except FaultyRow as fault:
            faults.add(fault)
    return found


def _numbers(column: pa.Array) -> np.ndarray:
    """(rows,) float64, nan for null."""
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)


def _row_batch(path: Path, batch: pa.RecordBatch, numbers: np.ndarray) -> RowBatch:
    """The columns query, passage, negatives and optional ones, of the rows with these numbers."""
    rows = np.arange(len(numbers))
    names = [name for name in batch.schema.names if name not in OPTIONAL_NAMES]
    columns, owners = [], []  # texts, and the row that each belongs to
    for name in names[1:]:
        owner, column = rows, batch[name]
        if is_list(column.type):
            owner = np.repeat(rows, pc.fill_null(pc.list_value_length(column), 0))
            column = column.flatten()
        columns.append(column.cast(pa.large_string()))
        owners.append(owner)
    queries = batch.column(0).cast(pa.large_string())
    documents, owner = pa.concat_arrays(columns), np.concatenate(owners)
    there = np.flatnonzero(_lengths(documents))
    # Each row's passage, then its negatives as they stand.
    order = there[np.argsort(owner[there], kind="stable")]
    where = f"{path}: text that is not UTF-8 in rows {numbers[0]} to {numbers[-1]}"
    return RowBatch(
        queries=decoded(_views(queries, rows), where),
        documents=_views(documents, order),
        characters=pc.utf8_length(documents).to_numpy(zero_copy_only=False)[order],
        counts=np.bincount(owner[there]),
        where=where,
        optional={
            name: _optional(batch[name], name, path)
            for name in OPTIONAL_NAMES
            if name in batch.schema.names
        },
    )


def _optional(column: pa.Array, name: str, path: Path) -> list[Any]:
    if name in _SCORES:
        return [None if math.isnan(value) else value for value in _numbers(column).tolist()]
    with broken_file_is_user_error(path):
        return [value or None for value in column.cast(pa.string()).to_pylist()]


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


def check_schema(path: Path, schema: pa.Schema) -> None:
    """Raise UserError for columns that are missing, come twice, or are of the wrong type."""
    require_columns(path, schema, ["query", "passage"])
    columns = raw_columns(schema.names, str(path))
    refuse_doubles([name for name in schema.names if name in columns], path)
    for name in columns:
        kind = schema.field(name).type
        fits, wanted = _TYPES.get(name, (is_text, "string"))
        if not fits(kind) and not (name not in ("query", "passage") and pa.types.is_null(kind)):
            other = " Rename it if it is something else." if name in OPTIONAL_NAMES else ""
            raise UserError(f"{path}: column {name!r} is {kind}; it must be {wanted}.{other}")


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _is_list_of(fits: Callable[[pa.DataType], bool]) -> Callable[[pa.DataType], bool]:
    return lambda kind: (
        is_list(kind) and (fits(kind.value_type) or pa.types.is_null(kind.value_type))
    )


_TYPES: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "negatives": (_is_list_of(is_text), "list<string>"),
    "query_id": (lambda kind: is_text(kind) or pa.types.is_integer(kind), "string"),
    "score": (_is_number, "a number"),
    "pos_score": (_is_number, "a number"),
    "neg_scores": (_is_list_of(_is_number), "a list of numbers"),
}
"""Of columns that are no single text: whether a type fits, and what it must be."""


def _chosen(selected: np.ndarray, start: int, rows: int) -> np.ndarray:
    """The numbers of `selected` (sorted) in [start, start + rows)."""
    return selected[slice(*np.searchsorted(selected, [start, start + rows]))]
