"""Raw contrastive data: a folder of .parquet or .jsonl files, one file per dataset.

Columns: `query`, `passage`, and negatives as `negative_1 ... negative_K` or as one list
`negatives`. A null, absent or empty negative means "none in that place". An empty query or passage
is an error: nothing can be learned from it, and it is a sign of a column that was filled wrongly.
Optional: `query_id`, `language`, `score`, `pos_score` and `neg_scores` (`rows.OPTIONAL_COLUMNS`).
Errors name the row of a parquet file, counted from 0, or the line of a .jsonl file, counted from 1;
blank lines are no rows. Suffixes may be in capitals. All is read in bounded memory.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice, pairwise, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ml_embed.config import TASKS, Task
from ml_embed.data.tasks import task_of
from ml_embed.errors import UserError
from ml_embed.files.json_file import parse_json
from ml_embed.files.parquet import is_text, open_parquet
from ml_embed.notices import notice, warn
from ml_embed.prepare.raw_parquet import (
    BATCH_ROWS,
    NOTES_METADATA,
    TASK_METADATA,
    check_schema,
    faulty_rows,
    read_parquet,
)
from ml_embed.prepare.records import Reading, count_json_lines, json_lines, open_table
from ml_embed.prepare.rows import (
    OPTIONAL_NAMES,
    Faults,
    FaultyRow,
    RawRow,
    Record,
    RowBatch,
    good_rows,
    numbered_negatives,
    raw_columns,
    row_of,
)

SUFFIXES = (".parquet", ".jsonl")
SHOWN_NAMES = 5
MISSPELT = 0.8
"""How like a column's name another must be, as difflib measures it, to be asked after."""


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


def files_passed_over(folder: Path, datasets: Iterable[RawDataset]) -> list[str]:
    """Names of the visible files of a folder that are none of its datasets."""
    data = {dataset.path.name for dataset in datasets}
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and path.name[0] != "." and path.name not in data
    )


def say_passed_over(names: Sequence[str]) -> None:
    """A notice, if there are any."""
    if names:
        shown = ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
        notice(f"files passed over, being no data: {len(names):,} ({shown})")


def check_and_count_rows(dataset: RawDataset) -> int:
    """Rows of a dataset, after checking what can be checked without reading its texts.

    Columns that are not read are said.

    Raises UserError for a broken file, a missing column, a column of the wrong type, or no rows.
    """
    if dataset.is_parquet:
        footer = _footer(dataset.path)
        check_schema(dataset.path, footer.schema)
        rows, names = footer.metadata.num_rows, footer.schema.names
    else:
        rows = count_json_lines(dataset.path)
        names = _names_of_first_line(dataset.path)
    if rows == 0:
        raise UserError(f"{dataset.path} has no rows. Remove the file or fill it.")
    say_unread(dataset.path, names)
    return rows


def say_unread(path: Path, names: Sequence[str]) -> None:
    """A notice of columns that are not read; a warning of one that may be misspelt."""
    words = ("query", "passage", "negatives", *OPTIONAL_NAMES)
    unread = [name for name in names if name not in (*words, *numbered_negatives(names))]
    for name in unread:
        for meant in get_close_matches(name, words, 1, MISSPELT):
            warn(f"{path}: the column {name!r} is not read; did you mean {meant!r}?")
    if unread:
        notice(f"{path}: columns that are not read: {', '.join(map(repr, unread))}")


def _names_of_first_line(path: Path) -> list[str]:
    first = next(iter(json_lines(path)), None)
    return [] if first is None or isinstance(first.values, FaultyRow) else list(first.values)


class _Footer(NamedTuple):
    schema: pa.Schema
    metadata: pq.FileMetaData


def _footer(path: Path) -> _Footer:
    """What stands at the end of a parquet file; read once for calls that follow each other."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}.") from error
    return _read_footer(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(8)
def _read_footer(path: Path, size: int, changed: int) -> _Footer:
    with open_parquet(path) as file:
        return _Footer(file.schema_arrow, file.metadata)


def is_raw_layout(path: Path) -> bool:
    """Whether a .parquet or .jsonl file has the columns of raw data, and texts in them.

    What cannot be opened or has no rows counts as raw data, and is refused as such.
    """
    try:
        if path.suffix.lower() == ".parquet":
            columns = {field.name: field.type for field in _footer(path).schema}
            listed_as_text = is_text(columns.get("negatives", pa.null()))
        else:
            first = next(iter(json_lines(path)), None)
            if first is None or isinstance(first.values, FaultyRow):
                return True
            columns = dict(first.values)
            listed_as_text = isinstance(columns.get("negatives"), str)
    except UserError:
        return True
    return {"query", "passage"} <= columns.keys() and not listed_as_text


@dataclass(frozen=True)
class CheckedRows:
    """What a look at all rows of a raw file finds."""

    good: np.ndarray
    """sorted numbers of the rows that can be used"""
    optional: tuple[str, ...]
    """those of OPTIONAL_COLUMNS that the file has, in that order"""
    faulty: int


def check_all_rows(dataset: RawDataset, skip_bad_rows: bool = False) -> CheckedRows:
    """Look for rows that cannot be used.

    Raises:
        UserError: for all of them at once, unless they are skipped; or no row is good.
    """
    faults = Faults(str(dataset.path), skip_bad_rows)
    if _is_columnar(dataset):
        present = set(_footer(dataset.path).schema.names)
        rows, faulty = faulty_rows(dataset.path, faults)
        good = np.setdiff1d(np.arange(rows), faulty, assume_unique=True)
    else:
        present, numbers = set(), []
        for number, row in _numbered_rows(dataset, None, faults):
            numbers.append(number)
            present |= {name for name in OPTIONAL_NAMES if getattr(row, name) is not None}
        good = np.array(numbers, np.int64)
    if not len(good):
        raise UserError(f"{dataset.path} has no row that can be used.")
    return CheckedRows(
        good, tuple(name for name in OPTIONAL_NAMES if name in present), faults.count
    )


def task_in_file(dataset: RawDataset) -> Task | None:
    """The task that a parquet file names in its metadata; None where it names none."""
    if not dataset.is_parquet:
        return None
    said = (_footer(dataset.path).schema.metadata or {}).get(TASK_METADATA, b"").decode()
    return said if said in TASKS else None


def task_of_raw(dataset: RawDataset) -> Task:
    """The task that training takes where the config names none.

    Similarity if all rows have a score, else what the file says, else that of the name.
    """
    rows = read_rows(dataset, faults=Faults(str(dataset.path), skip=True))
    scored = (row.score is not None for row in rows)
    if next(scored, False) and all(scored):  # ends at the first that has none
        return "similarity"
    return task_in_file(dataset) or task_of(dataset.name)


def notes_in_file(dataset: RawDataset) -> dict[str, Any]:
    """What `write_raw` noted in a parquet file; {} in any other."""
    if not dataset.is_parquet:
        return {}
    said = (_footer(dataset.path).metadata.metadata or {}).get(NOTES_METADATA, b"{}")
    try:
        notes = parse_json(said)
    except ValueError as error:
        raise UserError(f"{dataset.path}: its notes are damaged ({error}).") from None
    return notes if isinstance(notes, dict) else {}


def describe_source(path: Path) -> dict[str, Any]:
    """Name, size in bytes and SHA-256 of a raw file."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}.") from error
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}


def read_rows(
    dataset: RawDataset, selected: np.ndarray | None = None, faults: Faults | None = None
) -> Iterator[RawRow]:
    """The rows of a dataset in file order.

    Args:
        dataset: the file.
        selected: sorted numbers of the rows that are wanted; None = all.
        faults: takes faulty rows; None = they are refused.
    Raises:
        UserError: rows are faulty; the message names them.
    """
    faults = faults or Faults(str(dataset.path))
    if not _is_columnar(dataset):
        for _, row in _numbered_rows(dataset, selected, faults):
            yield row
        return
    for batch in read_parquet(dataset.path, selected, faults):
        texts = batch.decode(range(len(batch.documents)))
        ends = np.cumsum(batch.counts).tolist()
        optional = [batch.optional.get(name, repeat(None)) for name in OPTIONAL_NAMES]
        bounds = pairwise([0, *ends])
        for query, (start, end), *others in zip(batch.queries, bounds, *optional, strict=False):
            yield RawRow(query, texts[start], texts[start + 1 : end], *others)


def read_row_batches(
    dataset: RawDataset, selected: np.ndarray | None = None, faults: Faults | None = None
) -> Iterator[RowBatch]:
    """The same rows, BATCH_ROWS of them at most at a time."""
    faults = faults or Faults(str(dataset.path))
    if _is_columnar(dataset):
        yield from read_parquet(dataset.path, selected, faults)
        return
    rows = (row for _, row in _numbered_rows(dataset, selected, faults))
    while batch := list(islice(rows, BATCH_ROWS)):
        texts = [text for row in batch for text in (row.passage, *row.negatives)]
        yield RowBatch(
            queries=[row.query for row in batch],
            documents=[text.encode() for text in texts],
            characters=np.array([len(text) for text in texts]),
            counts=np.array([1 + len(row.negatives) for row in batch]),
            where=str(dataset.path),
            optional={name: [getattr(row, name) for row in batch] for name in OPTIONAL_NAMES},
        )


def _is_columnar(dataset: RawDataset) -> bool:
    """Whether whole columns are read at once: parquet whose negatives have no scores."""
    return dataset.is_parquet and "neg_scores" not in _footer(dataset.path).schema.names


def _numbered_rows(
    dataset: RawDataset, selected: np.ndarray | None, faults: Faults
) -> Iterator[tuple[int, RawRow]]:
    """(number, row) of a file that is read row by row."""
    records = _records(dataset)
    if selected is not None:
        records = _chosen_records(records, selected)

    def rows_of(values: Mapping[str, Any], where: str) -> RawRow:
        return row_of(values, raw_columns(values, where), where)

    for record, row in good_rows(records, rows_of, faults):
        yield record.number, row


def _chosen_records(records: Iterable[Record], selected: np.ndarray) -> Iterator[Record]:
    wanted = iter(selected.tolist())
    next_row = next(wanted, None)
    for record in records:
        if next_row is None:
            return
        if record.number == next_row:
            yield record
            next_row = next(wanted, None)


def _records(dataset: RawDataset) -> Iterable[Record]:
    if not dataset.is_parquet:
        return json_lines(dataset.path)
    table = open_table(dataset.path, Reading())
    return table.read(raw_columns(table.names, table.path))
