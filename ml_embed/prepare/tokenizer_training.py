"""A byte-level BPE tokenizer trained on one's own texts, and the reading of those texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ml_embed.errors import UserError
from ml_embed.files.json_file import parse_json
from ml_embed.files.parquet import is_list, is_text
from ml_embed.prepare.tokenizer import QWEN_SPLIT_PATTERN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS_TOKEN = "<|im_end|>"
PAD_TOKEN = "<|endoftext|>"
MAX_POSITIONS = 40960  # of Qwen3
DEFAULT_VOCAB_SIZE = 16384
SMALLEST_VOCAB_SIZE = 256 + 2  # every byte, and the two special tokens
TEXT_SUFFIXES = (".txt", ".parquet", ".jsonl")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = DEFAULT_VOCAB_SIZE
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with Qwen3's normalisation (NFC) and pre-tokenization.

    Any text can be written with it, because all 256 bytes are tokens. It has at most `vocab_size`
    tokens (fewer where the texts do not offer that many merges), `<|im_end|>` as EOS and
    `<|endoftext|>` as padding. It appends nothing by itself. The same texts in the same order give
    the same tokenizer.

    Raises:
        UserError: `vocab_size` is under 258, or there is no text.
    """
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCAB_SIZE:
        raise UserError(
            f"vocab size {vocab_size} is too small: 256 bytes and 2 special tokens need at least "
            f"{SMALLEST_VOCAB_SIZE}"
        )
    texts = _at_least_one(texts)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def read_texts(paths: Iterable[str | Path]) -> Iterator[str]:
    """Every distinct text of files, or of folders of files, in the order of the (sorted) files.

    `.txt` has one text per line. Of `.parquet` and `.jsonl` all string columns and lists of strings
    are read, so that a folder of raw data can be given as it is. A text that occurs often counts
    once: labels and repeated documents would otherwise drown the rest.

    Raises:
        UserError: a path is missing or of an unknown kind (before any is read), or a file is
            broken.
    """
    files = [file for path in paths for file in text_files(Path(path))]
    readers = {".txt": _read_txt, ".parquet": _read_parquet, ".jsonl": _read_jsonl}
    return _distinct(text for file in files for text in readers[file.suffix](file))


def _distinct(texts: Iterable[str]) -> Iterator[str]:
    seen: set[bytes] = set()  # digests, because the texts themselves may not fit in memory
    for text in texts:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield text


def _at_least_one(texts: Iterable[str]) -> Iterator[str]:
    """The same texts; raises UserError, now and not in the middle of training, if there is none."""
    iterator = iter(texts)
    first = next(iterator, None)
    if first is None:
        raise UserError(
            "there is no text to train a tokenizer on: the files are empty or hold no strings"
        )

    def chained() -> Iterator[str]:
        yield first
        yield from iterator

    return chained()


def text_files(path: Path) -> list[Path]:
    """The file itself, or the text files of a folder. Raises UserError if there are none."""
    if path.is_dir():
        files = sorted(
            file for file in path.iterdir() if file.is_file() and file.suffix in TEXT_SUFFIXES
        )
        if not files:
            raise UserError(
                f"{path} holds no {', '.join(TEXT_SUFFIXES)} file to train a tokenizer on"
            )
        return files
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; give files or folders of {', '.join(TEXT_SUFFIXES)}"
        )
    if path.suffix not in TEXT_SUFFIXES:
        raise UserError(
            f"{path} is of a kind that is not read; take one of {', '.join(TEXT_SUFFIXES)}"
        )
    return [path]


def _read_txt(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}") from error


def _read_jsonl(file: Path) -> Iterator[str]:
    for number, line in enumerate(_read_txt(file), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{file} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{file} line {number} is not a JSON object with named columns")
        for value in row.values():
            yield from (
                text
                for text in (value if isinstance(value, list) else [value])
                if isinstance(text, str)
            )


def _read_parquet(file: Path) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=4096):
            for column in batch.columns:
                if is_list(column.type):
                    column = column.flatten()
                if is_text(column.type):
                    column = column.cast(pa.large_string())
                    yield from pc.unique(column).drop_null().to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} cannot be read as parquet: {error}") from error
