"""A raw dataset's distinct texts, and which documents are no negatives of a query.

No negatives are a query's own text and what the data pairs with it: the passages of all rows with
the same `query_id`, or else the same query text. Clustering data pairs texts of one kind, so there
all texts that are joined by any row or `query_id` are of one group, and none of it is a negative.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ml_embed.config import Task
from ml_embed.prepare.raw import RawDataset, read_rows

KEPT_COLUMNS = ("query_id", "language", "score", "pos_score")
"""Optional columns that stay true when a row gets other negatives."""


@dataclass(frozen=True)
class Corpus:
    """One dataset's distinct texts, held in memory, and which of them each row uses."""

    queries: list[str]
    documents: list[str]
    """passages and negatives"""
    query_of_row: np.ndarray  # (rows,) int64
    passage_of_row: np.ndarray  # (rows,) int64
    own_documents: Sequence[np.ndarray]
    """for each query, int64: the documents that are no negatives of it"""
    kept: list[dict[str, Any]] | None
    """what else each row holds that stays true with other negatives; None if none has anything"""


@dataclass
class _Texts:
    """What is known while rows are read: texts by first occurrence, and each row's."""

    queries: dict[str, int] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=dict)
    query_of_row: list[int] = field(default_factory=list)
    passage_of_row: list[int] = field(default_factory=list)
    named: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """query_id -> queries"""

    @property
    def in_both(self) -> list[tuple[int, int]]:
        """Queries whose text is a document, and that document."""
        known = self.documents
        return [(query, known[text]) for text, query in self.queries.items() if text in known]


def read_corpus(dataset: RawDataset, task: Task) -> Corpus:
    """Number a dataset's distinct queries and documents by first occurrence."""
    texts, kept = _Texts(), list[dict[str, Any]]()
    for row in read_rows(dataset):
        query = texts.queries.setdefault(row.query, len(texts.queries))
        texts.query_of_row.append(query)
        texts.passage_of_row.append(texts.documents.setdefault(row.passage, len(texts.documents)))
        for text in row.negatives:
            texts.documents.setdefault(text, len(texts.documents))
        if row.query_id is not None:
            texts.named[row.query_id].add(query)
        further = {name: getattr(row, name) for name in KEPT_COLUMNS}
        kept.append({name: value for name, value in further.items() if value is not None})
    own = _groups(texts) if task == "clustering" else _paired_documents(texts)
    return Corpus(
        list(texts.queries),
        list(texts.documents),
        np.array(texts.query_of_row),
        np.array(texts.passage_of_row),
        own,
        kept if any(kept) else None,
    )


def _paired_documents(texts: _Texts) -> list[np.ndarray]:
    """For each query, the documents that are paired with it, and its own text."""
    own: list[set[int]] = [set() for _ in texts.queries]
    for query, passage in zip(texts.query_of_row, texts.passage_of_row, strict=True):
        own[query].add(passage)
    for same in texts.named.values():
        together = set().union(*(own[query] for query in same))
        for query in same:
            own[query] |= together
    for query, document in texts.in_both:
        own[query].add(document)
    return [np.array(sorted(documents)) for documents in own]


def _groups(texts: _Texts) -> list[np.ndarray]:
    """For each query, the documents of its group; queries of one group share the array."""
    queries = len(texts.queries)
    parent = list(range(queries + len(texts.documents)))  # of queries, then of documents

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    pairs = [*zip(texts.query_of_row, texts.passage_of_row, strict=True), *texts.in_both]
    for query, document in pairs:
        parent[root(queries + document)] = root(query)
    for same in texts.named.values():
        first = next(iter(same))
        for query in same:
            parent[root(query)] = root(first)
    members: dict[int, list[int]] = defaultdict(list)
    for document in range(len(texts.documents)):
        members[root(queries + document)].append(document)
    groups = {group: np.array(documents) for group, documents in members.items()}
    return [groups[root(query)] for query in range(queries)]
