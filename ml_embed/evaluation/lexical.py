"""BM25 on test sets: what the words, or the letters, that texts have in common find by themselves.

Letters: Q queries, C candidates of a query, N documents.
"""

import functools
import importlib.util
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ml_embed.errors import UserError
from ml_embed.evaluation.cube import MAX_QUERIES
from ml_embed.evaluation.data import CandidateSet, TestSet, read_test_sets
from ml_embed.evaluation.metrics import metrics_of_ranks, ranks_of_scores

NGRAMS = range(3, 6)
"""lengths of the pieces of a text that "characters" compares"""
WITHOUT_SPACES = {"Hans", "Hant", "Hani", "Jpan", "Khmr", "Laoo", "Mymr", "Thai", "Tibt"}
"""scripts that put no spaces between words"""
Pieces = Callable[[str], list[str]]


def require_bm25s() -> None:
    """Raises UserError where bm25s is not installed."""
    if importlib.util.find_spec("bm25s") is None:
        raise UserError(
            "the baseline bm25 needs bm25s, which is not installed; pip install 'ml-embed[bm25]'"
        )


def words(text: str) -> list[str]:
    """What stands between spaces, punctuation and symbols, in small letters."""
    # Not a pattern of letters: vowel signs of Indic scripts are none.
    return "".join(
        " " if unicodedata.category(c)[0] in "ZPSC" else c for c in text.casefold()
    ).split()


def ngrams(text: str) -> list[str]:
    """All pieces of 3, 4 and 5 characters, in small letters; a space stands around the text."""
    text = f" {text.casefold()} "
    return [text[i : i + n] for n in NGRAMS for i in range(len(text) - n + 1)]


def pieces_of(language: str) -> Pieces:
    """Words, or for scripts without spaces between them, pairs of characters.

    Args:
        language: with its script, as mteb writes it: swa-Latn, jpn-Jpan.
    """
    return pairs_of_characters if language.partition("-")[2] in WITHOUT_SPACES else words


def pairs_of_characters(text: str) -> list[str]:
    """All pieces of two characters that stand between spaces, as Lucene cuts Chinese."""
    return [word[i : i + 2] for word in words(text) for i in range(max(1, len(word) - 1))]


METHODS: dict[str, Pieces] = {"bm25 words": words, "bm25 characters": ngrams}


def evaluate_bm25(
    data: str | Path, max_queries: int | None = MAX_QUERIES
) -> dict[str, list[dict[str, Any]]]:
    """BM25's retrieval metrics on every test set of `data`, which it reads as `evaluate_cube` does.

    Texts get no prompts. Documents that share nothing with a query tie. How often a piece occurs
    is counted in the whole corpus, other right answers included.

    Returns:
        "bm25 words" and "bm25 characters" -> one JSON-able object for each test set: dataset,
        split, recall@1, mrr@10, ndcg@10.
    Raises:
        UserError: bm25s is not installed, or the data cannot be read.
    """
    require_bm25s()
    texts, test_sets = read_test_sets(Path(data), max_queries)
    return {
        method: [
            {"dataset": test_set.dataset, "split": test_set.split}
            | metrics_of_ranks(_ranks(test_set, texts.texts, pieces))
            for test_set in test_sets
        ]
        for method, pieces in METHODS.items()
    }


def _ranks(test_set: TestSet, texts: Sequence[str], pieces: Pieces) -> np.ndarray:
    """(Q,) rank of each query's passage."""

    @functools.lru_cache(maxsize=64)  # queries share a corpus, or candidates in another order
    def index(numbers: tuple[int, ...]) -> "Bm25Index":
        return Bm25Index([pieces(texts[number]) for number in numbers])

    excluded = _excluded(test_set)
    ranks = []
    for row, query in enumerate(test_set.queries.tolist()):
        numbers = _documents(test_set, row)
        order = np.argsort(numbers)
        scores = np.empty(len(numbers))
        scores[order] = index(tuple(numbers[order].tolist())).scores(pieces(texts[query]))
        scores[excluded[row]] = -np.inf
        positive = test_set.positive[row : row + 1].numpy()
        ranks.append(ranks_of_scores(scores[None], positive).item())
    return np.array(ranks)


def _documents(test_set: TestSet, row: int) -> np.ndarray:
    """The numbers (C,) of the texts that a query is compared with, in the test set's order."""
    if isinstance(test_set, CandidateSet):
        numbers = test_set.candidates[row].numpy()
        return numbers[numbers >= 0]  # what is missing stands last
    return test_set.corpus.numpy()


def _excluded(test_set: TestSet) -> list[list[int]]:
    """Of each query, the places of documents that do not compete: other right answers."""
    places: list[list[int]] = [[] for _ in range(len(test_set.queries))]
    for row, place in () if isinstance(test_set, CandidateSet) else test_set.excluded.tolist():
        places[row].append(place)
    return places


class Bm25Index:
    """BM25 (Lucene's form, k1 1.5, b 0.75) over N documents given as pieces."""

    def __init__(self, documents: list[list[str]]):
        import bm25s

        self._size = len(documents)
        self._bm25 = bm25s.BM25()
        self._known: set[str] = set().union(*documents)
        if self._known:
            self._bm25.index(documents, show_progress=False)

    def scores(self, query: list[str]) -> np.ndarray:
        """(N,), 0 where nothing is shared."""
        known = [piece for piece in query if piece in self._known]
        return self._bm25.get_scores(known) if known else np.zeros(self._size)
