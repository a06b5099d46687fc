"""What trivial cues alone achieve on evaluation rows: a trained model has to beat these, not only
chance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from statistics import fmean

TIE_TOLERANCE = 1e-12


def cue_accuracy(
    rows: Iterable[dict], declaration_lengths: Mapping[str, int] | None = None
) -> dict[str, dict[str, float]]:
    """Per split: rows, chance, and the share of rows that guesses by a trivial cue get right (ties
    count their chance).

    "length": the candidate whose length in characters is closest to the query's.
    "trigrams": the candidate with the highest Jaccard overlap of (case-folded) character 3-grams
        with the query.
    "relative_length", if `declaration_lengths` (language to characters) is given, for rows whose
    candidates are all in
    the passage's language: the candidate that is closest as a share of its language's whole
    declaration.
    """
    cues = {"length": _length_scores, "trigrams": _trigram_scores}
    if declaration_lengths is not None:
        cues["relative_length"] = partial(_relative_length_scores, declaration_lengths)
    by_split: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        by_split[row["split"]].append(row)
    return {
        split: {
            "rows": len(members),
            "chance": fmean(1 / len(row["candidates"]) for row in members),
            **{
                cue: fmean(_hit(row["position"], scores(row)) for row in members)
                for cue, scores in cues.items()
            },
        }
        for split, members in by_split.items()
    }


def _hit(position: int, scores: list[float]) -> float:
    """1 if the candidate at `position` scores highest, 1/k if k candidates tie with it at the top,
    otherwise 0."""
    best = [index for index, score in enumerate(scores) if score >= max(scores) - TIE_TOLERANCE]
    return (position in best) / len(best)


def _length_scores(row: dict) -> list[float]:
    return [-abs(len(row["query"]) - len(candidate)) for candidate in row["candidates"]]


def _relative_length_scores(declaration_lengths: Mapping[str, int], row: dict) -> list[float]:
    share = len(row["query"]) / declaration_lengths[row["query_language"]]
    total = declaration_lengths[row["passage_language"]]
    return [-abs(share - len(candidate) / total) for candidate in row["candidates"]]


def _trigram_scores(row: dict) -> list[float]:
    query = _trigrams(row["query"])
    others = [_trigrams(candidate) for candidate in row["candidates"]]
    return [len(query & other) / max(len(query | other), 1) for other in others]


@lru_cache(maxsize=10_000)
def _trigrams(text: str) -> frozenset[str]:
    text = text.casefold()
    return frozenset(text[i : i + 3] for i in range(len(text) - 2))
