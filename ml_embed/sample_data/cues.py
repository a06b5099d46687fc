"""What trivial cues alone achieve on evaluation rows: a trained model has to beat these, not only chance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache

TIE_TOLERANCE = 1e-12


def cue_accuracy(rows: Iterable[dict]) -> dict[str, dict[str, float]]:
    """Per split: rows, chance, and the share of rows that two guesses get right (ties count their chance).

    "length": the candidate whose length in characters is closest to the query's.
    "trigrams": the candidate with the highest Jaccard overlap of (case-folded) character 3-grams with the query.
    """
    by_split: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        by_split[row["split"]].append(row)
    return {
        split: {
            "rows": len(members),
            "chance": sum(1 / len(row["candidates"]) for row in members) / len(members),
            "length": sum(_hit(row, _closeness) for row in members) / len(members),
            "trigrams": sum(_hit(row, _overlap) for row in members) / len(members),
        }
        for split, members in by_split.items()
    }


def _hit(row: dict, score: Callable[[str, str], float]) -> float:
    """1 if the passage scores highest, 1/k if k candidates tie with it at the top, otherwise 0."""
    scores = [score(row["query"], candidate) for candidate in row["candidates"]]
    best = [index for index, value in enumerate(scores) if value >= max(scores) - TIE_TOLERANCE]
    return (row["position"] in best) / len(best)


def _closeness(query: str, candidate: str) -> float:
    return -abs(len(query) - len(candidate))


def _overlap(query: str, candidate: str) -> float:
    a, b = _trigrams(query), _trigrams(candidate)
    return len(a & b) / max(len(a | b), 1)


@lru_cache(maxsize=10_000)
def _trigrams(text: str) -> frozenset[str]:
    text = text.casefold()
    return frozenset(text[i : i + 3] for i in range(len(text) - 2))
