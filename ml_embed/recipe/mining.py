"""Hard negatives: for each query, documents of its dataset that a model takes for near, but not for
too near.

The published filter (F2LLM-v2, arXiv 2603.19223): of the 100 nearest documents drop the first 5,
which are often right
answers too; keep those that score below 0.8 and below 95 % of the positive's score; take the best
24 of them.

The search is exact, or approximate for large corpora (ann.py); the scores that the filter sees are
exact in both.

Letters: Q queries of a block, N documents, K neighbours, M negatives, D vector length.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm import tqdm

from ml_embed.config import Task
from ml_embed.data.tasks import task_of
from ml_embed.errors import UserError
from ml_embed.files.arrays import RowFile, blocks
from ml_embed.files.atomic import commit, disk_errors_are_user_errors, partial_path, write_json
from ml_embed.files.locks import lock_folder
from ml_embed.inference.text_models import TextModel, check_finite
from ml_embed.notices import notice
from ml_embed.prepare.raw import (
    SCHEMA,
    TASK_METADATA,
    RawDataset,
    check_and_count_rows,
    declared_task,
    list_raw_datasets,
    read_rows,
)
from ml_embed.prepare.tokenization import describe_source
from ml_embed.recipe import ann
from ml_embed.recipe.search import nearest

SUMMARY = "mining.json"
LOCK = ".mining.lock"
WORK_SUFFIX = ".mining"
ENCODED_BLOCK = 8192  # texts between two writes to disk; what an interruption costs at most
QUERY_BLOCK = 1024
VECTOR_SETTINGS = ("model", "query_prompt", "passage_prompt", "source")
"""what the vectors of an unfinished dataset depend on; other settings can change without encoding
again"""
INDEX_SETTINGS = (*VECTOR_SETTINGS, "code_bits")


@dataclass(frozen=True)
class Filter:
    """Which neighbours count as hard negatives."""

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

    def check(self) -> None:
        """Raise UserError for values that keep nothing or make no sense."""
        if self.count < 1:
            raise UserError(f"--count is {self.count}; it must be at least 1")
        if not 0 <= self.skip < self.top:
            raise UserError(
                f"--skip {self.skip} must be from 0 to less than --top {self.top}, or nothing is "
                "left"
            )
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
        (Q, M) int64 document rows, nearest first, -1 where there are fewer than M.
    """
    scores, documents = scores[:, rule.skip : rule.top], documents[:, rule.skip : rule.top]
    limit = (rule.max_ratio * positive).clamp(max=rule.max_score).unsqueeze(1)
    kept = (scores < limit) & (scores > -torch.inf)
    order = (~kept).int().argsort(dim=1, stable=True)[:, : rule.count]
    chosen = documents.gather(1, order).masked_fill(~kept.gather(1, order), -1)
    return torch.nn.functional.pad(chosen, (0, rule.count - chosen.shape[1]), value=-1)


@dataclass(frozen=True)
class Corpus:
    """One dataset's distinct texts, held in memory, and which of them each row uses."""

    queries: list[str]
    documents: list[str]
    """passages and negatives"""
    query_of_row: np.ndarray  # (rows,) int64
    passage_of_row: np.ndarray  # (rows,) int64
    own_documents: list[list[int]]
    """for each query, the documents that are no negatives of it: all its passages, and its own
    text"""


def read_corpus(dataset: RawDataset) -> Corpus:
    """Number a dataset's distinct queries and documents by first occurrence."""
    queries: dict[str, int] = {}
    documents: dict[str, int] = {}
    query_of_row, passage_of_row = [], []
    own: list[list[int]] = []
    for row in read_rows(dataset):
        query = queries.setdefault(row.query, len(queries))
        places = [
            documents.setdefault(text, len(documents)) for text in (row.passage, *row.negatives)
        ]
        if query == len(own):
            own.append([])
        if places[0] not in own[query]:
            own[query].append(places[0])
        query_of_row.append(query)
        passage_of_row.append(places[0])
    for text, query in queries.items():
        if text in documents and documents[text] not in own[query]:
            own[query].append(documents[text])
    return Corpus(
        list(queries), list(documents), np.array(query_of_row), np.array(passage_of_row), own
    )


def mine_folder(
    model: TextModel,
    source: Path,
    output: Path,
    rule: Filter,
    query_prompt: str = "",
    passage_prompt: str = "",
    approximation: ann.Approximation | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write every dataset of a raw folder again with mined negatives in place of its own. Continues
    what was begun.

    Classification datasets, whose passages are labels, keep the negatives they have.

    Memory: one dataset's texts, and blocks of vectors; all vectors of a dataset lie on disk while
        it is mined. The
    approximate search adds its codes (see ann.py).

    Args:
        model: gives the vectors.
        source: folder of raw data; its negatives, if any, are documents like the passages.
        output: folder to write; each file appears whole or not at all.
        rule: which neighbours to keep.
        query_prompt, passage_prompt: put before the texts for the model; not written.
        approximation: search large datasets approximately; None is exactly. Datasets with fewer
            than `ann.FEWEST_DOCUMENTS` documents are searched exactly all the same.
        overwrite: make datasets anew that were mined otherwise, and remove those that the input no
            longer has.
        progress: bars on stderr.
    Returns:
        the summary that is also written as mining.json: settings, and for each dataset rows and
        negatives found; with
        an approximation also how it was searched, and the share of the exact nearest that was
        found.
    Raises:
        UserError: data that cannot be read, a vector that is not finite, an output folder that
            holds something else, or faiss is missing.
    """
    rule.check()
    if approximation is not None:
        approximation.check()
    datasets = list_raw_datasets(source)
    for dataset in datasets:
        check_and_count_rows(dataset)
    if source.resolve() == output.resolve():
        raise UserError(f"--input and --output are both {source}: write to another folder")
    settings = {
        "model": model.name,
        "query_prompt": query_prompt,
        "passage_prompt": passage_prompt,
        **asdict(rule),
    }
    settings |= (
        {"search": "exact"} if approximation is None else {"search": "ann", **asdict(approximation)}
    )
    with disk_errors_are_user_errors(output, "Then run the same command again: it continues."):
        output.mkdir(parents=True, exist_ok=True)
        with lock_folder(output / LOCK, "mining into"):
            summary = _read_summary(
                output, settings, {dataset.name for dataset in datasets}, overwrite
            )
            for dataset in tqdm(datasets, unit=" file", desc="files", disable=not progress):
                target, digest = output / f"{dataset.name}.parquet", describe_source(dataset.path)
                done = summary["datasets"].get(dataset.name)
                if done is not None and done["source"] == digest and target.is_file():
                    continue
                if target.exists() and done is None and not overwrite:
                    raise UserError(
                        f"{target} exists and is not of this mining; use another --output, or "
                        "--overwrite"
                    )
                if (declared_task(dataset) or task_of(dataset.name)) == "classification":
                    entry = _keep_as_it_is(dataset, target)
                else:
                    work = output / f".{dataset.name}{WORK_SUFFIX}"
                    mining = _Mining(
                        model, rule, (query_prompt, passage_prompt), approximation, work, progress
                    )
                    entry = mining.run(dataset, target, settings | {"source": digest})
                summary["datasets"][dataset.name] = entry | {"source": digest}
                write_json(output / SUMMARY, summary)
    return summary


def _read_summary(
    output: Path, settings: dict[str, Any], names: set[str], overwrite: bool
) -> dict[str, Any]:
    """What a former call left, or an empty summary; `names` are the input's datasets.

    With `overwrite`, the files of recorded datasets that are none of them are removed.
    """
    fresh = {"settings": settings, "datasets": {}}
    path = output / SUMMARY
    if not path.is_file():
        return fresh
    try:
        former = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key, value in settings.items() if former["settings"].get(key) != value]
        gone = former["datasets"].keys() - names
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); use another --output, or remove that file"
        ) from None
    if differing and not overwrite:
        said = "; ".join(
            f"{key} was {former['settings'].get(key)!r}, now {settings[key]!r}" for key in differing
        )
        raise UserError(
            f"{output} was mined otherwise: {said}. Use another --output, or --overwrite to make "
            "it anew"
        )
    if gone:
        if not overwrite:
            listing = ", ".join(map(repr, sorted(gone)))
            raise UserError(
                f"{output} holds what the input does not have: {listing}. Use another --output, or "
                "--overwrite to "
                "remove it there"
            )
        _remove_datasets(output, gone)
        former["datasets"] = {
            name: entry for name, entry in former["datasets"].items() if name in names
        }
        write_json(path, former)
    return fresh if differing else former


def _remove_datasets(output: Path, names: set[str]) -> None:
    for path in output.iterdir():
        if path.suffix == ".parquet" and path.stem in names:
            path.unlink()
        elif path.suffix == WORK_SUFFIX and path.stem.removeprefix(".") in names:
            shutil.rmtree(path)


@dataclass(frozen=True)
class _Mining:
    """The mining of one dataset; `work` keeps what is done."""

    model: TextModel
    rule: Filter
    prompts: tuple[str, str]
    approximation: ann.Approximation | None
    work: Path
    progress: bool

    def run(self, dataset: RawDataset, target: Path, settings: dict[str, Any]) -> dict[str, Any]:
        """Mine into `target`; the dataset's entry in the summary."""
        corpus = read_corpus(dataset)
        self._open_work(settings)
        queries = self._vectors("queries", corpus.queries, self.prompts[0], dataset.name)
        documents = self._vectors("documents", corpus.documents, self.prompts[1], dataset.name)
        nearest_documents, searched = self._prepare_search(corpus, queries, documents, dataset.name)

        def search(start: int, stop: int) -> np.ndarray:
            return self._search(nearest_documents, corpus, queries, documents, slice(start, stop))

        negatives = RowFile(self.work / "negatives.bin", np.int64, self.rule.count)
        title = f"{dataset.name}: searching"
        negatives.fill(len(corpus.query_of_row), QUERY_BLOCK, search, title, self.progress)
        counts = _write(target, corpus, negatives.mapped(), declared_task(dataset))
        shutil.rmtree(self.work)
        return {
            "rows": len(counts),
            "negatives": int(counts.sum()),
            "rows_without_negatives": int((counts == 0).sum()),
            **searched,
        }

    def _open_work(self, settings: dict[str, Any]) -> None:
        """Keep of what lies there all that was made for the same things."""
        self.work.mkdir(exist_ok=True)
        path = self.work / "settings.json"
        try:
            former = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            former = {}
        differing = {key for key in {*former, *settings} if former.get(key) != settings.get(key)}
        if differing.intersection(VECTOR_SETTINGS):
            for name in ("queries.bin", "documents.bin"):
                (self.work / name).unlink(missing_ok=True)
        if differing.intersection(INDEX_SETTINGS):
            ann.remove_index(self.work)
        if differing:
            (self.work / "negatives.bin").unlink(missing_ok=True)
            write_json(path, settings)

    def _vectors(self, kind: str, texts: Sequence[str], prompt: str, name: str) -> np.ndarray:
        """(len(texts), D), memory-mapped."""
        file = RowFile(self.work / f"{kind}.bin", np.float32, self.model.dim)

        def encode(start: int, stop: int) -> np.ndarray:
            vectors = self.model.encode([prompt + text for text in texts[start:stop]])
            check_finite(vectors, f"{name}: distinct {kind}", start)
            return vectors

        file.fill(len(texts), ENCODED_BLOCK, encode, f"{name}: encoding {kind}", self.progress)
        return file.mapped()

    def _prepare_search(
        self, corpus: Corpus, queries: np.ndarray, documents: np.ndarray, name: str
    ) -> tuple[ann.Search, dict[str, Any]]:
        """How to search, and what the summary says of it."""
        if self.approximation is None:
            return nearest, {}
        if len(documents) < ann.FEWEST_DOCUMENTS:
            reason = f"{len(documents)} documents are fewer than {ann.FEWEST_DOCUMENTS}"
            notice(f"{name}: searched exactly: {reason}")
            return nearest, {"search": "exact", "why_exact": reason}
        index = ann.ApproximateIndex(
            self.work, documents, self.approximation, f"{name}: ", self.progress
        )
        sample = ann.sample_queries(len(queries))
        vectors, own = (
            torch.from_numpy(queries[sample]).to(self.model.device),
            _own_pairs(corpus, sample),
        )
        share = ann.recall(index.nearest, vectors, documents, self.rule.top, own)
        notice(
            f"{name}: finds {share:.1%} of the exact {self.rule.top} nearest ({len(sample)} "
            "queries, "
            f"--nprobe {self.approximation.nprobe} of {index.cells} cells); more cells find more"
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
        with torch.inference_mode():
            scores, found = search(vectors, documents, self.rule.top, _own_pairs(corpus, numbers))
            positive = (vectors * own).sum(1)
            return filter_neighbours(scores, found, positive, self.rule).cpu().numpy()


def _own_pairs(corpus: Corpus, queries: np.ndarray) -> Tensor:
    """(P, 2) places in `queries` and the documents that are no negatives of the query there."""
    return torch.tensor(
        [(place, own) for place, query in enumerate(queries) for own in corpus.own_documents[query]]
    )


def _write(target: Path, corpus: Corpus, negatives: np.ndarray, task: Task | None) -> np.ndarray:
    """Write a raw file; (rows,) how many negatives each row has."""
    counts = (negatives >= 0).sum(1)
    schema = SCHEMA.with_metadata({TASK_METADATA: task}) if task else SCHEMA
    with pq.ParquetWriter(partial_path(target), schema, compression="zstd") as writer:
        for rows in blocks(len(counts), QUERY_BLOCK):
            columns = [
                [corpus.queries[query] for query in corpus.query_of_row[rows]],
                [corpus.documents[passage] for passage in corpus.passage_of_row[rows]],
                [
                    [corpus.documents[number] for number in row if number >= 0]
                    for row in negatives[rows]
                ],
            ]
            arrays = [
                pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    commit(target)
    return counts


def _keep_as_it_is(dataset: RawDataset, target: Path) -> dict[str, Any]:
    """Write a dataset again with its own negatives; its summary entry."""
    rows = list(read_rows(dataset))
    columns = [[getattr(row, name) for row in rows] for name in ("query", "passage", "negatives")]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    schema = SCHEMA.with_metadata({TASK_METADATA: "classification"})
    pq.write_table(
        pa.Table.from_arrays(arrays, schema=schema), partial_path(target), compression="zstd"
    )
    commit(target)
    counts = [len(row.negatives) for row in rows]
    return {"rows": len(rows), "negatives": sum(counts), "rows_without_negatives": counts.count(0)}
