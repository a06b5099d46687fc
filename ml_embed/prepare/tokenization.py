"""Raw contrastive rows to token ids: what tokenize_data_qwen.py does.

One pass over each dataset in blocks of rows. The main thread reads, numbers the documents and
writes; meanwhile the tokenizers library works on the next blocks (Rust, on all cores, without the
GIL). Blocks depend on the content alone, so the number of workers does not change a byte.
"""

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import AcquireReturnProxy
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ml_embed.config import DatasetConfig, Task, check_dataset_names, match_settings
from ml_embed.data.manifest import MANIFEST, DatasetEntry, Manifest
from ml_embed.data.sources import CORPUS_SUFFIX, QUERY_SUFFIX
from ml_embed.data.tasks import task_of
from ml_embed.errors import UserError
from ml_embed.files.atomic import disk_errors_are_user_errors, partial_path
from ml_embed.files.locks import lock_folder
from ml_embed.files.model_source import find_tokenizer_folder
from ml_embed.files.work_record import Finished, WorkRecord
from ml_embed.notices import notice
from ml_embed.prepare.numbering import TextNumbers, text_digest
from ml_embed.prepare.prompts import Prompts
from ml_embed.prepare.raw import (
    RawDataset,
    check_and_count_rows,
    describe_source,
    list_raw_datasets,
    read_row_batches,
    task_in_file,
)
from ml_embed.prepare.rows import RowBatch
from ml_embed.prepare.token_files import (
    CORPUS_SCHEMA,
    QUERY_SCHEMA,
    append_columns,
    list_array,
    text_array,
    token_file,
)
from ml_embed.prepare.tokenizer import TextTokenizer, end_token, fingerprint, load_tokenizer

# A block's texts take about 150 bytes a token while they are tokenized; three blocks are in flight.
BLOCK_CHARACTERS = 2_000_000
BLOCK_TEXTS = 65_536
BLOCKS_IN_FLIGHT = 3
LOCK = ".tokenize.lock"
REDO = "Use another --output, or --overwrite to make that folder anew."


@dataclass(frozen=True)
class TokenizeOptions:
    """The flags of tokenize_data_qwen.py."""

    tokenizer: str
    """folder or hub name"""
    input: Path
    """folder of raw .parquet / .jsonl files"""
    output: Path
    """folder to write; made if it does not exist"""
    max_seq_length: int = 2048
    """tokens of a text at most, EOS included"""
    max_samples: int = 80_000
    """rows kept of each dataset, a seeded random choice in file order; 0 = all"""
    num_workers: int | None = None
    """threads that tokenize; None = all cores this process may use"""
    seed: int = 42
    overwrite: bool = False
    """make everything anew instead of refusing; after an interruption, go on with that"""
    datasets: Mapping[str, DatasetConfig] = field(default_factory=dict)
    """task and prompts by dataset name or shell-style pattern; the first match counts"""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        for flag, value, least in (
            ("--max-seq-length", self.max_seq_length, 2),
            ("--max-samples", self.max_samples, 0),
            ("--num-workers", self.num_workers if self.num_workers is not None else 1, 1),
            ("--seed", self.seed, 0),
        ):
            if value < least:
                raise UserError(f"{flag} is {value}: it must be at least {least}.")
        if self.input.resolve() == self.output.resolve():
            raise UserError(f"--input and --output are both {self.input}: write to another folder.")
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"--output {self.output} is a file: give a folder.")


@dataclass
class Block:
    """Consecutive rows, their documents numbered."""

    queries: list[str] = field(default_factory=list)
    """(rows,)"""
    documents: list[str] = field(default_factory=list)
    """those that occur for the first time"""
    passages: list[int] = field(default_factory=list)
    """(rows,) document of each row"""
    negatives: list[int] = field(default_factory=list)
    """documents, of all rows joined"""
    negative_counts: list[int] = field(default_factory=list)
    """(rows,)"""
    characters: int = 0
    """of all texts, known documents too"""

    @property
    def num_texts(self) -> int:
        """All texts, known documents too."""
        return 2 * len(self.queries) + len(self.negatives)


@dataclass
class Totals:
    """What the manifest counts of a dataset."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    negatives: dict[str, int] = field(default_factory=dict)

    def add(self, block: Block, ids: list[np.ndarray]) -> None:
        """Count a block and its token ids."""
        self.rows += len(block.passages)
        self.documents += len(block.documents)
        self.tokens += sum(map(len, ids))
        counts, so_far = block.negative_counts, self.negatives
        self.negatives = {
            "min": min(so_far.get("min", counts[0]), *counts),
            "max": max(so_far.get("max", 0), *counts),
            "total": so_far.get("total", 0) + sum(counts),
        }


@dataclass(frozen=True)
class _Job:
    """A dataset to tokenize."""

    raw: RawDataset
    rows: int
    """in the file"""
    prompts: Prompts
    task: Task


def tokenize_folder(options: TokenizeOptions, progress: bool = True) -> Manifest:
    """Tokenize every dataset of a raw folder; continues what an interrupted run left.

    Args:
        options: see there.
        progress: bars on stderr.
    Returns:
        the manifest that is also written.
    Raises:
        UserError: before anything is written, for input that cannot be read and for an output
            folder that holds something else than a part of the same result.
    """
    options.check()
    jobs = _make_jobs(options)
    _use_threads(options.num_workers)
    tokenizer = load_tokenizer(find_tokenizer_folder(options.tokenizer))
    text_tokenizer = TextTokenizer(tokenizer, options.max_seq_length)
    with _exclusive(options.output):
        record = _open_record(tokenizer, options)
        _check_former(record, jobs, options.output)
        todo = [job for job in jobs.values() if not _is_complete(job, record, options.output)]
        if len(todo) < len(jobs):
            notice(f"{len(jobs) - len(todo)} of {len(jobs)} datasets are complete already")
        remedy = "Then run the same command again: it continues."
        with disk_errors_are_user_errors(options.output, remedy):
            for job in tqdm(todo, unit=" file", desc="files", disable=not progress):
                record.begin(job.raw.name)
                entry = _tokenize_job(job, text_tokenizer, options, progress)
                record.record(job.raw.name, entry.to_json())
            for name in record.gone(jobs):
                for path in token_paths(options.output, name).values():
                    path.unlink(missing_ok=True)
                    partial_path(path).unlink(missing_ok=True)
            manifest = Manifest.from_json({**record.settings, "datasets": record.entries})
            record.finish(manifest.to_json(), sort_keys=True)
            return manifest


def _make_jobs(options: TokenizeOptions) -> dict[str, _Job]:
    """The datasets of the input by name, checked as far as that goes without reading texts."""
    datasets = list_raw_datasets(options.input)
    rows = [check_and_count_rows(dataset) for dataset in datasets]
    check_dataset_names([dataset.name for dataset in datasets], options.datasets)
    jobs = {}
    for dataset, number in zip(datasets, rows, strict=True):
        settings = match_settings(dataset.name, options.datasets)
        task = settings.task or task_in_file(dataset) or task_of(dataset.name)
        jobs[dataset.name] = _Job(dataset, number, Prompts.of_settings(settings), task)
    return jobs


def _open_record(tokenizer: PreTrainedTokenizerBase, options: TokenizeOptions) -> WorkRecord:
    """The record of the output folder, which `overwrite` makes anew unless that was interrupted."""
    settings = Manifest(
        eos_id=end_token(tokenizer),
        pad_id=tokenizer.pad_token_id,
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        tokenizer_fingerprint=fingerprint(tokenizer),
        max_seq_length=options.max_seq_length,
        max_samples=options.max_samples,
        seed=options.seed,
    ).settings()
    path, overwrite = options.output / MANIFEST, options.overwrite
    record = WorkRecord(path, settings, _read_finished, overwrite, REDO)
    if overwrite and record.replaced is None:
        record.replace_all()
    return record


def _read_finished(path: Path) -> Finished:
    manifest = Manifest.read(path)
    return manifest.settings(), {name: e.to_json() for name, e in manifest.datasets.items()}


def _check_former(record: WorkRecord, jobs: Mapping[str, _Job], folder: Path) -> None:
    """Raise UserError if tokenizing would lose or mix anything in the folder.

    With `overwrite`, note what is replaced instead.
    """
    for name, entry in list(record.entries.items()):
        said = f"{folder} holds dataset {name!r}"
        if name not in jobs:
            record.replace(name, f"{said}, which the input does not have")
        elif entry.get("source") != describe_source(jobs[name].raw.path):
            record.replace(name, f"{said} made from another file than the input's")
        elif entry.get("prompts") != jobs[name].prompts.to_json():
            record.replace(name, f"{said} made with other prompts than now")
    for name in jobs:
        record.refuse_others(name, token_paths(folder, name).values())


def _is_complete(job: _Job, record: WorkRecord, folder: Path) -> bool:
    """Whether a dataset is recorded and its files have the recorded sizes."""
    entry = record.entries.get(job.raw.name)
    return entry is not None and all(
        path.is_file() and path.stat().st_size == entry["bytes"][kind]
        for kind, path in token_paths(folder, job.raw.name).items()
    )


def token_paths(folder: Path, name: str) -> dict[str, Path]:
    """The query and the corpus file of a dataset, by the names that the manifest has for them."""
    return {
        "query": folder / f"{name}{QUERY_SUFFIX}",
        "corpus": folder / f"{name}{CORPUS_SUFFIX}",
    }


def _tokenize_job(
    job: _Job, text_tokenizer: TextTokenizer, options: TokenizeOptions, progress: bool
) -> DatasetEntry:
    """Write a dataset's files; its entry in the manifest."""
    name = job.raw.name
    source = _in_background(describe_source, job.raw.path)
    selected = select_rows(name, job.rows, options.max_samples, options.seed)
    blocks = read_blocks(read_row_batches(job.raw, selected), job.prompts, options.seed)
    rows = job.rows if selected is None else len(selected)
    paths = token_paths(options.output, name)
    totals = _tokenize_dataset(name, blocks, rows, text_tokenizer, paths, progress)
    return DatasetEntry(
        **vars(totals),
        task=job.task,
        prompts=job.prompts.to_json(),
        source=source.result(),
        bytes={kind: path.stat().st_size for kind, path in paths.items()},
    )


def select_rows(name: str, num_rows: int, max_samples: int, seed: int) -> np.ndarray | None:
    """Sorted numbers of the rows to keep, a random choice given by (seed, dataset); None = all."""
    if max_samples == 0 or num_rows <= max_samples:
        return None
    name_key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    generator = np.random.Generator(np.random.PCG64([seed, name_key]))
    # Without shuffling, memory is that of the chosen rows and not of all.
    return np.sort(generator.choice(num_rows, size=max_samples, replace=False, shuffle=False))


def read_blocks(batches: Iterator[RowBatch], prompts: Prompts, seed: int) -> Iterator[Block]:
    """Rows with their prompts as blocks of about BLOCK_CHARACTERS.

    Documents are numbered 0, 1, 2, ... in the order they are first seen.
    """
    numbers = TextNumbers()
    front = prompts.passage.encode()
    block = Block()
    for batch in batches:
        prompted = prompts.choose(batch.documents, seed)
        fronts = [front if yes else b"" for yes in prompted]
        digests = [
            text_digest(text, front) for text, front in zip(batch.documents, fronts, strict=True)
        ]
        documents, new = numbers.number(digests)
        new_texts = [
            fronts[i].decode() + text for i, text in zip(new, batch.decode(new), strict=True)
        ]
        # Where each row's documents begin, and the new ones among them.
        bounds = np.concatenate([[0], np.cumsum(batch.counts)])
        rows = pairwise(zip(bounds.tolist(), np.searchsorted(new, bounds).tolist(), strict=True))
        lengths = batch.characters + prompted * len(prompts.passage)
        characters = np.add.reduceat(lengths, bounds[:-1]).tolist()
        for query, size, ((start, first_new), (end, end_new)) in zip(
            batch.queries, characters, rows, strict=True
        ):
            block.queries.append(prompts.query + query)
            block.documents += new_texts[first_new:end_new]
            block.passages.append(documents[start])
            block.negatives += documents[start + 1 : end]
            block.negative_counts.append(end - start - 1)
            block.characters += len(block.queries[-1]) + size
            if block.characters >= BLOCK_CHARACTERS or block.num_texts >= BLOCK_TEXTS:
                yield block
                block = Block()
    if block.queries:
        yield block


def _tokenize_dataset(
    name: str,
    blocks: Iterator[Block],
    total_rows: int,
    text_tokenizer: TextTokenizer,
    paths: Mapping[str, Path],
    progress: bool,
) -> Totals:
    """Write one dataset's query and corpus file."""
    totals = Totals()
    with (
        token_file(paths["query"], QUERY_SCHEMA) as query_file,
        token_file(paths["corpus"], CORPUS_SCHEMA) as corpus_file,
        tqdm(total=total_rows, unit=" row", desc=name, leave=False, disable=not progress) as bar,
    ):
        for block, ids in _encode_blocks(blocks, text_tokenizer):
            _write_block(block, ids, query_file, corpus_file)
            totals.add(block, ids)
            texts = totals.rows + totals.documents
            bar.set_postfix(texts=texts, tokens=totals.tokens, refresh=False)
            bar.update(len(block.passages))
    return totals


def _encode_blocks(
    blocks: Iterator[Block], text_tokenizer: TextTokenizer
) -> Iterator[tuple[Block, list[np.ndarray]]]:
    """Blocks with their texts' ids, in order; the next blocks are read and tokenized meanwhile."""
    waiting: deque[tuple[Block, Future]] = deque()
    # One thread, which itself uses all cores: two batches at once contend for the tokenizer's cache
    # (measured: a third more CPU time for the same texts).
    with ThreadPoolExecutor(1) as thread:
        for block in blocks:
            texts = block.queries + block.documents
            waiting.append((block, thread.submit(text_tokenizer.tokenize, texts)))
            if len(waiting) == BLOCKS_IN_FLIGHT:
                done, encodings = waiting.popleft()
                yield done, text_tokenizer.token_ids(encodings.result())
        while waiting:
            done, encodings = waiting.popleft()
            yield done, text_tokenizer.token_ids(encodings.result())


def _write_block(
    block: Block, ids: list[np.ndarray], query_file: pq.ParquetWriter, corpus_file: pq.ParquetWriter
) -> None:
    rows = len(block.passages)
    passages = pa.array(block.passages, pa.int64())
    negatives = list_array(block.negative_counts, np.array(block.negatives, np.int64))
    append_columns(query_file, [text_array(ids[:rows]), passages, negatives])
    append_columns(corpus_file, [text_array(ids[rows:])])


def _use_threads(num_workers: int | None) -> None:
    """Set how many threads the tokenizers library uses; its first batch fixes the number.

    By itself it takes the cores that affinity and container limits leave.
    """
    if num_workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(num_workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"


def _in_background(
    function: Callable[[Path], dict[str, Any]], path: Path
) -> Future[dict[str, Any]]:
    """Call a function in a thread that an interruption does not wait for."""
    result: Future[dict[str, Any]] = Future()

    def run() -> None:
        try:
            result.set_result(function(path))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result


def _exclusive(folder: Path) -> AcquireReturnProxy:
    """Make the folder and hold its lock, so that two runs never write the same files."""
    with disk_errors_are_user_errors(folder, "Choose another --output."):
        folder.mkdir(parents=True, exist_ok=True)
        return lock_folder(folder / LOCK, "tokenizing into")
