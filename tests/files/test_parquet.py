"""Columns of parquet files, in each of Arrow's ways to hold them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ml_embed.files.parquet import is_text, ragged_integers


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.int32(), 2)]
)
@pytest.mark.parametrize("start", [0, 1])
def test_lists_of_every_kind(kind, start):
    lists = [[1, 2], [3, 4], [5, 6]]
    batch = pa.record_batch({"ids": pa.array(lists, kind)}).slice(start)
    found = ragged_integers(batch, "ids", Path("x"), 0)
    assert np.array_equal(found.values, np.concatenate(lists[start:]))
    assert found.lengths.tolist() == [2] * (3 - start)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (pa.string(), True),
        (pa.large_string(), True),
        (pa.string_view(), True),
        (pa.dictionary(pa.int32(), pa.string()), True),
        (pa.binary(), False),
        (pa.int64(), False),
    ],
)
def test_text_of_every_kind(kind, text):
    assert is_text(kind) == text
