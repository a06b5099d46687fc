"""Opening a corpus and building batches from it, against a naive version."""

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ml_embed.benchmarks.common import (
    Timing,
    measure,
    print_result,
    print_table,
    ratio,
    ratio_range,
)
from ml_embed.benchmarks.naive_data import NaiveDataset
from ml_embed.benchmarks.samples import make_sample
from ml_embed.data.batch import ContrastiveBatch
from ml_embed.data.batch_builder import BatchBuilder
from ml_embed.data.loader import Loader
from ml_embed.data.manifest import MANIFEST, DatasetEntry, Manifest
from ml_embed.data.schedule import DatasetPlan, Schedule
from ml_embed.data.split import random_split
from ml_embed.data.store import TokenizedDataset, open_store
from ml_embed.files.atomic import write_json

SYNTHETIC = "synthetic"
SYNTHETIC_TOKENS = 16
"""per text; opening and looking up do not depend on it, disk space does"""
NEGATIVES_STORED = 24
BLOCK_ROWS = 250_000
"""documents written at once"""


@dataclass(frozen=True)
class BatchShape:
    """Sizes of the batches that are built."""

    batch_size: int = 8
    negatives: int = 7
    max_length: int = 256


def measure_batches(
    tokenized: Path, cache: Path, name: str, eos_id: int, shape: BatchShape, repeats: int
) -> dict[str, Timing]:
    """Seconds per batch of both versions, after checking that they give the same texts.

    Ours also draws the rows of each step, as training does; the naive one gets random rows.
    """
    store = open_store(tokenized, cache, progress=False)
    dataset, naive = store.datasets[name], NaiveDataset(tokenized, name)
    plan = DatasetPlan(name, "retrieval", shape.negatives, dataset.num_rows, 0, dataset.num_rows)
    splits = {name: random_split(name, dataset.num_rows, 0, seed=0)}
    schedule = Schedule([plan], splits, shape.batch_size, seed=0)
    loader = Loader(schedule, store, BatchBuilder(0, shape.max_length, eos_id, True, 0, 1), None)
    group = loader.steps_per_group
    first_steps = range(schedule.steps_per_epoch)[:8]
    for batch, rows in zip(loader.build(first_steps), schedule.batches(first_steps), strict=True):
        _check_same(batch, naive, dataset, rows.rows, shape.max_length, eos_id)
    rng = np.random.default_rng(0)
    naive_rows = itertools.cycle(
        rng.permutation(dataset.num_rows)[: shape.batch_size].tolist() for _ in range(64)
    )
    steps = itertools.count(step=group)
    # Turns of a group of batches, as training builds them: after each single batch the processor's
    # caches would hold the other version's data.
    timing = measure(
        {
            "naive": lambda: [
                naive.collate(next(naive_rows), None, shape.negatives, shape.max_length, eos_id)
                for _ in range(group)
            ],
            "fast": lambda: loader.build(range(start := next(steps), start + group)),
        },
        repeats,
    )
    return {name: Timing(tuple(s / group for s in t.seconds)) for name, t in timing.items()}


def _check_same(
    batch: ContrastiveBatch,
    naive: NaiveDataset,
    dataset: TokenizedDataset,
    rows: np.ndarray,
    length: int,
    eos_id: int,
) -> None:
    """Check that the packed texts are the padded ones without padding (AssertionError)."""
    texts = [ids.tolist() for ids in batch.texts.input_ids.split(batch.texts.packed.lengths)]
    # Where each drawn negative stands among its row's own.
    places = [
        [int(np.flatnonzero(dataset.negatives(int(row)) == document)[0]) for document in own]
        for row, own in zip(rows, batch.negative_documents.tolist(), strict=True)
    ]
    padded = naive.collate(rows.tolist(), places, 0, length, eos_id)
    expected = [
        ids[: sum(mask)]
        for part in padded
        for ids, mask in zip(*(x.tolist() for x in part), strict=True)
    ]
    found = [batch.query.tolist(), batch.passage.tolist(), batch.negatives.flatten().tolist()]
    assert [texts[i] for part in found for i in part] == expected


def write_synthetic(folder: Path, documents: int, rows: int) -> None:
    """Write a tokenized folder of short documents of random ids, and rows that refer to them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)

    def texts(count: int) -> pa.Array:
        ids = rng.integers(10, 30_000, count * SYNTHETIC_TOKENS, dtype=np.int32)
        return pa.ListArray.from_arrays(
            pa.array(np.arange(count + 1, dtype=np.int32) * SYNTHETIC_TOKENS), pa.array(ids)
        )

    schema = pa.schema([("input_ids", pa.list_(pa.int32()))])
    with pq.ParquetWriter(folder / f"{SYNTHETIC}_corpus.parquet", schema) as writer:
        for start in range(0, documents, BLOCK_ROWS):
            writer.write_table(pa.table([texts(min(BLOCK_ROWS, documents - start))], schema=schema))
    negatives = rng.integers(0, documents, rows * NEGATIVES_STORED)
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * NEGATIVES_STORED)
    columns = {
        "query_input_ids": texts(rows),
        "passage_doc_id": pa.array(rng.integers(0, documents, rows)),
        "negative_doc_ids": pa.ListArray.from_arrays(offsets, pa.array(negatives)),
    }
    pq.write_table(pa.table(columns), folder / f"{SYNTHETIC}_query.parquet")
    entry = DatasetEntry(rows, documents)
    manifest = Manifest(1, 30_000, tokenizer_fingerprint="", datasets={SYNTHETIC: entry})
    write_json(folder / MANIFEST, manifest.to_json())


_OPEN = """
import json, sys, time
from pathlib import Path
from ml_embed.benchmarks.common import memory_mib
{imports}
before, start = memory_mib("Private"), time.perf_counter()
{open}
seconds = time.perf_counter() - start
print(json.dumps({{"seconds": seconds, "private_mib": memory_mib("Private") - before}}))
"""
_FAST = (
    "from ml_embed.data.store import open_store",
    "store = open_store(sys.argv[1], sys.argv[2], progress=False).datasets[sys.argv[3]]",
)
_NAIVE = (
    "from ml_embed.benchmarks.naive_data import NaiveDataset",
    "data = NaiveDataset(Path(sys.argv[1]), sys.argv[3])",
)


def measure_opening(tokenized: Path, cache: Path, with_naive: bool) -> dict[str, dict[str, Any]]:
    """Seconds and private memory (MiB) of a new process that opens a corpus.

    "first" also converts it, "again" finds it converted, "naive" is the naive version.
    """
    results = {"first": _open(_FAST, tokenized, cache), "again": _open(_FAST, tokenized, cache)}
    if with_naive:
        results["naive"] = _open(_NAIVE, tokenized, cache)
    return results


def _open(version: tuple[str, str], tokenized: Path, cache: Path) -> dict[str, Any]:
    program = _OPEN.format(imports=version[0], open=version[1])
    arguments = [sys.executable, "-c", program, str(tokenized), str(cache), SYNTHETIC]
    output = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def report_data(folder: Path, documents: int, repeats: int, with_naive_opening: bool) -> None:
    """Measure; print tables and the JSON line.

    Args:
        folder: empty folder for data.
        documents: of the corpus that is opened.
        repeats: turns of each version, a group of batches each.
        with_naive_opening: also open the corpus naively.
    """
    shape, cache = BatchShape(), folder / "cache"
    sample = make_sample(folder / "sample", rows=2000)
    eos_id = sample.tokenizer.eos_token_id
    timing = measure_batches(sample.tokenized, cache, "udhr_retrieval", eos_id, shape, repeats)
    write_synthetic(folder / "synthetic", documents, max(1, documents // 20))
    opening = measure_opening(folder / "synthetic", cache, with_naive_opening)
    print(f"batches of {shape.batch_size} rows of {2 + shape.negatives} texts, the same in both")
    batches = [[name, own.in_unit(1000, "ms")] for name, own in timing.items()]
    print_table(["version", "one batch"], batches)
    print(f"opening a corpus of {documents:,} documents in a new process")
    rows = [
        [name, f"{own['seconds']:.3f} s", f"{own['private_mib']:.1f} MiB"]
        for name, own in opening.items()
    ]
    print_table(["version", "time", "private memory"], rows)
    result = {
        "ratio": ratio(timing["naive"], timing["fast"]),
        "ratio_range": ratio_range(timing["naive"], timing["fast"]),
        "seconds": timing,
        "sizes": vars(shape) | {"documents": documents},
        "opening": opening,
    }
    print_result("data", result)
