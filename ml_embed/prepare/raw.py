"""Raw contrastive data: a folder of .parquet or .jsonl files, one file per dataset.

Columns: `query`, `passage`, and negatives as `negative_1 ... negative_K` or as one list
`negatives`. A null, absent or empty negative means "none in that place". An empty query or passage
is an error: nothing can be learned from it, and it is a sign of a column that was filled wrongly.
Errors name the row of a parquet file, counted from 0, or the line of a .jsonl file, counted from 1;
blank lines are no rows. Suffixes may be in capitals. All is read in bounded memory.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ml_embed.config import TASKS, Task
from ml_embed.errors import UserError
from ml_embed.files.parquet import open_parquet
from ml_embed.prepare.raw_parquet import BATCH_ROWS, TASK_METADATA, check_schema, read_parquet
from ml_embed.prepare.rows import RawRow, RowBatch, numbered_negatives, row_of

SUFFIXES = (".parquet", ".jsonl")
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
            check_schema(dataset.path, file.schema_arrow)
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
    for batch in read_parquet(dataset.path, selected):
        texts = batch.decode(range(len(batch.documents)))
        ends = np.cumsum(batch.counts).tolist()
        for query, (start, end) in zip(batch.queries, pairwise([0, *ends]), strict=True):
            yield RawRow(query, texts[start], texts[start + 1 : end])


def read_row_batches(dataset: RawDataset, selected: np.ndarray | None = None) -> Iterator[RowBatch]:
    """The same rows, BATCH_ROWS of them at most at a time."""
    if dataset.is_parquet:
        yield from read_parquet(dataset.path, selected)
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
    numbered = numbered_negatives(list(record))
    if "negatives" in record and numbered:
        raise UserError(f"{where}: both 'negatives' and {numbered[0]!r}. Keep one form.")
    listed = ["negatives"] if "negatives" in record else []
    return row_of(record, {name: name for name in ("query", "passage", *listed, *numbered)}, where)


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
