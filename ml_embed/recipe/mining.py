"""Hard negatives: for each query, documents of its dataset that are near it, but not too near.

The published filter (F2LLM-v2, arXiv 2603.19223): of the 100 nearest documents drop the first 5,
which are often right answers too; keep those that score below 0.8 and below 95 % of the positive's
score; take the best 24 of them.

The search is exact, or approximate for large corpora (ann.py); the scores that the filter sees are
exact in both.

Letters: Q queries of a block, N documents, K neighbours, M negatives, D vector length.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ml_embed.config import Task
from ml_embed.distributed.collectives import compute_on_main_process
from ml_embed.distributed.shares import Rows, leads_its_machine
from ml_embed.errors import UserError
from ml_embed.inference.encoding import check_finite
from ml_embed.inference.text_models import TextModel
from ml_embed.notices import notice
from ml_embed.prepare.raw import read_rows, task_in_file
from ml_embed.prepare.rows import RawRow
from ml_embed.recipe import ann
from ml_embed.recipe.corpus import Corpus, read_corpus
from ml_embed.recipe.rewriting import Made, Rewriting, Todo, rewrite_folder
from ml_embed.recipe.search import nearest

ENCODED_BLOCK = 2048  # texts between two writes to disk (see `Rows.block`)
QUERY_BLOCK = 1024
VECTOR_SETTINGS = ("files", "query_prompt", "passage_prompt", "source")
"""What the vectors of an unfinished dataset depend on: other settings may change."""
NOT_MINED: Collection[Task] = ("classification", "similarity")
"""Tasks whose negatives are labels, or that have none."""
DROPPED = -2  # in place of a row's negatives: the row is left out
OWN_PAIRS = 2**22  # pairs of a query and a document that is not searched, in memory at a time


@dataclass(frozen=True)
class Filter:
    """Which neighbours count as hard negatives; the defaults are the published ones."""

    top: int = 100
    """nearest documents looked at; a query's own passages and its own text are none of them"""
    skip: int = 5
    """of those, how many of the nearest are dropped"""
    max_score: float = 0.8
    """cosine that a negative must be below"""
    max_ratio: float = 0.95
    """share of the positive's cosine that a negative's must be below"""
    count: int = 24
    """negatives kept at most, the nearest first"""
    keep_if_in_top: int = 0
    """drop a row unless its passage is among so many nearest; 0 = keep all rows"""

    def check(self) -> None:
        """Raise UserError for values that keep nothing or make no sense."""
        if self.count < 1:
            raise UserError(f"--count is {self.count}; it must be at least 1")
        if not 0 <= self.skip < self.top:
            raise UserError(
                f"--skip {self.skip} must be from 0 to less than --top {self.top}, or nothing is "
                "left"
            )
        if self.keep_if_in_top < 0:
            raise UserError(f"--keep-if-in-top is {self.keep_if_in_top}; take 0 (off) or more")
        for name in ("max_score", "max_ratio"):
            if not 0 < (value := getattr(self, name)) <= 2:
                raise UserError(
                    f"--{name.replace('_', '-')} is {value}; it must be above 0 and at most 2"
                )


def filter_neighbours(scores: Tensor, documents: Tensor, positive: Tensor, rule: Filter) -> Tensor:
    """Apply a filter.

    Args:
        scores, documents: (Q, K) cosines and document rows of the nearest, best first; -inf is
            none.
        positive: (Q,) cosine of each query's own passage.
    Returns:
        (Q, M) int64 document rows, nearest first, -1 where there are fewer than M; all DROPPED for
        a query whose passage is not among the nearest `keep_if_in_top`.
    """
    nearer = (scores[:, : rule.keep_if_in_top] > positive.unsqueeze(1)).sum(dim=1, keepdim=True)
    dropped = nearer >= rule.keep_if_in_top if rule.keep_if_in_top else nearer.bool()
    scores, documents = scores[:, rule.skip : rule.top], documents[:, rule.skip : rule.top]
    limit = (rule.max_ratio * positive).clamp(max=rule.max_score).unsqueeze(1)
    kept = (scores < limit) & (scores > -torch.inf)
    order = (~kept).int().argsort(dim=1, stable=True)[:, : rule.count]
    chosen = documents.gather(1, order).masked_fill(~kept.gather(1, order), -1)
    chosen = torch.nn.functional.pad(chosen, (0, rule.count - chosen.shape[1]), value=-1)
    return chosen.masked_fill(dropped, DROPPED)


@dataclass(frozen=True)
class MiningOptions:
    """What to mine, and how."""

    source: Path
    """folder of raw data; its negatives, if any, are documents like the passages"""
    output: Path
    """folder to write; each file appears whole or not at all"""
    rule: Filter = Filter()
    """which neighbours to keep"""
    query_prompt: str = ""
    passage_prompt: str = ""
    """put before the texts for the model; not written"""
    approximation: ann.Approximation | None = None
    """search datasets of `ann.FEWEST_DOCUMENTS` and more approximately; None = exactly"""
    overwrite: bool = False
    """make anew what was mined otherwise, and remove datasets that the input no longer has"""

    def check(self) -> None:
        """Raise UserError for values that make no sense."""
        self.rule.check()
        if self.approximation is not None:
            self.approximation.check()

    def settings(self, model: TextModel) -> dict[str, Any]:
        """All that the mined negatives depend on, beside the data."""
        prompts = {"query_prompt": self.query_prompt, "passage_prompt": self.passage_prompt}
        if self.approximation is None:
            search: dict[str, Any] = {"search": "exact"}
        else:
            search = {"search": "ann", **asdict(self.approximation)}
        return {"files": dict(model.identity), **prompts, **asdict(self.rule), **search}


def mine_folder(model: TextModel, options: MiningOptions, progress: bool = True) -> dict[str, Any]:
    """Write the datasets of a raw folder again with mined negatives; continues what was begun.

    Classification datasets, whose passages are labels, keep the negatives they have; so do pairs
    with graded scores.

    Memory: one dataset's texts, and blocks of vectors; all vectors of a dataset lie on disk while
    it is mined. The approximate search adds its codes (see ann.py).

    Args:
        model: gives the vectors.
        options: see there.
        progress: bars on stderr.
    Returns:
        the summary that is also written as mining.json: settings, and for each dataset rows and
        negatives found; with an approximation also how it was searched, and the share of the exact
        nearest that was found.
    Raises:
        UserError: data that cannot be read, a vector that is not finite, an output folder that
            holds something else, or faiss is missing.
    """
    options.check()

    def mine_dataset(todo: Todo) -> Made:
        if todo.task in NOT_MINED:
            return Made(read_rows(todo.raw), todo.task, {})
        return _Mining(model, options, todo.work, todo.made_of, progress).run(todo)

    settings = options.settings(model)
    rewriting = Rewriting(
        "mining", options.source, options.output, model.name, settings, options.overwrite
    )
    return rewrite_folder(rewriting, mine_dataset, progress=progress)


@dataclass(frozen=True)
class _Mining:
    """The mining of one dataset; `work` keeps what is done."""

    model: TextModel
    options: MiningOptions
    work: Path
    made_of: dict[str, Any]
    """the settings and the source"""
    progress: bool

    def run(self, todo: Todo) -> Made:
        """The dataset's rows with mined negatives, and what the summary says of the search."""
        corpus, name = read_corpus(todo.raw, todo.task), todo.raw.name
        query_prompt, passage_prompt = self.options.query_prompt, self.options.passage_prompt
        queries = self._vectors("queries", corpus.queries, query_prompt, name)
        documents = self._vectors("documents", corpus.documents, passage_prompt, name)
        nearest_documents, searched = self._prepare_search(corpus, queries, documents, name)

        at_once = max(1, OWN_PAIRS // max(map(len, corpus.own_documents)))

        def search(start: int, stop: int) -> np.ndarray:
            parts = (slice(at, min(at + at_once, stop)) for at in range(start, stop, at_once))
            return np.concatenate(
                [self._search(nearest_documents, corpus, queries, documents, p) for p in parts]
            )

        shape = len(corpus.query_of_row), self.options.rule.count
        file = Rows(self.work / "negatives.bin", np.int64, shape, QUERY_BLOCK, self.made_of)
        exact = nearest_documents is nearest
        negatives = file.fill(
            search,
            f"{name}: searching",
            self.progress,
            takes_part=exact or leads_its_machine(),  # the index takes much memory, and all cores
        )
        if self.options.rule.keep_if_in_top:
            dropped = int((negatives[:, 0] == DROPPED).sum())
            searched["rows_not_in_top"] = dropped
            self._say_dropped(name, dropped, len(corpus.query_of_row))
        return Made(_mined_rows(corpus, negatives), task_in_file(todo.raw), searched)

    def _say_dropped(self, name: str, dropped: int, rows: int) -> None:
        most = self.options.rule.keep_if_in_top
        if dropped == rows:
            raise UserError(
                f"{name}: no passage is among the {most} nearest of its query. Raise "
                "--keep-if-in-top, or take a --model that knows this data."
            )
        notice(
            f"{name}: {dropped:,} of {rows:,} rows dropped, their passage is not in the top {most}"
        )

    def _vectors(self, kind: str, texts: Sequence[str], prompt: str, name: str) -> np.ndarray:
        """(len(texts), D), memory-mapped."""

        def encode(start: int, stop: int) -> np.ndarray:
            prompted = [prompt + text for text in texts[start:stop]]
            vectors = self.model.encode(prompted)
            check_finite(vectors, prompted)
            return vectors

        shape, made_of = (len(texts), self.model.dim), self._made_of(VECTOR_SETTINGS)
        file = Rows(self.work / f"{kind}.bin", np.float32, shape, ENCODED_BLOCK, made_of)
        return file.fill(encode, f"{name}: encoding {kind}", self.progress)

    def _made_of(self, settings: Collection[str]) -> dict[str, Any]:
        return {name: self.made_of[name] for name in settings}

    def _prepare_search(
        self, corpus: Corpus, queries: np.ndarray, documents: np.ndarray, name: str
    ) -> tuple[ann.Search, dict[str, Any]]:
        """How to search, and what the summary says of it."""
        approximation, top = self.options.approximation, self.options.rule.top
        if approximation is None:
            return nearest, {}
        if len(documents) < ann.FEWEST_DOCUMENTS:
            reason = f"{len(documents)} documents are fewer than {ann.FEWEST_DOCUMENTS}"
            notice(f"{name}: searched exactly: {reason}")
            return nearest, {"search": "exact", "why_exact": reason}
        index = ann.ApproximateIndex(
            self.work,
            documents,
            approximation,
            self._made_of(VECTOR_SETTINGS),
            f"{name}: ",
            self.progress,
        )
        sample = ann.sample_queries(len(queries))

        def recall() -> float:
            vectors = torch.from_numpy(queries[sample]).to(self.model.device)
            return ann.recall(index.nearest, vectors, documents, top, _own_pairs(corpus, sample))

        share = compute_on_main_process(recall)
        notice(
            f"{name}: finds {share:.1%} of the exact {top} nearest ({len(sample)} queries, "
            f"--nprobe {approximation.nprobe} of {index.cells} cells); more cells find more"
        )
        return index.nearest, {
            "search": "ann",
            "cells": index.cells,
            "recall": round(share, 4),
            "recall_queries": len(sample),
        }

    def _search(
        self,
        search: ann.Search,
        corpus: Corpus,
        queries: np.ndarray,
        documents: np.ndarray,
        rows: slice,
    ) -> np.ndarray:
        """(Q, M) negatives of some rows."""
        numbers = corpus.query_of_row[rows]
        vectors = torch.from_numpy(queries[numbers]).to(self.model.device)
        own = torch.from_numpy(documents[corpus.passage_of_row[rows]]).to(self.model.device)
        rule = self.options.rule
        looked_at = max(rule.top, rule.keep_if_in_top)
        with torch.inference_mode():
            scores, found = search(vectors, documents, looked_at, _own_pairs(corpus, numbers))
            positive = (vectors * own).sum(1)
            return filter_neighbours(scores, found, positive, rule).cpu().numpy()


def _own_pairs(corpus: Corpus, queries: np.ndarray) -> Tensor:
    """(P, 2) places in `queries` and the documents that are no negatives of the query there."""
    own = [corpus.own_documents[query] for query in queries]
    places = np.repeat(np.arange(len(own)), [len(documents) for documents in own])
    return torch.from_numpy(np.stack([places, np.concatenate(own)], axis=1))


def _mined_rows(corpus: Corpus, negatives: np.ndarray) -> Iterator[RawRow]:
    """Rows with the documents that (rows, M) `negatives` names, -1 for none; not those DROPPED."""
    columns = (corpus.query_of_row, corpus.passage_of_row, negatives)
    kept: Iterable[dict[str, Any]] = corpus.kept or repeat({})
    for query, passage, chosen, further in zip(*columns, kept, strict=False):
        if chosen[0] == DROPPED:
            continue
        texts = [corpus.documents[number] for number in chosen if number >= 0]
        yield RawRow(corpus.queries[query], corpus.documents[passage], texts, **further)
