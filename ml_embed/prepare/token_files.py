"""Parquet files of token ids, written block by block under a partial name."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ml_embed.files.atomic import commit, partial_path

QUERY_SCHEMA = pa.schema(
    [
        ("query_input_ids", pa.list_(pa.int32())),
        ("passage_doc_id", pa.int64()),
        ("negative_doc_ids", pa.list_(pa.int64())),
    ]
)
CORPUS_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32()))])


class TokenFile:
    """A parquet file that gets its final name only on `commit`. Equal blocks give equal bytes."""

    def __init__(self, path: Path, schema: pa.Schema):
        self._path = path
        self._schema = schema
        # Token ids are nearly random bits: dictionaries and statistics cost time and save nothing.
        self._writer = pq.ParquetWriter(
            partial_path(path),
            schema,
            compression="zstd",
            use_dictionary=False,
            write_statistics=False,
        )

    def write(self, columns: Sequence[pa.Array]) -> None:
        """Append one row group, unless it has no rows."""
        table = pa.Table.from_arrays(list(columns), schema=self._schema)
        if table.num_rows:
            self._writer.write_table(table, row_group_size=table.num_rows)

    def commit(self) -> None:
        """Close, and give the file its final name."""
        self._writer.close()
        commit(self._path)

    def discard(self) -> None:
        """Close and remove what was written."""
        with suppress(OSError):  # a full disk refuses the footer too
            self._writer.close()
        partial_path(self._path).unlink(missing_ok=True)


def list_array(lengths: Sequence[int], values: np.ndarray) -> pa.ListArray:
    """Consecutive pieces of `values` of the given lengths."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def text_array(texts: Sequence[np.ndarray]) -> pa.ListArray:
    """Token ids of texts, each (tokens,) int32."""
    return list_array([len(ids) for ids in texts], np.concatenate([np.empty(0, np.int32), *texts]))
