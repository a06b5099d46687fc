"""Parquet files of token ids, written block by block."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ml_embed.files.atomic import atomic_file
from ml_embed.files.parquet import parquet_writer
from ml_embed.prepare.rows import OPTIONAL_COLUMNS

QUERY_SCHEMA = pa.schema(
    [
        ("query_input_ids", pa.list_(pa.int32())),
        ("passage_doc_id", pa.int64()),
        ("negative_doc_ids", pa.list_(pa.int64())),
    ]
)
"""Of the query file, before the optional columns that the data has."""
CORPUS_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32()))])


def query_schema(optional: Sequence[str]) -> pa.Schema:
    """Of a query file with some of OPTIONAL_COLUMNS."""
    return pa.schema([*QUERY_SCHEMA, *(OPTIONAL_COLUMNS.field(name) for name in optional)])


@contextmanager
def token_file(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A file for `append_columns`; it appears whole when the block ends well.

    Equal blocks give equal bytes.
    """
    # Token ids are nearly random bits: dictionaries and statistics cost time and save nothing.
    options = {"use_dictionary": False, "write_statistics": False}
    with atomic_file(path) as partial, parquet_writer(partial, schema, **options) as writer:
        yield writer


def append_columns(file: pq.ParquetWriter, columns: Sequence[pa.Array]) -> None:
    """Append one row group, unless it has no rows."""
    table = pa.Table.from_arrays(list(columns), schema=file.schema)
    if table.num_rows:
        file.write_table(table, row_group_size=table.num_rows)


def list_array(lengths: Sequence[int], values: np.ndarray) -> pa.ListArray:
    """Consecutive pieces of `values` of the given lengths."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def text_array(texts: Sequence[np.ndarray]) -> pa.ListArray:
    """Token ids of texts, each (tokens,) int32."""
    return list_array([len(ids) for ids in texts], np.concatenate([np.empty(0, np.int32), *texts]))
