"""Raw contrastive rows to token ids: what tokenize_data_qwen.py does.

One pass over each dataset in blocks of rows. The main thread reads, numbers the documents and
writes; meanwhile the tokenizers library works on the next blocks (Rust, on all cores, without the
GIL). Blocks depend on the content alone, so the number of workers does not change a byte.
"""

import hashlib
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Encoding
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ml_embed.config import DatasetConfig, Task, check_dataset_names, match_settings
from ml_embed.data.manifest import MANIFEST, DatasetEntry, Manifest
from ml_embed.data.sources import CORPUS_SUFFIX, QUERY_SUFFIX
from ml_embed.distributed.agreement import check_agreement
from ml_embed.distributed.collectives import (
    compute_on_all_processes,
    compute_on_main_process,
    process_index,
)
from ml_embed.distributed.shares import usable_cores, work_through
from ml_embed.distributed.sole_launch import sole_launch_into
from ml_embed.errors import UserError
from ml_embed.files.atomic import disk_errors_are_user_errors, partial_path
from ml_embed.files.digests import digests_of, file_digest, sealed
from ml_embed.files.model_source import find_tokenizer_folder
from ml_embed.files.work_record import Finished, WorkRecord, note_done
from ml_embed.notices import notice
from ml_embed.prepare.numbering import TextNumbers, text_digest
from ml_embed.prepare.prompts import Prompts
from ml_embed.prepare.raw import (
    RawDataset,
    check_all_rows,
    check_and_count_rows,
    describe_source,
    files_passed_over,
    list_raw_datasets,
    notes_in_file,
    read_row_batches,
    task_of_raw,
)
from ml_embed.prepare.rows import OPTIONAL_NAMES, RowBatch
from ml_embed.prepare.token_files import (
    CORPUS_SCHEMA,
    append_columns,
    list_array,
    query_schema,
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
    """threads that tokenize; None = all cores, divided among the processes of a launch"""
    seed: int = 42
    overwrite: bool = False
    """make everything anew instead of refusing; after an interruption, go on with that"""
    datasets: Mapping[str, DatasetConfig] = field(default_factory=dict)
    """task and prompts by dataset name or shell-style pattern; the first match counts"""
    skip_bad_rows: bool = False
    """leave faulty rows out instead of refusing their file"""
    passed_over: tuple[str, ...] = ()
    """files of what `input` was made of that are no data, for the manifest"""

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

    prompts: Prompts
    """that stand in front of the texts"""
    queries: list[str] = field(default_factory=list)
    """(rows,)"""
    documents: list[str] = field(default_factory=list)
    """those that occur for the first time"""
    document_rows: list[int] = field(default_factory=list)
    """(documents,) the row in which each does"""
    passages: list[int] = field(default_factory=list)
    """(rows,) document of each row"""
    negatives: list[int] = field(default_factory=list)
    """documents, of all rows joined"""
    negative_counts: list[int] = field(default_factory=list)
    """(rows,)"""
    characters: int = 0
    """of all texts, known documents too"""
    optional: dict[str, list[Any]] = field(default_factory=dict)
    """optional column -> (rows,)"""

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
    queries_cut: int = 0
    documents_cut: int = 0
    query_ids: set[str] = field(default_factory=set)
    languages: Counter[str] = field(default_factory=Counter)
    """rows of each language"""
    text_sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    """characters and tokens of each language's texts (`DatasetEntry.text_sizes`)"""

    def add(self, block: Block, ids: list[np.ndarray], cut: np.ndarray) -> None:
        """Count a block, its token ids, and which texts (queries, then documents) were cut."""
        rows = len(block.queries)
        self._add_sizes(block, ids, cut)
        self.queries_cut += int(cut[:rows].sum())
        self.documents_cut += int(cut[rows:].sum())
        self.query_ids.update(filter(None, block.optional.get("query_id", ())))
        self.languages.update(filter(None, block.optional.get("language", ())))
        self.rows += len(block.passages)
        self.documents += len(block.documents)
        self.tokens += sum(map(len, ids))
        counts, so_far = block.negative_counts, self.negatives
        self.negatives = {
            "min": min(so_far.get("min", counts[0]), *counts),
            "max": max(so_far.get("max", 0), *counts),
            "total": so_far.get("total", 0) + sum(counts),
        }

    def _add_sizes(self, block: Block, ids: list[np.ndarray], cut: np.ndarray) -> None:
        """Characters and tokens by language; a document is of the row that it first stands in."""
        languages = block.optional.get("language")
        if languages is None:
            return
        texts = [*zip(block.queries, languages, strict=True)] if not block.prompts.query else []
        first = 0 if texts else len(block.queries)
        if not block.prompts.passage:
            rows = (languages[row] for row in block.document_rows)
            texts += zip(block.documents, rows, strict=True)
        for number, (text, language) in enumerate(texts, start=first):
            if language and not cut[number]:
                sizes = self.text_sizes.setdefault(language, {"characters": 0, "tokens": 0})
                sizes["characters"] += len(text)
                sizes["tokens"] += len(ids[number]) - 1  # without the end token

    def to_entry(self) -> dict[str, Any]:
        """What the manifest says of it."""
        cut = {"queries": self.queries_cut, "documents": self.documents_cut}
        return {
            **{key: getattr(self, key) for key in ("rows", "documents", "tokens", "negatives")},
            "queries": len(self.query_ids) or None,
            "languages": dict(sorted(self.languages.items())) or None,
            "text_sizes": dict(sorted(self.text_sizes.items())) or None,
            "texts_cut": cut if any(cut.values()) else None,
        }


@dataclass(frozen=True)
class _Job:
    """A dataset to tokenize."""

    raw: RawDataset
    prompts: Prompts
    task: Task
    notes: Mapping[str, Any]
    """of the raw file (`notes_in_file`)"""
    provenance: Mapping[str, str] | None = None
    """what the config says, else the notes; None if nothing is known"""


def tokenize_folder(options: TokenizeOptions, progress: bool = True) -> Manifest:
    """Tokenize every dataset of a raw folder; continues what an interrupted run left.

    The processes of a launch take one dataset after another.

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
    jobs = compute_on_main_process(lambda: _make_jobs(options))
    _use_threads(options.num_workers)
    tokenizer = compute_on_all_processes(
        lambda: load_tokenizer(find_tokenizer_folder(options.tokenizer))
    )
    text_tokenizer = TextTokenizer(tokenizer, options.max_seq_length)
    _check_room(jobs, text_tokenizer)
    check_agreement(lambda: _settings(tokenizer, options) | {"input": _sizes(jobs)})
    remedy = "Then run the same command again: it continues."
    with (
        disk_errors_are_user_errors(options.output, remedy),
        sole_launch_into(options.output, LOCK, "tokenizing into"),
    ):
        # the first process writes it; the others have a copy to read the settings in
        record = compute_on_main_process(lambda: _open_record(tokenizer, jobs, options))
        todo = compute_on_main_process(lambda: _begin(jobs, record, options.output))

        def tokenize(job: _Job) -> None:
            entry = _tokenize_job(job, text_tokenizer, options, progress).to_json()
            if process_index() == 0:
                record.record(job.raw.name, entry)
            else:
                note_done(record.path, process_index(), job.raw.name, entry)

        with tqdm(total=len(todo), unit=" file", desc="files", disable=not progress) as bar:
            work_through(todo, tokenize, bar)
        return compute_on_main_process(lambda: _finish(jobs, record, options))


def _sizes(jobs: Mapping[str, _Job]) -> dict[str, int | None]:
    """The bytes of the raw files that this process sees; None for one that it does not."""
    paths = [job.raw.path for job in jobs.values()]
    return {path.name: path.stat().st_size if path.is_file() else None for path in paths}


def _begin(jobs: Mapping[str, _Job], record: WorkRecord, folder: Path) -> list[_Job]:
    """The datasets to tokenize, the largest first: who takes the last one keeps others waiting."""
    todo = _unfinished(jobs, record, folder)
    if len(todo) < len(jobs):
        notice(f"{len(jobs) - len(todo)} of {len(jobs)} datasets are complete already")
        _renew_provenance(jobs, record)
    for job in todo:
        record.begin(job.raw.name)
    return sorted(todo, key=lambda job: -job.raw.path.stat().st_size)


def _renew_provenance(jobs: Mapping[str, _Job], record: WorkRecord) -> None:
    """Write down what is said now of datasets that are complete: no token depends on it."""
    for name, entry in list(record.entries.items()):
        if entry.get("provenance") != jobs[name].provenance:
            entry = {key: value for key, value in entry.items() if key != "provenance"}
            known = jobs[name].provenance
            record.record(name, entry | ({"provenance": dict(known)} if known else {}))
            notice(f"{name}: source, revision and license are written anew")


def _finish(jobs: Mapping[str, _Job], record: WorkRecord, options: TokenizeOptions) -> Manifest:
    """Write the manifest, and remove what does not belong to it."""
    record.take_over()
    if missing := sorted(jobs.keys() - record.entries.keys()):
        raise UserError(
            f"{options.output}: no process noted there that it made {', '.join(missing)}. Is it "
            "the same folder on all machines? Then run the same command again: it continues."
        )
    for name in record.gone(jobs):
        for path in token_paths(options.output, name).values():
            path.unlink(missing_ok=True)
            partial_path(path).unlink(missing_ok=True)
    others = files_passed_over(options.input, [job.raw for job in jobs.values()])
    passed_over = sorted({*options.passed_over, *others})
    further = {"datasets": record.entries, "passed_over": passed_over or None}
    manifest = Manifest.from_json({**record.settings, **further})
    record.finish(sealed(manifest.to_json()), sort_keys=True)
    return manifest


def _make_jobs(options: TokenizeOptions) -> dict[str, _Job]:
    """The datasets of the input by name, checked as far as that goes without reading texts."""
    datasets = list_raw_datasets(options.input)
    check_dataset_names([dataset.name for dataset in datasets], options.datasets)
    jobs = {}
    for dataset in datasets:
        check_and_count_rows(dataset)
        settings, notes = match_settings(dataset.name, options.datasets), notes_in_file(dataset)
        if settings.prompt is None and "prompt" in notes:
            settings = replace(settings, prompt=notes["prompt"])
        task = settings.task or task_of_raw(dataset)
        provenance = settings.provenance(notes.get("provenance")) or None
        jobs[dataset.name] = _Job(dataset, Prompts.of_settings(settings), task, notes, provenance)
    return jobs


def _check_room(jobs: Mapping[str, _Job], text_tokenizer: TextTokenizer) -> None:
    """Raise UserError for prompts after which no token of a text would be left."""
    most = text_tokenizer.max_length - 1
    for name, job in jobs.items():
        prompts = {"prompt": job.prompts.query, "passage_prompt": job.prompts.passage}
        for kind, prompt in prompts.items():
            tokens = len(text_tokenizer.tokenize([prompt])[0]) if prompt else 0
            if tokens >= most:
                raise UserError(
                    f"datasets.{name}.{kind} has {tokens} tokens, and --max-seq-length "
                    f"{text_tokenizer.max_length} leaves no room for a text after it: all texts "
                    "would be the same. Shorten the prompt, or raise --max-seq-length."
                )


def _settings(tokenizer: PreTrainedTokenizerBase, options: TokenizeOptions) -> dict[str, Any]:
    """What all datasets depend on, as the manifest says it."""
    return Manifest(
        eos_id=end_token(tokenizer),
        pad_id=tokenizer.pad_token_id,
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        tokenizer_fingerprint=fingerprint(tokenizer),
        max_seq_length=options.max_seq_length,
        max_samples=options.max_samples,
        seed=options.seed,
    ).settings()


def _open_record(
    tokenizer: PreTrainedTokenizerBase, jobs: Mapping[str, _Job], options: TokenizeOptions
) -> WorkRecord:
    """The record of the output folder, which `overwrite` makes anew unless that was interrupted."""
    path, settings = options.output / MANIFEST, _settings(tokenizer, options)
    record = WorkRecord(path, settings, _read_finished, options.overwrite, REDO)
    if options.overwrite and record.replaced is None:
        record.replace_all()
    _check_former(record, jobs, options.output)
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


def _unfinished(jobs: Mapping[str, _Job], record: WorkRecord, folder: Path) -> list[_Job]:
    """The datasets that are not recorded, or whose files are not those that were recorded."""
    paths = {name: token_paths(folder, name) for name in jobs if name in record.entries}
    files = [path for own in paths.values() for path in own.values() if path.is_file()]
    found = digests_of(files, [folder])

    def is_complete(name: str) -> bool:
        recorded = record.entries[name].get("digests") or {}
        return all(
            path in found and found[path] == recorded.get(kind)
            for kind, path in paths[name].items()
        )

    return [job for name, job in jobs.items() if name not in paths or not is_complete(name)]


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
    checked = check_all_rows(job.raw, options.skip_bad_rows)
    selected = select_rows(name, len(checked.good), options.max_samples, options.seed)
    rows = checked.good if selected is None else checked.good[selected]
    batches = read_row_batches(job.raw, rows if selected is not None or checked.faulty else None)
    blocks = read_blocks(batches, job.prompts, options.seed)
    paths = token_paths(options.output, name)
    schema = query_schema(checked.optional)
    totals = _tokenize_dataset(name, blocks, len(rows), text_tokenizer, paths, schema, progress)
    left_out = {
        **job.notes.get("left_out", {}),
        "faulty": job.notes.get("left_out", {}).get("faulty", 0) + checked.faulty,
        "max_samples": len(checked.good) - len(rows),
    }
    return DatasetEntry(
        **totals.to_entry(),
        task=job.task,
        prompts=job.prompts.to_json(),
        source=source.result(),
        provenance=job.provenance,
        bytes={kind: path.stat().st_size for kind, path in paths.items()},
        digests={kind: file_digest(path) for kind, path in paths.items()},
        columns=list(checked.optional) or None,
        left_out={reason: number for reason, number in left_out.items() if number} or None,
        labels=job.notes.get("labels"),
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
    block = Block(prompts)
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
        for row, (query, size, ((start, first_new), (end, end_new))) in enumerate(
            zip(batch.queries, characters, rows, strict=True)
        ):
            block.document_rows += [len(block.queries)] * (end_new - first_new)
            block.queries.append(prompts.query + query)
            block.documents += new_texts[first_new:end_new]
            block.passages.append(documents[start])
            block.negatives += documents[start + 1 : end]
            block.negative_counts.append(end - start - 1)
            for name, values in batch.optional.items():
                block.optional.setdefault(name, []).append(values[row])
            block.characters += len(block.queries[-1]) + size
            if block.characters >= BLOCK_CHARACTERS or block.num_texts >= BLOCK_TEXTS:
                yield block
                block = Block(prompts)
    if block.queries:
        yield block


def _tokenize_dataset(
    name: str,
    blocks: Iterator[Block],
    total_rows: int,
    text_tokenizer: TextTokenizer,
    paths: Mapping[str, Path],
    schema: pa.Schema,
    progress: bool,
) -> Totals:
    """Write one dataset's query and corpus file."""
    totals = Totals()
    with (
        token_file(paths["query"], schema) as query_file,
        token_file(paths["corpus"], CORPUS_SCHEMA) as corpus_file,
        tqdm(total=total_rows, unit=" row", desc=name, leave=False, disable=not progress) as bar,
    ):
        for block, ids, cut in _encode_blocks(blocks, text_tokenizer):
            _write_block(block, ids, query_file, corpus_file)
            totals.add(block, ids, cut)
            texts = totals.rows + totals.documents
            bar.set_postfix(texts=texts, tokens=totals.tokens, refresh=False)
            bar.update(len(block.passages))
    return totals


def _encode_blocks(
    blocks: Iterator[Block], text_tokenizer: TextTokenizer
) -> Iterator[tuple[Block, list[np.ndarray], np.ndarray]]:
    """Blocks, their texts' ids and which were cut; the next ones are tokenized meanwhile."""

    def ids_and_cut(encodings: list[Encoding]) -> tuple[list[np.ndarray], np.ndarray]:
        cut = np.array([len(encoding) >= text_tokenizer.max_length for encoding in encodings], bool)
        return text_tokenizer.token_ids(encodings), cut

    waiting: deque[tuple[Block, Future]] = deque()
    # One thread, which itself uses all cores: two batches at once contend for the tokenizer's cache
    # (measured: a third more CPU time for the same texts).
    with ThreadPoolExecutor(1) as thread:
        for block in blocks:
            texts = block.queries + block.documents
            waiting.append((block, thread.submit(text_tokenizer.tokenize, texts)))
            if len(waiting) == BLOCKS_IN_FLIGHT:
                done, encodings = waiting.popleft()
                yield done, *ids_and_cut(encodings.result())
        while waiting:
            done, encodings = waiting.popleft()
            yield done, *ids_and_cut(encodings.result())


def _write_block(
    block: Block, ids: list[np.ndarray], query_file: pq.ParquetWriter, corpus_file: pq.ParquetWriter
) -> None:
    rows = len(block.passages)
    passages = pa.array(block.passages, pa.int64())
    negatives = list_array(block.negative_counts, np.array(block.negatives, np.int64))
    optional = [
        pa.array(block.optional[column.name], column.type)
        for column in query_file.schema
        if column.name in OPTIONAL_NAMES
    ]
    append_columns(query_file, [text_array(ids[:rows]), passages, negatives, *optional])
    append_columns(corpus_file, [text_array(ids[rows:])])


def _use_threads(num_workers: int | None) -> None:
    """Set how many threads the tokenizers library uses; its first batch fixes the number.

    By itself it takes the cores that affinity and container limits leave; the processes of a
    launch on one machine divide them.
    """
    if num_workers is None and (local := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > 1:
        num_workers = max(1, usable_cores() // local)
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
