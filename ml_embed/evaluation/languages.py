"""Retrieval by language in one corpus of all languages: does a model prefer the query's own?

Letters: Q queries, N documents, L languages, P pairs, D vector length.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ml_embed.data.convert import UNDETERMINED
from ml_embed.errors import UserError
from ml_embed.evaluation.data import CorpusSet, TestSet
from ml_embed.evaluation.metrics import QUERIES_AT_ONCE, metrics_of_ranks, ranks_of_positives

NEAREST = 10
"""wrong documents of a query whose languages are looked at"""


@dataclass(frozen=True)
class MixedCorpus:
    """The queries and the documents of all corpora together, each text once."""

    languages: tuple[str, ...]
    """L codes, ascending"""
    queries: Tensor  # (Q,) text numbers
    query_languages: Tensor  # (Q,) places in `languages`
    corpus: Tensor  # (N,) text numbers
    positive: Tensor  # (Q,) rows of `corpus`
    excluded: Tensor  # (P, 2) query and corpus rows that do not compete
    spoken: Tensor  # (L, N) bool: documents that rows of each language have

    @classmethod
    def of(cls, test_sets: Iterable[TestSet], prompted: Iterable[TestSet]) -> "MixedCorpus":
        """From all corpora among some test sets.

        Right answers to the same query in another file, and its own text there, do not compete.

        Args:
            test_sets: with texts as they are, by which equal ones are found.
            prompted: the same with the texts that a model reads (`behind_prompts`).
        Raises:
            UserError: their rows are not in two languages or more.
        """
        sets, asked = (
            [own for own in given if isinstance(own, CorpusSet)] for given in (test_sets, prompted)
        )
        languages = sorted({code for own in sets for code in own.languages})
        if len(languages) < 2:
            raise UserError(
                "--by-language needs raw data whose rows say at least two languages in a column "
                f"language; found {', '.join(c for c in languages if c != UNDETERMINED) or 'none'}"
            )
        corpus: dict[int, int] = {}
        places = [
            torch.tensor([corpus.setdefault(n, len(corpus)) for n in own.corpus.tolist()])
            for own in sets
        ]
        read = torch.zeros(len(corpus), dtype=torch.int64)
        for own, at in zip(reversed(asked), reversed(places), strict=True):
            read[at] = own.corpus  # where prompts differ, the first file's counts
        to_place = [torch.tensor([languages.index(c) for c in own.languages]) for own in sets]
        positive = torch.cat([at[own.positive] for own, at in zip(sets, places, strict=True)])
        spoken = torch.zeros(len(languages), len(corpus), dtype=torch.bool)
        excluded: list[tuple[int, int]] = []
        first = 0
        for own, at, place in zip(sets, places, to_place, strict=True):
            query, document = own.excluded.unbind(1)
            excluded += zip((query + first).tolist(), at[document].tolist(), strict=True)
            rows, codes = own.document_languages.unbind(1)
            spoken[place[codes], at[rows]] = True
            first += len(own.queries)
        queries = torch.cat([own.queries for own in sets]).tolist()
        excluded += _never_wrong(queries, positive.tolist(), corpus)
        return cls(
            tuple(languages),
            torch.cat([own.queries for own in asked]),
            torch.cat([p[own.query_languages] for own, p in zip(sets, to_place, strict=True)]),
            read,
            positive,
            torch.tensor(sorted(set(excluded)), dtype=torch.int64).reshape(-1, 2),
            spoken,
        )

    def rows(self, vectors: Tensor, sizes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What queries of each language find.

        Args:
            vectors: (texts, D) unit vectors of all texts.
            sizes: of the cut, which stand in every row.
        Returns:
            one row per language with queries: language, queries, documents; metrics of searching
            all documents under "mixed", and those of the query's language under "within";
            own_language@10, the share of the query's language among the 10 nearest wrong
            documents, and own_language_share, that share of the corpus, which is what a model
            finds that does not look at the language.
        """
        queries = vectors[self.queries.to(vectors.device)]
        documents = vectors[self.corpus.to(vectors.device)]
        mixed = ranks_of_positives(queries, documents, self.positive, excluded=self.excluded)
        found = []
        for place in self.query_languages.unique().tolist():
            chosen = (self.query_languages == place).nonzero().flatten()
            within = self._ranks_within(place, chosen, queries, documents)
            found.append(
                {
                    **sizes,
                    "language": self.languages[place],
                    "queries": len(chosen),
                    "documents": int(self.spoken[place].sum()),
                    "mixed": metrics_of_ranks(mixed[chosen]),
                    "within": metrics_of_ranks(within),
                    f"own_language@{NEAREST}": self._own_share(place, chosen, queries, documents),
                    "own_language_share": float(self.spoken[place].double().mean()),
                }
            )
        return found

    def _ranks_within(
        self, place: int, chosen: Tensor, queries: Tensor, documents: Tensor
    ) -> Tensor:
        """The ranks of some queries' positives among the documents of their language."""
        kept = self.spoken[place].nonzero().flatten()
        row_of = torch.full((len(self.corpus),), -1).index_copy(0, kept, torch.arange(len(kept)))
        query_of = torch.full((len(self.queries),), -1)
        query_of = query_of.index_copy(0, chosen, torch.arange(len(chosen)))
        pairs = torch.stack([query_of[self.excluded[:, 0]], row_of[self.excluded[:, 1]]], dim=1)
        return ranks_of_positives(
            queries[chosen.to(queries.device)],
            documents[kept.to(documents.device)],
            row_of[self.positive[chosen]],
            excluded=pairs[(pairs >= 0).all(1)],
        )

    def _own_share(self, place: int, chosen: Tensor, queries: Tensor, documents: Tensor) -> float:
        """The mean share of a language among the nearest wrong documents of its queries."""
        shares = []
        for rows in chosen.split(QUERIES_AT_ONCE):
            scores = (queries[rows.to(queries.device)] @ documents.T).cpu()
            at = torch.searchsorted(rows, self.excluded[:, 0].contiguous()).clamp(max=len(rows) - 1)
            here = rows[at] == self.excluded[:, 0]
            scores[at[here], self.excluded[here, 1]] = -torch.inf
            scores[torch.arange(len(rows)), self.positive[rows]] = -torch.inf
            best, nearest = scores.topk(min(NEAREST, scores.shape[1]))
            wrong = best > -torch.inf
            own = (self.spoken[place][nearest] & wrong).sum(1) / wrong.sum(1).clamp(min=1)
            shares.append(own[wrong.any(1)])
        return float(torch.cat(shares).mean().nan_to_num())  # 0 if no document is wrong


def _never_wrong(
    queries: list[int], positive: list[int], corpus: Mapping[int, int]
) -> Iterable[tuple[int, int]]:
    """Pairs of a query's row with its own text's, and with right answers of equal queries."""
    right: dict[int, set[int]] = defaultdict(set)
    for text, document in zip(queries, positive, strict=True):
        right[text] |= {document, *([corpus[text]] if text in corpus else [])}
    for row, (text, own) in enumerate(zip(queries, positive, strict=True)):
        yield from ((row, other) for other in right[text] - {own})
