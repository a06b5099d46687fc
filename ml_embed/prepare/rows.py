"""Rows of raw contrastive data, whatever file they come from: what they hold, and what is refused.

A format is one function from a file to `Record`s (`records`), and a tool's form one function from a
record to `RawRow`s (`forms`). Raw parquet gives `RowBatch`es instead (`raw_parquet`), because most
documents of a dataset are known already.
"""

import ast
import io
import math
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa

from ml_embed.errors import UserError
from ml_embed.files.json_file import parse_json

NEGATIVE_COLUMN = re.compile(r"negative_(\d+)")
OPTIONAL_COLUMNS = pa.schema(
    [
        ("query_id", pa.string()),
        ("language", pa.string()),
        ("score", pa.float32()),
        ("pos_score", pa.float32()),
        ("neg_scores", pa.list_(pa.float32())),
    ]
)
"""What rows may hold beside texts, as it stands in raw and tokenized data."""
OPTIONAL_NAMES = tuple(OPTIONAL_COLUMNS.names)
SHOWN_FAULTS = 5


class RawRow(NamedTuple):
    """One contrastive sample. No text is empty; what the data does not say is None."""

    query: str
    passage: str
    negatives: list[str]
    query_id: str | None = None
    """the same for all rows of one query"""
    language: str | None = None
    score: float | None = None
    """how similar the data says the pair is"""
    pos_score: float | None = None
    """a teacher's score of the pair"""
    neg_scores: list[float] | None = None
    """a teacher's score of each negative"""


class FaultyRow(UserError):
    """A row that cannot be used, though the rest of its file may be."""


@dataclass(frozen=True)
class Record:
    """A row as a file holds it."""

    where: str
    """file and row, for messages"""
    values: Mapping[str, Any] | FaultyRow
    """column -> value; or why the row cannot be read"""
    number: int = 0
    """of the row in its file, from 0"""


@dataclass
class Faults:
    """Counts the faulty rows of a file."""

    file: str
    skip: bool = False
    """leave them out instead of refusing the file"""
    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, fault: FaultyRow) -> None:
        self.count += 1
        if len(self.shown) < SHOWN_FAULTS:
            self.shown.append(str(fault))

    @property
    def tolerated(self) -> bool:
        """Whether rows are still of use."""
        return self.skip or not self.count

    def finish(self) -> None:
        """Raise UserError that shows the first faults, unless they are skipped or none."""
        if self.tolerated:
            return
        if self.count == 1:
            raise UserError(self.shown[0])
        lines = "\n".join(f"  - {fault}" for fault in self.shown)
        raise UserError(
            f"{self.file} has {self.count:,} faulty rows:\n{lines}\n"
            + ("  - ...\n" if self.count > len(self.shown) else "")
            + "Mend them, or leave them out with tokenize_data_qwen.py --skip-bad-rows."
        )


def good_rows(
    records: Iterable[Record], rows_of: Callable[[Mapping[str, Any], str], Any], faults: Faults
) -> Iterator[tuple[Record, Any]]:
    """Each record, and what `rows_of` makes of its values and place; faulty ones go to `faults`.

    Raises UserError at the end for all faulty rows of a file, unless they are skipped.
    """
    for record in records:
        try:
            if isinstance(record.values, FaultyRow):
                raise record.values
            made = rows_of(record.values, record.where)
        except FaultyRow as fault:
            faults.add(fault)
            continue
        if faults.tolerated:
            yield record, made
    faults.finish()


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
    optional: Mapping[str, list[Any]] = field(default_factory=dict)
    """column of OPTIONAL_COLUMNS -> (rows,); those that the file has"""

    def decode(self, documents: Iterable[int]) -> list[str]:
        """The texts of some of the documents. Raises UserError for what is not UTF-8."""
        return decoded((self.documents[i] for i in documents), self.where)


def row_of(
    record: Mapping[str, Any], columns: Mapping[str, str], where: str, text_is_list: bool = False
) -> RawRow:
    """The row that a record of any format holds.

    Args:
        record: column -> value.
        columns: query, passage, negatives, negative_1, query_id, ... -> the record's column of it.
        where: file and row, for messages.
        text_is_list: a plain text among `negatives` is one negative.
    Raises:
        FaultyRow: a column is missing, or a text is none or empty.
    """
    negatives = [
        value_of(record, column, where)
        for role, column in columns.items()
        if NEGATIVE_COLUMN.fullmatch(role)
    ]
    if "negatives" in columns:
        listed = value_of(record, columns["negatives"], where)
        negatives += list_of(listed, columns["negatives"], where, text_is_list)
    texts = [_checked_text(text, "negatives", where) for text in negatives]
    query, passage = (text_of(record, columns[role], where) for role in ("query", "passage"))
    row = RawRow(query, passage, [text for text in texts if text])
    given = {name: record.get(columns[name]) for name in OPTIONAL_NAMES if name in columns}
    if not given:
        return row

    def of(name: str) -> tuple[Any, str, str]:
        return given.get(name), columns.get(name, name), where

    return row._replace(
        query_id=query_id_of(*of("query_id")),
        language=_checked_text(*of("language")) or None,
        score=number_of(*of("score")),
        pos_score=number_of(*of("pos_score")),
        neg_scores=scores_of(given.get("neg_scores"), texts, where),
    )


def text_of(record: Mapping[str, Any], column: str, where: str) -> str:
    """A text that must be there. Raises FaultyRow, also for an empty one."""
    text = _checked_text(value_of(record, column, where), column, where)
    if not text:
        raise_empty(where, column, text)
    return text


def value_of(record: Mapping[str, Any], column: str, where: str) -> Any:
    """What stands in a column. Raises FaultyRow if there is no such column."""
    if column not in record:
        names = ", ".join(map(repr, record))
        raise FaultyRow(f"{where}: no column {column!r}; its columns are {names}.")
    return record[column]


def list_of(value: Any, column: str, where: str, text_is_list: bool = False) -> list[Any]:
    """A list, also one that is written as text: `["a", "b"]` or `['a', 'b']`.

    Args:
        value: what stands in the column.
        column: its name.
        where: file and row, for messages.
        text_is_list: any other text is the only item of a list.
    Raises:
        FaultyRow: it is nothing of that.
    """
    if value is None or value == "":
        return []
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("[") and text.endswith("]"):
            return _written_list(text, column, where)
        if text_is_list:
            return [value]
    if not isinstance(value, list):
        raise FaultyRow(
            f"{where}: {column!r} is {type(value).__name__}; it must be a list of strings."
        )
    return value


def _written_list(text: str, column: str, where: str) -> list[Any]:
    try:
        try:
            listed = parse_json(text)
        except ValueError:
            listed = ast.literal_eval(text)
            strings = sum(
                token.type == tokenize.STRING
                for token in tokenize.generate_tokens(io.StringIO(text).readline)
            )
            if strings and strings != len(listed):  # ['a' 'b'], as numpy writes it, reads as 'ab'
                raise ValueError("no comma between two strings") from None
    except (ValueError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise FaultyRow(
            f"{where}: {column!r} looks like a list written as text, but cannot be read as one "
            f'({type(error).__name__}). Write it as JSON: ["a", "b"].'
        ) from None
    if not isinstance(listed, list):
        raise FaultyRow(f"{where}: {column!r} is no list of strings.")
    return listed


def number_of(value: Any, column: str, where: str) -> float | None:
    """A finite number, also one that is written as text; None for nothing. Raises FaultyRow."""
    if value is None or value == "":
        return None
    try:
        if isinstance(value, bool | list | dict):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise FaultyRow(f"{where}: {column!r} is {value!r}; it must be a number.") from None
    if math.isinf(number):
        raise FaultyRow(f"{where}: {column!r} is {number}; it must be a finite number.")
    return None if math.isnan(number) else number


def scores_of(value: Any, texts: Sequence[str | None], where: str) -> list[float] | None:
    """The scores of those texts that are not empty, given for all of them or for those alone."""
    if value is None or value == "":
        return None
    scores = [
        number_of(score, "neg_scores", where) for score in list_of(value, "neg_scores", where)
    ]
    there = [bool(text) for text in texts]
    if len(scores) == len(there):
        scores = [score for score, is_there in zip(scores, there, strict=True) if is_there]
    if len(scores) != sum(there) or any(score is None for score in scores):
        raise FaultyRow(
            f"{where}: {len(scores)} scores for {sum(there)} negatives; give one number for each."
        )
    return [score for score in scores if score is not None]


def query_id_of(value: Any, column: str, where: str) -> str | None:
    """The name of a query: a text or a whole number. Raises FaultyRow."""
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _checked_text(value, column, where)


def _checked_text(text: Any, column: str, where: str) -> str | None:
    if not isinstance(text, str | None):
        raise FaultyRow(f"{where}: {column!r} is {type(text).__name__} instead of a string.")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can spell
        raise FaultyRow(f"{where}: {column!r} is not valid Unicode ({error.reason}).") from error
    return text


def decoded(texts: Iterable[bytes | memoryview], where: str) -> list[str]:
    try:
        return [str(text, "utf-8") for text in texts]
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {error}.") from error


def numbered_negatives(names: Iterable[str]) -> list[str]:
    """negative_1, negative_2, ... in the order of their numbers."""
    return sorted(
        filter(NEGATIVE_COLUMN.fullmatch, names),
        key=lambda name: int(name.removeprefix("negative_")),
    )


def raw_columns(names: Iterable[str], where: str) -> Mapping[str, str]:
    """The columns of raw data among some, by their roles, which are their names.

    Raises:
        FaultyRow: negatives stand there in two forms.
    """
    columns, numbered = _raw_columns(tuple(names))
    if "negatives" in columns and numbered:
        raise FaultyRow(f"{where}: both 'negatives' and {numbered[0]!r}. Keep one form.")
    return columns


@lru_cache(64)
def _raw_columns(names: tuple[str, ...]) -> tuple[Mapping[str, str], list[str]]:
    """The columns, and those of them that hold one negative each."""
    numbered = numbered_negatives(names)
    optional = [name for name in ("negatives", *OPTIONAL_NAMES) if name in names]
    return {name: name for name in ("query", "passage", *numbered, *optional)}, numbered


def raise_empty(where: str, column: str, text: str | None) -> NoReturn:
    raise FaultyRow(
        f"{where}: {column!r} is {'null' if text is None else 'empty'}. Fill it or remove the row."
    )
