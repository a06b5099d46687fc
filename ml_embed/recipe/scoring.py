"""A teacher's scores of each row's passage and negatives, for `kd_loss` "kl" and "margin_mse".

The rows are read in a stream. Scores lie on disk until a dataset is whole, and an interrupted run
makes only those that are missing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ml_embed.distributed.shares import Rows
from ml_embed.errors import UserError
from ml_embed.inference.encoding import check_finite
from ml_embed.inference.pair_models import PairModel
from ml_embed.notices import notice
from ml_embed.prepare.raw import RawDataset, check_all_rows, read_rows, task_in_file, task_of_raw
from ml_embed.prepare.rows import RawRow
from ml_embed.recipe.rewriting import Made, Rewriting, Todo, rewrite_folder

SCORED_BLOCK = 2048  # pairs between two writes to disk (see `Rows.block`)
SCORE_COLUMNS = ("pos_score", "neg_scores")


@dataclass(frozen=True)
class ScoringOptions:
    """What to score, and how."""

    source: Path
    """folder of raw data"""
    output: Path
    """folder to write; each file appears whole or not at all"""
    query_prompt: str = ""
    passage_prompt: str = ""
    """put before the texts for the model; not written"""
    replace_scores: bool = False
    """put the model's scores in the place of those that rows have"""
    overwrite: bool = False
    """make anew what was made otherwise, and remove datasets that the source no longer has"""


def score_folder(
    model: PairModel, options: ScoringOptions, progress: bool = True
) -> dict[str, Any]:
    """Write the datasets of a raw folder again with scores; continues what was begun.

    Similarity datasets, whose loss takes no negatives, are written as they are.

    Memory: a number per pair; texts are read in a stream.

    Args:
        model: gives the scores.
        options: see there.
        progress: bars on stderr.
    Returns:
        the summary that is also written as scoring.json: settings, and for each dataset rows,
        negatives, pairs scored, and the share of rows with negatives whose passage scores highest.
    Raises:
        UserError: data that cannot be read, rows that have scores, a score that is not finite, or
            an output folder that holds something else.
    """

    def score_dataset(todo: Todo) -> Made:
        if todo.task == "similarity":
            notice(f"{todo.raw.name}: not scored, its pairs have graded scores")
            return Made(read_rows(todo.raw), todo.task, {})
        return _score(model, options, todo, progress)

    def check(dataset: RawDataset) -> None:
        if not options.replace_scores:
            _refuse_scores(dataset)

    prompts = {"query_prompt": options.query_prompt, "passage_prompt": options.passage_prompt}
    settings = {"files": dict(model.identity), **prompts}
    rewriting = Rewriting(
        "scoring", options.source, options.output, model.name, settings, options.overwrite
    )
    return rewrite_folder(rewriting, score_dataset, check, progress)


def _refuse_scores(dataset: RawDataset) -> None:
    """Raise UserError if rows that would be scored have scores."""
    if task_of_raw(dataset) == "similarity":
        return
    present = [name for name in check_all_rows(dataset).optional if name in SCORE_COLUMNS]
    if present:
        raise UserError(
            f"{dataset.path} has {' and '.join(present)} already. Leave the file out of --data, "
            "or put the model's scores in their place with --replace-scores"
        )


def _score(model: PairModel, options: ScoringOptions, todo: Todo, progress: bool) -> Made:
    """Score a dataset. A collective."""
    candidates = np.array([1 + len(row.negatives) for row in read_rows(todo.raw)])
    pairs, shape = _Pairs(todo.raw), (int(candidates.sum()), 1)

    def score(start: int, stop: int) -> np.ndarray:
        taken = pairs.take(start, stop)
        queries = [options.query_prompt + query for query, _ in taken]
        documents = [options.passage_prompt + document for _, document in taken]
        scores = model.score(queries, documents)[:, None]
        shown = [f"{query} / {document}" for query, document in taken]
        check_finite(scores, shown, f"{model.name} gives NaN or infinity as a score")
        return scores

    file = Rows(todo.work / "scores.bin", np.float32, shape, SCORED_BLOCK, todo.made_of)
    scores = file.fill(score, f"{todo.raw.name}: scoring", progress)[:, 0]
    entry = {"pairs": len(scores), "passage_highest": _passage_highest(scores, candidates)}
    rows = _scored_rows(read_rows(todo.raw), scores, candidates)
    return Made(rows, task_in_file(todo.raw), entry)


class _Pairs:
    """The (query, document) of a file in order: of each row its passage, then its negatives."""

    def __init__(self, dataset: RawDataset):
        self._pairs = (
            (row.query, document)
            for row in read_rows(dataset)
            for document in (row.passage, *row.negatives)
        )
        self._position = 0

    def take(self, start: int, stop: int) -> list[tuple[str, str]]:
        """Pairs from `start` to `stop`; no earlier ones than before, as the file is read once."""
        assert start >= self._position, (start, self._position)
        taken = list(islice(self._pairs, start - self._position, stop - self._position))
        self._position = stop
        return taken


def _scored_rows(
    rows: Iterator[RawRow], scores: np.ndarray, candidates: np.ndarray
) -> Iterator[RawRow]:
    for row, end, count in zip(rows, np.cumsum(candidates), candidates, strict=True):
        positive, *negatives = scores[end - count : end].tolist()
        yield row._replace(pos_score=positive, neg_scores=negatives)


def _passage_highest(scores: np.ndarray, candidates: np.ndarray) -> float | None:
    """The share of rows with negatives whose passage scores above all of them; None without any."""
    starts = np.cumsum(candidates) - candidates
    others = np.array(scores)
    others[starts] = -np.inf
    higher = scores[starts] > np.maximum.reduceat(others, starts)
    with_negatives = candidates > 1
    return round(float(higher[with_negatives].mean()), 4) if with_negatives.any() else None
