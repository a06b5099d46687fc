"""Rows of raw contrastive data, whatever file they come from: what they hold, and what is refused.

A format is one function from a file to `RawRow`s, each made of a record by `row_of`. Parquet gives
`RowBatch`es instead (`raw_parquet`), because most documents of a dataset are known already.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ml_embed.errors import UserError

NEGATIVE_COLUMN = re.compile(r"negative_(\d+)")


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
        return decoded((self.documents[i] for i in documents), self.where)


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
        raise_empty(where, column, text)
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


def decoded(texts: Iterable[bytes | memoryview], where: str) -> list[str]:
    try:
        return [str(text, "utf-8") for text in texts]
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {error}.") from error


def numbered_negatives(names: list[str]) -> list[str]:
    """negative_1, negative_2, ... in the order of their numbers."""
    return sorted(
        filter(NEGATIVE_COLUMN.fullmatch, names),
        key=lambda name: int(name.removeprefix("negative_")),
    )


def raise_empty(where: str, column: str, text: str | None) -> NoReturn:
    raise UserError(
        f"{where}: {column!r} is {'null' if text is None else 'empty'}. Fill it or remove the row."
    )
