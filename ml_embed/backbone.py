"""Fresh Qwen3 backbones: preset shapes with random weights, and byte-level BPE tokenizers trained on the user's text.

A backbone folder is a plain `Qwen3Model` (safetensors) with its tokenizer: `AutoModel.from_pretrained` and
`AutoTokenizer.from_pretrained` load it, and so does `run.py` as `model_path`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ml_embed.errors import UserError
from ml_embed.files import MAX_SHARD_SIZE, atomic_folder, give_usual_permissions
from ml_embed.paths import check_model_output, home_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3Config

EOS_TOKEN = "<|im_end|>"
PAD_TOKEN = "<|endoftext|>"
DTYPES = ("float32", "bfloat16")
MAX_POSITIONS = 40960  # of Qwen3
DEFAULT_VOCAB_SIZE = 16384
SMALLEST_VOCAB_SIZE = 256 + 2  # every byte, and the two special tokens
VOCAB_MULTIPLE = 64  # rows of the embedding table come in blocks that matrix kernels like
# The public Qwen2/Qwen3 pre-tokenization: contractions, words, single digits, punctuation, line ends, spaces.
QWEN_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT_SUFFIXES = (".txt", ".parquet", ".jsonl")


@dataclass(frozen=True)
class Preset:
    """The shape of a Qwen3 decoder; everything else is as in Qwen3."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128


# 80M to 14B: F2LLM-v2 (arXiv 2603.19223), table 1; those names count the embedding table of Qwen3's 151,936 tokens.
# "tiny" is ours, for laptops and tests: 1.2 million parameters beside the table.
PRESETS = {
    "tiny": Preset(128, 384, 6, 4, 2, head_dim=32),
    "80M": Preset(320, 2048, 8, 16, 8),
    "160M": Preset(640, 1536, 9, 16, 8),
    "330M": Preset(896, 2560, 16, 16, 8),
    "0.6B": Preset(1024, 3072, 28, 16, 8),
    "1.7B": Preset(2048, 6144, 28, 16, 8),
    "4B": Preset(2560, 9728, 36, 32, 8),
    "8B": Preset(4096, 12288, 36, 32, 8),
    "14B": Preset(5120, 17408, 40, 40, 8),
}


def backbone_config(preset: str, vocab_size: int, eos_token_id: int, pad_token_id: int | None) -> Qwen3Config:
    """The Qwen3 configuration of a preset, with an embedding table of exactly `vocab_size` rows."""
    from transformers import Qwen3Config

    if preset not in PRESETS:
        raise UserError(f"preset {preset!r} is not known; take one of {', '.join(PRESETS)}")
    return Qwen3Config(
        **vars(PRESETS[preset]),
        vocab_size=vocab_size,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )


def init_backbone(
    preset: str,
    tokenizer: PreTrainedTokenizerFast,
    output: str | Path,
    seed: int = 0,
    dtype: str = "float32",
    vocab_size: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a backbone folder: random weights of the preset's shape (from `seed`), and the tokenizer.

    The table has one row a token id, rounded up to a multiple of 64; `vocab_size` asks for more rows. Memory needed
    is the weights in `dtype` and half a gigabyte (measured: 2.8 GB for 0.6B in float32, 3.9 GB for 1.7B in bfloat16).
    The folder appears whole or not at all.

    Raises UserError if the preset or dtype is unknown, the tokenizer has no EOS token, `vocab_size` is less than
    the tokenizer needs, or `output` holds something already (`overwrite` replaces a model folder, nothing else).
    """
    import torch
    from transformers import Qwen3Model

    output = home_path(output)
    check_model_output(output, overwrite)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not known; take one of {', '.join(DTYPES)}")
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no EOS token, where a text's vector is read; set `eos_token` in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = table_rows(tokenizer, vocab_size)
    config = backbone_config(preset, rows, tokenizer.eos_token_id, tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        model = Qwen3Model._from_config(config, dtype=getattr(torch, dtype))

    with atomic_folder(output) as partial:
        model.save_pretrained(partial, max_shard_size=MAX_SHARD_SIZE)
        tokenizer.save_pretrained(partial)
        give_usual_permissions(partial)
    return output


def table_rows(tokenizer: PreTrainedTokenizerFast, vocab_size: int | None = None) -> int:
    """Rows of the embedding table: enough for every token id and for `vocab_size`, a multiple of 64."""
    needed = max(tokenizer.get_vocab().values()) + 1
    if vocab_size is not None and vocab_size < needed:
        raise UserError(
            f"vocab size {vocab_size} is less than the tokenizer's {needed} ids; leave it out, or give at least that"
        )
    return -(-max(needed, vocab_size or 0) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def train_tokenizer(texts: Iterable[str], vocab_size: int = DEFAULT_VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with Qwen3's normalisation (NFC) and pre-tokenization.

    Any text can be written with it, because all 256 bytes are tokens. It has at most `vocab_size` tokens (fewer where
    the texts do not offer that many merges), `<|im_end|>` as EOS and `<|endoftext|>` as padding. It appends nothing by
    itself. The same texts in the same order give the same tokenizer.

    Raises UserError if `vocab_size` is under 258 or there is no text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCAB_SIZE:
        raise UserError(
            f"vocab size {vocab_size} is too small: 256 bytes and 2 special tokens need at least {SMALLEST_VOCAB_SIZE}"
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
    """Every distinct text of some files, or of folders of such files, once, in the order of the (sorted) files.

    `.txt` has one text a line; of `.parquet` and `.jsonl` all string columns and lists of strings are read, so that a
    folder of raw data can be given as it is. A text that occurs often counts once: labels and repeated documents
    would otherwise drown the rest. Raises UserError for a path that is missing, unknown or broken, before any is read.
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
        raise UserError("there is no text to train a tokenizer on: the files are empty or hold no strings")

    def chained() -> Iterator[str]:
        yield first
        yield from iterator

    return chained()


def text_files(path: Path) -> list[Path]:
    """The file itself, or the text files of a folder. Raises UserError if there are none."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix in TEXT_SUFFIXES)
        if not files:
            raise UserError(f"{path} holds no {', '.join(TEXT_SUFFIXES)} file to train a tokenizer on")
        return files
    if not path.is_file():
        raise UserError(f"{path} does not exist; give files or folders of {', '.join(TEXT_SUFFIXES)}")
    if path.suffix not in TEXT_SUFFIXES:
        raise UserError(f"{path} is of a kind that is not read; take one of {', '.join(TEXT_SUFFIXES)}")
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
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{file} line {number} is not a JSON object with named columns")
        for value in row.values():
            yield from (text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str))


def _read_parquet(file: Path) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=4096):
            for column in batch.columns:
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                    column = column.flatten()
                if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                    yield from pc.unique(column).drop_null().to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} cannot be read as parquet: {error}") from error
