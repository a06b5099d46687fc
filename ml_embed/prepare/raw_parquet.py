"""Raw data in parquet files: written row by row, read column by column in bounded memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ml_embed.config import Task
from ml_embed.errors import UserError
from ml_embed.files.parquet import open_parquet, parquet_writer, read_batches, require_columns
from ml_embed.prepare.rows import RawRow, RowBatch, decoded, numbered_negatives, raise_empty

SCHEMA = pa.schema(
    [("query", pa.string()), ("passage", pa.string()), ("negatives", pa.list_(pa.string()))]
)
"""Of the raw files that this project writes."""
TASK_METADATA = b"ml_embed_task"
"""Key of a parquet file's schema under which it says its task itself."""
WRITTEN_ROWS = 4096
BATCH_ROWS = 256  # texts of 25 documents of 10 kB each: 64 MB


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


def read_parquet(path: Path, selected: np.ndarray | None) -> Iterator[RowBatch]:
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        group_rows = [
            file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)
        ]
    columns = [
        "query",
        "passage",
        *(["negatives"] if "negatives" in names else numbered_negatives(names)),
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
        raise_empty(f"{path}, row {numbers[row]}", *wrong)
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


def check_schema(path: Path, schema: pa.Schema) -> None:
    require_columns(path, schema, ["query", "passage"])
    numbered = numbered_negatives(schema.names)
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


def _chosen(selected: np.ndarray, start: int, rows: int) -> np.ndarray:
    """The numbers of `selected` (sorted) in [start, start + rows)."""
    return selected[slice(*np.searchsorted(selected, [start, start + rows]))]
