"""Scores of queries become rows: cuts beside the uncut model and baselines, language by language.

Letters: M systems, Q queries of a task.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ml_embed.evaluation.intervals import (
    Resamples,
    difference,
    holm,
    interaction,
    resample,
)
from ml_embed.evaluation.query_scores import METRICS, QueryScores
from ml_embed.model_folders.cut import Cut, single_axes

MAIN, RECALL = METRICS
BASELINE, UNCUT = "baseline", "uncut"
LEVEL = 0.05
"""Where a p-value, after Holm's rule, is below it, two systems are told apart."""
ALL = "all languages"


@dataclass(frozen=True)
class ScoredLanguage:
    """What M systems achieve in one language."""

    language: str
    resource_class: int | None
    columns: Sequence[dict[str, Any]]
    """of each system: its name and sizes, as they stand in a row"""
    whole: Cut
    scores: Mapping[str, Sequence[QueryScores]]
    """task -> of each system"""

    def values(self, metric: str) -> list[np.ndarray]:
        """(M, Q) of each task."""
        return [np.stack([own.values[metric] for own in of]) for of in self.scores.values()]

    @property
    def queries(self) -> int:
        return sum(len(of[0].queries) for of in self.scores.values())


def rows_of_language(scored: ScoredLanguage, seed: int) -> list[dict[str, Any]]:
    """A row per system of a language: each task counts the same.

    A row has the columns of its system, ndcg_at_10, recall_at_100, queries, "tasks" (task -> its
    two scores and queries), "ratio" to the uncut model, "against" ("uncut" or a baseline ->
    "difference" as [value, low, high], and "p"), and where several axes are cut "interaction".
    """
    values = {metric: scored.values(metric) for metric in METRICS}
    rows = compared(scored.columns, scored.whole, resample(values[MAIN], seed=seed))
    for number, row in enumerate(rows):
        tasks = {
            task: {metric: float(values[metric][place][number].mean()) for metric in METRICS}
            | {"queries": len(of[number].queries)}
            for place, (task, of) in enumerate(scored.scores.items())
        }
        row[RECALL] = float(np.mean([of[RECALL] for of in tasks.values()]))
        row |= {"queries": scored.queries, "tasks": tasks}
    return rows


def macro_rows(languages: Sequence[ScoredLanguage], seed: int) -> list[dict[str, Any]]:
    """A row per group of languages and system: each language counts the same.

    Groups are all languages, and those of each resource class. The rows are those of
    `rows_of_language`, with "group" and "languages" instead of a language. Languages in which a
    task's queries have the same names ask the same questions, which are drawn together.
    """
    groups = {ALL: list(languages)}
    for number in sorted({of.resource_class for of in languages} - {None}, key=str):
        groups[f"class {number}"] = [of for of in languages if of.resource_class == number]
    unknown = [of for of in languages if of.resource_class is None]
    if unknown and len(unknown) < len(languages):
        groups["class unknown"] = unknown
    rows = []
    for group, members in groups.items():
        values = {m: [own for of in members for own in of.values(m)] for m in METRICS}
        weights = [1 / len(of.scores) for of in members for _ in of.scores]
        asked = [(task, own[0].queries) for of in members for task, own in of.scores.items()]
        columns = [
            {
                key: value
                for key, value in column.items()
                if key not in ("language", "texts_per_second")
            }
            for column in members[0].columns
        ]
        drawn = resample(values[MAIN], weights, seed=seed, queries=asked)
        found = compared(columns, members[0].whole, drawn)
        recall = np.average([own.mean(axis=1) for own in values[RECALL]], axis=0, weights=weights)
        for number, row in enumerate(found):
            row |= {RECALL: float(recall[number]), "queries": sum(of.queries for of in members)}
            for comparison in row.get("against", {}).values():
                comparison["verdict"] = verdict(comparison["difference"][0], comparison["p"])
            rows.append({"group": group, "languages": [of.language for of in members]} | row)
    return rows


def compared(
    columns: Sequence[Mapping[str, Any]], whole: Cut, drawn: Resamples
) -> list[dict[str, Any]]:
    """A row per system, with what it is compared to."""
    cuts = {
        Cut.of_row(column): place for place, column in enumerate(columns) if BASELINE not in column
    }
    places = {UNCUT: cuts[whole]} | {
        column[BASELINE]: place for place, column in enumerate(columns) if BASELINE in column
    }
    rows = []
    for place, column in enumerate(columns):
        quality, uncut = (float(drawn.means[each]) for each in (place, cuts[whole]))
        row = dict(column) | {MAIN: quality, "ratio": quality / uncut if uncut else math.nan}
        if BASELINE not in column:
            row["against"] = {
                name: _against(drawn, place, other)
                for name, other in places.items()
                if other != place
            }
            own = Cut.of_row(column)
            alone = single_axes(own, whole)
            if sum(each != whole for each in alone) > 1:
                chosen = [cuts[each] for each in (own, *alone, whole)]
                row["interaction"] = drawn.of(chosen).interval(interaction).to_list()
        rows.append(row)
    return rows


def _against(drawn: Resamples, place: int, other: int) -> dict[str, Any]:
    found = drawn.of([place, other]).interval(difference)
    return {"difference": found.to_list(), "p": found.p}


def adjust_over_languages(rows: Sequence[dict[str, Any]]) -> None:
    """Add "p_holm" to each comparison: Holm's rule over the languages of one cut and reference.

    Also "verdict": better, worse, or cannot be told apart.
    """
    families: dict[tuple[Cut, str], list[dict[str, Any]]] = {}
    for row in rows:
        for name, comparison in row.get("against", {}).items():
            families.setdefault((Cut.of_row(row), name), []).append(comparison)
    for family in families.values():
        adjusted = holm([comparison["p"] for comparison in family])
        for comparison, p in zip(family, adjusted, strict=True):
            comparison |= {"p_holm": p, "verdict": verdict(comparison["difference"][0], p)}


def verdict(value: float, p: float) -> str:
    """A difference in words."""
    if not p < LEVEL:
        return "cannot be told apart"
    return "better" if value > 0 else "worse"
