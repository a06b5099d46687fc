"""Parquet files in bounded memory: read with errors that name file, column and row, and written."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ml_embed.errors import UserError, one_line

READ_BUFFER_BYTES = 1 << 20


@contextmanager
def broken_content_is_user_error(path: Path) -> Iterator[None]:
    """Arrow's errors about a file's content become a UserError that names the file."""
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter: bytes of a text or name
        raise UserError(
            f"{path} is not a readable {_kind(path)} file: {one_line(error)}. Write or download it "
            "again."
        ) from error


def _kind(path: Path) -> str:
    return "Arrow" if ".arrow" in path.suffixes else "parquet"


@contextmanager
def broken_file_is_user_error(path: Path) -> Iterator[None]:
    """Errors about a file's content, and while it is read, become a UserError that names it."""
    try:
        with broken_content_is_user_error(path):
            yield
    except OSError as error:
        if error.errno is None:  # Arrow's own "unexpected end of stream", "corrupt snappy data"
            raise UserError(
                f"{path} is a broken {_kind(path)} file: {error}. Write or download it again."
            ) from error
        raise UserError(f"cannot read {path}: {error}.") from error


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a file and read its footer. Raises UserError if it is missing or broken."""
    with broken_file_is_user_error(path):
        # Memory-mapped and buffered: a row group of many gigabytes is decoded page by page, never
        # held whole.
        file = pq.ParquetFile(
            path,
            memory_map=True,
            buffer_size=READ_BUFFER_BYTES,
            page_checksum_verification=True,
        )
        _ = file.schema_arrow  # decoded here, so that damage in it is met here
        return file


def read_batches(
    path: Path, columns: Sequence[str], batch_rows: int, row_groups: Sequence[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """The given columns as batches of at most `batch_rows` rows, in file order.

    Raises:
        UserError: the file is broken.
    """
    with open_parquet(path) as file, broken_file_is_user_error(path):
        refuse_doubles([name for name in file.schema_arrow.names if name in columns], path)
        yield from file.iter_batches(
            batch_size=batch_rows, columns=list(columns), row_groups=row_groups
        )


@contextmanager
def parquet_writer(path: Path, schema: pa.Schema, **options: Any) -> Iterator[pq.ParquetWriter]:
    """A file to write tables to, by zstd and with checksums; `options` are pq.ParquetWriter's."""
    writer = pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True, **options)
    try:
        yield writer
    except BaseException:
        with suppress(OSError):  # a full disk refuses the footer too
            writer.close()
        raise
    writer.close()


def refuse_doubles(names: Iterable[str], path: Path | str) -> None:
    """Raise UserError for a column name that stands twice; empty ones may."""
    doubles = [name for name, number in Counter(names).items() if number > 1 and name]
    if doubles:
        raise UserError(f"{path} has several columns {doubles[0]!r}. Rename all but one.")


def require_columns(path: Path, schema: pa.Schema, columns: Sequence[str]) -> None:
    """Raise UserError naming every column of `columns` that the file lacks."""
    missing = [column for column in columns if column not in schema.names]
    if missing:
        named, present = (", ".join(map(repr, names)) for names in (missing, schema.names))
        raise UserError(f"{path} has no column {named}; its columns are {present}.")


@dataclass(frozen=True)
class Ragged:
    """Lists of integers as two arrays: list i is `values[lengths[:i].sum():][:lengths[i]]`."""

    values: np.ndarray  # (sum of lengths,) integer
    lengths: np.ndarray  # (lists,) int64


def is_text(kind: pa.DataType) -> bool:
    """Whether a column's type is text, in any of Arrow's ways to hold it."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def is_list(kind: pa.DataType) -> bool:
    """Whether a column's type is a list, of any size of offsets or of a fixed size."""
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def is_integer_list(kind: pa.DataType) -> bool:
    """Whether a column's type is a list of integers."""
    return is_list(kind) and pa.types.is_integer(kind.value_type)


def ragged_integers(batch: pa.RecordBatch, column: str, path: Path, first_row: int) -> Ragged:
    """A list-of-integers column as numpy arrays, without copying.

    Raises:
        UserError: the column holds something else, or a null; the message names the row.
    """
    lists = batch.column(column)
    if not is_integer_list(lists.type):
        raise UserError(
            f"{path}: column {column!r} is {lists.type}; it must be a list of integers."
        )
    if lists.null_count:
        raise UserError(
            f"{path}: column {column!r} is null in row {first_row + first_true(lists.is_null())}."
        )
    if pa.types.is_fixed_size_list(lists.type):
        lists = lists.cast(pa.large_list(lists.type.value_type))
    offsets = lists.offsets.to_numpy().astype(np.int64)
    values = lists.values.slice(offsets[0], offsets[-1] - offsets[0])
    lengths = np.diff(offsets)
    if values.null_count:
        row = first_row + row_of_value(lengths, first_true(values.is_null()))
        raise UserError(f"{path}: column {column!r} holds a null in the list of row {row}.")
    return Ragged(values.to_numpy(), lengths)


def first_true(mask: pa.BooleanArray | np.ndarray) -> int:
    """Index of the first true item."""
    return int(
        np.argmax(mask if isinstance(mask, np.ndarray) else mask.to_numpy(zero_copy_only=False))
    )


def row_of_value(lengths: np.ndarray, index: int) -> int:
    """The list that the flat value at `index` lies in, for lists of the given lengths."""
    return int(np.searchsorted(np.cumsum(lengths), index, side="right"))
