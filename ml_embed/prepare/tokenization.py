"""Raw contrastive rows to token ids: what tokenize_data_qwen.py does.

One pass over each dataset in blocks of rows. The main thread reads, numbers documents by first
occurrence, and writes; meanwhile the tokenizers library works on the next blocks (Rust, on all
cores, without the GIL). Blocks depend on the content alone, so files are byte-identical whatever
the number of workers.
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
from filelock import AcquireReturnProxy
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ml_embed.config import DatasetConfig, check_dataset_names, match_settings
from ml_embed.data.tasks import task_of
from ml_embed.errors import UserError
from ml_embed.files.atomic import disk_errors_are_user_errors
from ml_embed.files.locks import lock_folder
from ml_embed.files.model_source import find_tokenizer_folder
from ml_embed.notices import notice
from ml_embed.prepare.ledger import Ledger
from ml_embed.prepare.numbering import TextNumbers, text_digest
from ml_embed.prepare.prompts import Prompts
from ml_embed.prepare.raw import (
    RowBatch,
    check_and_count_rows,
    declared_task,
    list_raw_datasets,
    read_row_batches,
)
from ml_embed.prepare.token_files import (
    CORPUS_SCHEMA,
    QUERY_SCHEMA,
    TokenFile,
    list_array,
    text_array,
)
from ml_embed.prepare.tokenizer import TextTokenizer, fingerprint, load_tokenizer

# A block's texts take about 150 bytes a token while they are tokenized; three blocks are in flight.
BLOCK_CHARACTERS = 2_000_000
BLOCK_TEXTS = 65_536
BLOCKS_IN_FLIGHT = 3
LOCK = ".tokenize.lock"


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
    """make everything anew, or go on with doing so after an interruption, instead of refusing"""
    datasets: Mapping[str, DatasetConfig] = field(default_factory=dict)
    """task and prompts by dataset name or shell-style pattern; the first match in the order given
    counts"""

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
    """What the manifest says of a dataset."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    negative_counts: list[int] = field(default_factory=list)  # [min, max, total]

    def add(self, block: Block, ids: list[np.ndarray]) -> None:
        """Count a block and its token ids."""
        self.rows += len(block.passages)
        self.documents += len(block.documents)
        self.tokens += sum(map(len, ids))
        low, high, total = self.negative_counts or [block.negative_counts[0], 0, 0]
        counts = block.negative_counts
        self.negative_counts = [min(low, *counts), max(high, *counts), total + sum(counts)]

    def entry(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        negatives = dict(zip(("min", "max", "total"), self.negative_counts, strict=True))
        return {
            "rows": self.rows,
            "documents": self.documents,
            "tokens": self.tokens,
            "negatives": negatives,
        }


def tokenize_folder(options: TokenizeOptions, progress: bool = True) -> dict[str, Any]:
    """Tokenize every dataset of a raw folder; return the manifest. Continues what an interrupted
    run left.

    Raises UserError, before anything is written, for input that cannot be read and for an output
    folder that holds something else than a part of the same result.
    """
    options.check()
    datasets = list_raw_datasets(options.input)
    rows = {dataset.name: check_and_count_rows(dataset) for dataset in datasets}
    _use_threads(options.num_workers)
    tokenizer = load_tokenizer(find_tokenizer_folder(options.tokenizer))
    encoder = TextTokenizer(tokenizer, options.max_seq_length)
    names = list(rows)
    check_dataset_names(names, options.datasets)
    settings = {name: match_settings(name, options.datasets) for name in names}
    prompts = {name: Prompts.of_settings(settings[name]) for name in names}
    with _exclusive(options.output):
        ledger = Ledger(options.output, _settings(tokenizer, options), options.overwrite)
        known = {
            dataset.name: describe_source(dataset.path)
            for dataset in datasets
            if dataset.name in ledger.datasets
        }
        recorded = {name: used.to_json().get("prompts", {}) for name, used in prompts.items()}
        ledger.check(names, known, recorded)
        todo = [dataset for dataset in datasets if not ledger.is_complete(dataset.name)]
        if len(todo) < len(datasets):
            notice(f"{len(datasets) - len(todo)} of {len(datasets)} datasets are complete already")
        with disk_errors_are_user_errors(
            options.output, "Then run the same command again: it continues."
        ):
            for dataset in tqdm(todo, unit=" file", desc="files", disable=not progress):
                ledger.begin(dataset.name)
                source = _in_background(describe_source, dataset.path)
                selected = select_rows(
                    dataset.name, rows[dataset.name], options.max_samples, options.seed
                )
                used = prompts[dataset.name]
                blocks = read_blocks(read_row_batches(dataset, selected), used, options.seed)
                total = rows[dataset.name] if selected is None else len(selected)
                entry = _tokenize_dataset(dataset.name, blocks, total, encoder, ledger, progress)
                task = (
                    settings[dataset.name].task or declared_task(dataset) or task_of(dataset.name)
                )
                ledger.record(
                    dataset.name, entry | used.to_json() | {"source": source.result(), "task": task}
                )
            ledger.remove_replaced(names)
            return ledger.finish()


def select_rows(name: str, num_rows: int, max_samples: int, seed: int) -> np.ndarray | None:
    """Sorted numbers of the rows to keep, chosen uniformly as a function of (seed, dataset); None =
    all."""
    if max_samples == 0 or num_rows <= max_samples:
        return None
    name_key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    generator = np.random.Generator(np.random.PCG64([seed, name_key]))
    # Without shuffling, memory is that of the chosen rows and not of all.
    return np.sort(generator.choice(num_rows, size=max_samples, replace=False, shuffle=False))


def describe_source(path: Path) -> dict[str, Any]:
    """Name, size in bytes and SHA-256 of a raw file."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}.") from error
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}


def read_blocks(batches: Iterator[RowBatch], prompts: Prompts, seed: int) -> Iterator[Block]:
    """Rows, prompts in front, as blocks of about BLOCK_CHARACTERS; documents are numbered by first
    occurrence."""
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
        bounds = np.concatenate(
            [[0], np.cumsum(batch.counts)]
        )  # of each row's documents, and of the new ones in them
        rows = pairwise(zip(bounds.tolist(), np.searchsorted(new, bounds).tolist(), strict=True))
        characters = np.add.reduceat(
            batch.characters + prompted * len(prompts.passage), bounds[:-1]
        ).tolist()
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
    encoder: TextTokenizer,
    ledger: Ledger,
    progress: bool,
) -> dict[str, Any]:
    """Write one dataset's two files; return its manifest entry."""
    paths = ledger.files_of(name)
    files = [TokenFile(paths["query"], QUERY_SCHEMA), TokenFile(paths["corpus"], CORPUS_SCHEMA)]
    totals = Totals()
    try:
        with tqdm(
            total=total_rows, unit=" row", desc=name, leave=False, disable=not progress
        ) as bar:
            for block, ids in _encode_blocks(blocks, encoder):
                _write_block(block, ids, *files)
                totals.add(block, ids)
                bar.set_postfix(
                    texts=totals.rows + totals.documents, tokens=totals.tokens, refresh=False
                )
                bar.update(len(block.passages))
    except BaseException:
        for file in files:
            file.discard()
        raise
    for file in files:
        file.commit()
    return totals.entry()


def _encode_blocks(
    blocks: Iterator[Block], encoder: TextTokenizer
) -> Iterator[tuple[Block, list[np.ndarray]]]:
    """Blocks with their texts' ids, in order; the next blocks are read and tokenized meanwhile."""
    waiting: deque[tuple[Block, Future]] = deque()
    # One thread, which itself uses all cores: two batches at once contend for the tokenizer's cache
    # (measured: a third more CPU time for the same texts).
    with ThreadPoolExecutor(1) as thread:
        for block in blocks:
            waiting.append(
                (block, thread.submit(encoder.tokenize, block.queries + block.documents))
            )
            if len(waiting) == BLOCKS_IN_FLIGHT:
                done, encodings = waiting.popleft()
                yield done, encoder.token_ids(encodings.result())
        while waiting:
            done, encodings = waiting.popleft()
            yield done, encoder.token_ids(encodings.result())


def _write_block(
    block: Block, ids: list[np.ndarray], query_file: TokenFile, corpus_file: TokenFile
) -> None:
    rows = len(block.passages)
    negatives = list_array(block.negative_counts, np.array(block.negatives, np.int64))
    query_file.write([text_array(ids[:rows]), pa.array(block.passages, pa.int64()), negatives])
    corpus_file.write([text_array(ids[rows:])])


def _settings(tokenizer: PreTrainedTokenizerBase, options: TokenizeOptions) -> dict[str, Any]:
    return {
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "max_seq_length": options.max_seq_length,
        "max_samples": options.max_samples,
        "seed": options.seed,
    }


def _use_threads(num_workers: int | None) -> None:
    """Set the size of the tokenizers library's thread pool, which is fixed by its first batch in
    this process.

    By itself the pool takes the cores that affinity and container limits leave.
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
