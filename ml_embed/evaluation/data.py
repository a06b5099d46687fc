"""What a model is tested on: queries, each with one right passage among others.

The others are candidates of the query's own, or a corpus.

Letters: Q queries, C candidates of a query, N documents of a corpus, P pairs, D vector length.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ml_embed.config import DatasetConfig
from ml_embed.data.convert import UNDETERMINED
from ml_embed.errors import UserError
from ml_embed.evaluation.metrics import ranks_of_positives, ranks_of_scores
from ml_embed.files.parquet import open_parquet, read_batches, require_columns
from ml_embed.prepare.prompts import prompt_of_input
from ml_embed.prepare.raw import (
    RawDataset,
    check_and_count_rows,
    files_passed_over,
    list_raw_datasets,
    read_rows,
    say_passed_over,
)

ROLES: tuple[Literal["query", "document"], ...] = ("query", "document")
CANDIDATES = "candidates"
WHOLE = "all"
"""The split of data that has none."""
GATHERED_VECTORS = 65536
"""Candidates gathered at a time: at 1,024 dims in float32, 256 MB."""


@dataclass
class Texts:
    """Every distinct text once, by number."""

    texts: list[str] = field(default_factory=list)
    _number: dict[str, int] = field(default_factory=dict)

    def number(self, text: str) -> int:
        number = self._number.setdefault(text, len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
        return number

    def numbers(self, texts: Iterable[str]) -> list[int]:
        return [self.number(text) for text in texts]


@dataclass(frozen=True)
class CandidateSet:
    """Each query chooses among candidates of its own."""

    dataset: str
    split: str
    queries: Tensor  # (Q,) text numbers
    candidates: Tensor  # (Q, C) text numbers; -1 where a query has fewer
    positive: Tensor  # (Q,) columns of `candidates`

    @property
    def sizes(self) -> np.ndarray:
        """(Q,) how many documents each query chooses among."""
        return (self.candidates >= 0).sum(1).numpy()

    def ranks(self, vectors: Tensor, queries_vectors: Tensor | None = None) -> Tensor:
        """(Q,) rank of each query's passage.

        Args:
            vectors: (texts, D) unit vectors of all texts.
            queries_vectors: the same for texts as queries; None is `vectors`.
        """
        asking = vectors if queries_vectors is None else queries_vectors
        ranks = []
        for rows in torch.arange(len(self.queries)).split(
            max(1, GATHERED_VECTORS // self.candidates.shape[1])
        ):
            numbers = self.candidates[rows].to(vectors.device)
            queries = asking[self.queries[rows].to(vectors.device)]
            scores = torch.einsum("qd,qcd->qc", queries, vectors[numbers.clamp(min=0)])
            scores = scores.masked_fill(numbers < 0, -torch.inf)
            ranks.append(ranks_of_scores(scores.cpu(), self.positive[rows]))
        return torch.cat(ranks)


@dataclass(frozen=True)
class CorpusSet:
    """Each query searches the whole corpus."""

    dataset: str
    split: str
    queries: Tensor  # (Q,) text numbers
    corpus: Tensor  # (N,) text numbers
    positive: Tensor  # (Q,) rows of `corpus`
    excluded: Tensor  # (P, 2) query and corpus rows that do not compete
    languages: tuple[str, ...]
    """codes of the rows' languages, "und" for rows without one"""
    query_languages: Tensor  # (Q,) places in `languages`
    document_languages: Tensor  # (pairs, 2) corpus rows, and places in `languages` of their rows

    @property
    def sizes(self) -> np.ndarray:
        """(Q,) how many documents each query chooses among."""
        return len(self.corpus) - np.bincount(
            self.excluded[:, 0].numpy(), minlength=len(self.queries)
        )

    def ranks(self, vectors: Tensor, queries_vectors: Tensor | None = None) -> Tensor:
        """As `CandidateSet.ranks`."""
        asking = vectors if queries_vectors is None else queries_vectors
        queries = asking[self.queries.to(vectors.device)]
        documents = vectors[self.corpus.to(vectors.device)]
        return ranks_of_positives(queries, documents, self.positive, excluded=self.excluded)


TestSet = CandidateSet | CorpusSet


def read_test_sets(path: Path, max_queries: int | None = None) -> tuple[Texts, list[TestSet]]:
    """The test sets of a file, or of every file of a folder, and their texts.

    A parquet file with the columns query, passage, candidates (list of strings, the passage among
    them) and, optionally, split gives one candidate set per split. Any other file is raw data
    (query, passage, negatives): its corpus is all its passages and negatives; a query's other
    passages, and its own text, do not compete.

    Args:
        path: a file or a folder.
        max_queries: rows taken of a raw dataset, evenly spaced, with their passages and negatives;
            None is all.

    Raises:
        UserError: nothing to read, a broken file or row, or a passage that is not among its
            candidates.
    """
    if not path.exists():
        raise UserError(
            f"evaluation data {path} does not exist; give a .parquet or .jsonl file, or a folder "
            "of them"
        )
    datasets = list_raw_datasets(path) if path.is_dir() else [RawDataset(path.stem, path)]
    if path.is_dir():
        say_passed_over(files_passed_over(path, datasets))
    texts = Texts()
    sets: list[TestSet] = []
    for dataset in datasets:
        if has_candidates(dataset.path):
            sets += _candidate_sets(dataset, texts)
        else:
            sets.append(_corpus_set(dataset, texts, max_queries))
    return texts, sets


def prompts_of(
    dataset: str, prompts: Mapping[str, str], datasets: Mapping[str, DatasetConfig]
) -> dict[str, str]:
    """What stands in front of a dataset's queries ("query") and documents ("document"); "" is none.

    Args:
        dataset: its name.
        prompts: the model's saved ones. A query gets the one that has the name of its dataset, or
            else "query"; a document gets "document".
        datasets: of a config; what it says goes before the saved ones.
    """
    saved = {
        "query": prompts.get(dataset, prompts.get("query", "")),
        "document": prompts.get("document", ""),
    }
    said = {role: prompt_of_input(dataset, role, datasets) for role in ROLES}
    return saved | {role: prompt for role, prompt in said.items() if prompt is not None}


def behind_prompts(
    texts: Texts,
    sets: Sequence[TestSet],
    prompts: Mapping[str, str],
    datasets: Mapping[str, DatasetConfig] | None = None,
) -> tuple[Texts, list[TestSet]]:
    """Texts as a model reads them, and the test sets with these.

    Args:
        texts, sets: as `read_test_sets` gives them.
        prompts, datasets: see `prompts_of`.
    """
    spoken = Texts()

    def renumbered(numbers: Tensor, prompt: str) -> Tensor:
        found = [
            n if n < 0 else spoken.number(prompt + texts.texts[n])
            for n in numbers.flatten().tolist()
        ]
        return torch.tensor(found).reshape(numbers.shape)

    renewed: list[TestSet] = []
    for test_set in sets:
        front = prompts_of(test_set.dataset, prompts, datasets or {})
        documents = CANDIDATES if isinstance(test_set, CandidateSet) else "corpus"
        numbers: dict[str, Any] = {
            "queries": renumbered(test_set.queries, front["query"]),
            documents: renumbered(getattr(test_set, documents), front["document"]),
        }
        renewed.append(dataclasses.replace(test_set, **numbers))
    return spoken, renewed


def has_candidates(path: Path) -> bool:
    """Whether each row of an evaluation file has candidates of its own."""
    if path.suffix != ".parquet":
        return False
    with open_parquet(path) as file:
        return CANDIDATES in file.schema_arrow.names


def _candidate_sets(dataset: RawDataset, texts: Texts) -> list[CandidateSet]:
    with open_parquet(dataset.path) as file:
        require_columns(dataset.path, file.schema_arrow, ["query", "passage", CANDIDATES])
        columns = ["query", "passage", CANDIDATES, *({"split"} & set(file.schema_arrow.names))]
    by_split: dict[str, list[tuple[int, list[int], int]]] = {}
    number = 0
    for batch in read_batches(dataset.path, columns, 1024):
        for row in batch.to_pylist():
            candidates = list(dict.fromkeys(row[CANDIDATES] or ()))  # a text twice is one candidate
            where = f"{dataset.path}, row {number}"
            if not all(
                isinstance(text, str) for text in (row["query"], row["passage"], *candidates)
            ):
                raise UserError(f"{where}: query, passage and all candidates must be strings")
            if row["passage"] not in candidates:
                raise UserError(f"{where}: the passage is not among the candidates; add it")
            query, chosen = texts.number(row["query"]), texts.numbers(candidates)
            by_split.setdefault(row.get("split") or WHOLE, []).append(
                (query, chosen, candidates.index(row["passage"]))
            )
            number += 1
    if not number:
        raise UserError(f"{dataset.path} has no rows. Remove the file or fill it.")
    return [_padded(dataset.name, split, rows) for split, rows in by_split.items()]


def _padded(dataset: str, split: str, rows: list[tuple[int, list[int], int]]) -> CandidateSet:
    candidates = torch.full((len(rows), max(len(numbers) for _, numbers, _ in rows)), -1)
    for place, (_, numbers, _) in zip(candidates, rows, strict=True):
        place[: len(numbers)] = torch.tensor(numbers)
    queries, positive = (
        torch.tensor(column) for column in ([row[0] for row in rows], [row[2] for row in rows])
    )
    return CandidateSet(dataset, split, queries, candidates, positive)


def _corpus_set(dataset: RawDataset, texts: Texts, max_queries: int | None) -> CorpusSet:
    count = check_and_count_rows(dataset)
    selected = None
    if max_queries is not None and max_queries < count:
        selected = np.arange(max_queries) * count // max_queries
    corpus: dict[int, int] = {}  # text number -> row of the corpus
    passages: dict[int, list[int]] = {}  # query -> corpus rows of its passages, each once
    said = _RowLanguages()
    for row in read_rows(dataset, selected):
        places = [
            corpus.setdefault(n, len(corpus)) for n in texts.numbers([row.passage, *row.negatives])
        ]
        right = passages.setdefault(texts.number(row.query), [])
        if places[0] not in right:
            right.append(places[0])
        said.add(row.language, texts.number(row.query), places)
    queries: list[int] = []
    positive, excluded = [], []
    for query, right in passages.items():
        never_wrong = {*right, *([corpus[query]] if query in corpus else [])}
        for own in right:
            excluded += [(len(queries), other) for other in sorted(never_wrong - {own})]
            queries.append(query)
            positive.append(own)
    pairs = torch.tensor(excluded, dtype=torch.int64).reshape(-1, 2)
    asked = zip(queries, positive, strict=True)
    return CorpusSet(
        dataset.name,
        WHOLE,
        torch.tensor(queries),
        torch.tensor(list(corpus)),
        torch.tensor(positive),
        pairs,
        said.codes,
        torch.tensor([said.of_pairs[pair] for pair in asked]),
        torch.tensor(list(said.of_documents)),
    )


class _RowLanguages:
    """The languages of a raw dataset's rows."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self.of_pairs: dict[tuple[int, int], int] = {}
        """(query, corpus row of its passage) -> place of the language, of the first such row"""
        self.of_documents: dict[tuple[int, int], None] = {}
        """(corpus row, place of the language), each once"""

    def add(self, language: str | None, query: int, documents: Sequence[int]) -> None:
        """A row's query, and the corpus rows of its passage and negatives."""
        place = self._places.setdefault(language or UNDETERMINED, len(self._places))
        self.of_pairs.setdefault((query, documents[0]), place)
        self.of_documents.update(((document, place), None) for document in documents)

    @property
    def codes(self) -> tuple[str, ...]:
        return tuple(self._places)
