"""Loading a tokenizer, giving it exactly one EOS, and turning texts into token ids.

Two paths lead from a text to ids: `TextEncoder`, which prepares training data, and the tokenizer that is saved beside
a model, which servers call. `append_eos_template` makes the second give the same ids as the first.

A text whose own characters spell a special token ("<|im_end|>") is read as that token, as the tokenizer does
everywhere else; EOS is then appended all the same. So a text that ends in the EOS string ends in two EOS ids, here and
in the saved tokenizer: the last position is always ours, and what a text says never changes where it is pooled.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ml_embed.errors import UserError

# A folder with none of these has no vocabulary; transformers would make an empty tokenizer from config.json alone.
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def load_tokenizer(path: str | Path, needs_padding: bool = True) -> PreTrainedTokenizerBase:
    """The fast tokenizer in a folder, or of a model on the hub if `path` is no folder but a name ("Qwen/Qwen3-0.6B").

    Code that comes with a tokenizer is never run. Raises UserError if there is none, if it has no fast
    (`tokenizers`) version, or if its EOS token, or with `needs_padding` its padding token, is not set.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in VOCABULARY_FILES):
            raise UserError(
                f"no tokenizer in {folder}: it holds none of {', '.join(VOCABULARY_FILES)}. "
                "Give a folder made by save_pretrained."
            )
        source = str(folder)
    elif folder.exists():
        raise UserError(f"{folder} is a file; give the folder that holds the tokenizer, or a name on the hub.")
    elif _is_written_as_path(str(path)):
        raise UserError(f"tokenizer folder {folder} does not exist. Give a folder that holds tokenizer.json.")
    else:
        source = str(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a broken file; the hub has a dozen classes
        remedy = (
            "Check that its files are whole."
            if folder.is_dir()
            else "It is not a folder here either: without network access, download the model and give its folder."
        )
        raise UserError(f"cannot load a tokenizer from {source!r}: {_first_line(error)}. {remedy}") from error
    _check_usable(tokenizer, source, ("eos_token", "pad_token") if needs_padding else ("eos_token",))
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of all that decides the ids of a text.

    The post-processor, truncation and padding are left out: they add to ids or cut them but do not change them. So a
    tokenizer keeps its fingerprint when it is saved with an EOS-appending post-processor.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    for key in ("post_processor", "truncation", "padding"):
        description.pop(key, None)
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def append_eos_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokenizer end every text with exactly one EOS of its own, after truncation too. In place, idempotent.

    Afterwards `tokenizer(text, truncation=True, max_length=n).input_ids` are the ids `TextEncoder(tokenizer, n)`
    gives. A post-processor that adds anything else (a BOS, a [CLS]) is replaced, because training ids have no such
    token; one that adds nothing (byte-level offsets) is kept in front.
    """
    backend = tokenizer.backend_tokenizer
    added = _added_ids(tokenizer)
    if added == [tokenizer.eos_token_id]:
        return
    eos = tokenizer.eos_token
    template = processors.TemplateProcessing(
        single=f"$A {eos}", pair=f"$A {eos} $B:1 {eos}:1", special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    keep_existing = backend.post_processor is not None and added == []
    backend.post_processor = processors.Sequence([backend.post_processor, template]) if keep_existing else template


class TextEncoder:
    """Texts to token ids for training: truncated to max_length - 1, then exactly one EOS.

    Works on a copy of the tokenizer without truncation, padding or post-processing; the caller's is not touched.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        if max_length < 2:
            raise UserError(f"maximum sequence length is {max_length}: it must be at least 2 (one token and EOS).")
        self.max_length = max_length
        self.eos_id: int = tokenizer.eos_token_id
        self._backend: Tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        # Not part of the tokenizer's JSON, but transformers sets it before each of its own calls.
        self._backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """One int32 array of 1..max_length ids per text; before the EOS they are the ids of that text alone."""
        return self.token_ids(self.tokenize(texts))

    def tokenize(self, texts: list[str]) -> list[Encoding]:
        """The first half of a call, for pipelines: Rust, on all cores, without the GIL."""
        return self._backend.encode_batch_fast(texts, add_special_tokens=False)

    def token_ids(self, encodings: list[Encoding]) -> list[np.ndarray]:
        """The second half of a call: Python, less than a tenth of the first half's CPU time (measured)."""
        return [self._finish(encoding.ids) for encoding in encodings]

    def _finish(self, ids: list[int]) -> np.ndarray:
        del ids[self.max_length - 1 :]
        ids.append(self.eos_id)
        return np.fromiter(ids, np.int32, len(ids))  # measured: faster than np.array for lists of ints


def _added_ids(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The ids that the post-processor puts after a text; None if it puts any before it or changes it."""
    backend = tokenizer.backend_tokenizer
    if backend.post_processor is None:
        return []
    bare = backend.encode("a", add_special_tokens=False)
    processed = backend.post_process(bare, None, True).ids
    return processed[len(bare.ids) :] if processed[: len(bare.ids)] == bare.ids else None


def _check_usable(tokenizer: Any, source: str, needed: tuple[str, ...]) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"the tokenizer of {source!r} has no fast version. Give one that has a tokenizer.json.")
    for name in needed:
        if getattr(tokenizer, f"{name}_id") is None:
            raise UserError(
                f"the tokenizer of {source!r} has no {name}. Set {name!r} in its tokenizer_config.json "
                "to a token of its vocabulary."
            )


def _is_written_as_path(path: str) -> bool:
    """Hub names are "name" or "owner/name": anything else can only be meant as a path."""
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1 or path.endswith("/")


def _first_line(error: Exception) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
