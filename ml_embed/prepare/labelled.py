"""Labelled text as contrastive rows.

With two labels they are classification: a text, its label, the other label. With more they are
clustering: a text, another of its label, texts of other labels.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ml_embed.config import Task
from ml_embed.errors import UserError
from ml_embed.prepare.rows import Faults, FaultyRow, RawRow, Record, good_rows, text_of, value_of

MOST_NEGATIVES = 24  # as in the published data


@dataclass
class LabelledTexts:
    """Texts by their labels, each text once: under the first label it came with."""

    by_label: dict[str, list[str]]
    """sorted by label"""
    repeated: int = 0
    """texts that came again"""
    contradicted: int = 0
    """those of them that came with another label"""

    @property
    def task(self) -> Task:
        return "classification" if len(self.by_label) == 2 else "clustering"

    @property
    def alone(self) -> int:
        """Texts that are the only one of their label, and so have no positive."""
        if self.task == "classification":
            return 0
        return sum(len(texts) == 1 for texts in self.by_label.values())

    @property
    def alike(self) -> list[tuple[str, ...]]:
        """Labels that differ in space, case or the way a number is written alone."""
        groups: dict[str, list[str]] = defaultdict(list)
        for label in self.by_label:
            groups[_plain(label)].append(label)
        return [tuple(labels) for labels in groups.values() if len(labels) > 1]

    def rows(self, name: str, seed: int) -> Iterator[RawRow]:
        """Contrastive rows of the dataset `name`; the seed chooses positives and negatives."""
        if self.task == "classification":
            return _classification_rows(self.by_label)
        return _clustering_rows(self.by_label, name, seed)


def _plain(label: str) -> str:
    text = " ".join(label.split()).casefold()
    try:
        return str(float(text))
    except ValueError:
        return text


def texts_by_label(
    records: Iterable[Record],
    columns: Mapping[str, str],
    names: list[str] | None,
    faults: Faults,
) -> LabelledTexts:
    """Read labelled text into memory.

    Args:
        records: of a file.
        columns: "text" and "label" -> the column of it.
        names: of labels that are numbers, where the data has them.
        faults: takes the rows that cannot be used.
    Raises:
        UserError: there are fewer than two labels, or faulty rows.
    """

    def pair(values: Mapping[str, Any], where: str) -> tuple[str, str]:
        text = text_of(values, columns["text"], where)
        return text, _label(value_of(values, columns["label"], where), names, columns, where)

    by_label: dict[str, list[str]] = defaultdict(list)
    label_of: dict[str, str] = {}
    repeated = contradicted = 0
    for _, (text, label) in good_rows(records, pair, faults):
        if (former := label_of.get(text)) is None:
            label_of[text] = label
            by_label[label].append(text)
        else:
            repeated += 1
            contradicted += former != label
    if len(by_label) < 2:
        raise UserError(
            f"{faults.file}: column {columns['label']!r} has {len(by_label)} different labels; at "
            "least 2 are needed"
        )
    return LabelledTexts(dict(sorted(by_label.items())), repeated, contradicted)


def _label(value: Any, names: list[str] | None, columns: Mapping[str, str], where: str) -> str:
    column = columns["label"]
    if names and isinstance(value, int):
        value = names[value] if 0 <= value < len(names) else None
    if value is None or value == "":
        raise FaultyRow(f"{where}: {column!r} is empty. Fill it or remove the row")
    if not isinstance(value, str | int | float):
        raise FaultyRow(
            f"{where}: {column!r} is {type(value).__name__}; a label is one text or number. Write "
            "the part of it that is the label into a column of its own."
        )
    return str(value)


def _classification_rows(by_label: Mapping[str, list[str]]) -> Iterator[RawRow]:
    """A text, its label, the other label."""
    first, second = by_label
    for label, other in ((first, second), (second, first)):
        for text in by_label[label]:
            yield RawRow(text, label, [other])


def _clustering_rows(by_label: Mapping[str, list[str]], name: str, seed: int) -> Iterator[RawRow]:
    """A text, another of its label, texts of other labels, drawn again for each text.

    The label is the `query_id`, because all texts of a label are right answers to each other.
    Labels with a single text give no row: it has no positive.
    """
    rng = random.Random(f"{seed}/{name}")
    everything = [text for texts in by_label.values() for text in texts]
    start = 0
    for label, texts in by_label.items():
        # All but this label's texts, which begin at `start`.
        others = range(len(everything) - len(texts))
        for i, text in enumerate(texts if len(texts) > 1 else ()):
            positive = rng.randrange(len(texts) - 1)
            drawn = rng.sample(others, min(MOST_NEGATIVES, len(others)))
            negatives = [everything[place + len(texts) * (place >= start)] for place in drawn]
            yield RawRow(text, texts[positive + (positive >= i)], negatives, query_id=label)
        start += len(texts)
