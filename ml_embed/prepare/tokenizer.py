"""Loading a tokenizer, giving it exactly one EOS, and turning texts into token ids.

Two paths lead from a text to ids: `TextTokenizer`, which prepares training data, and the tokenizer
that is saved beside a model, which servers call. `append_eos_template` makes the second give the
same ids as the first.

A text whose own characters spell a special token ("<|im_end|>") is read as that token, as the
tokenizer does everywhere else; EOS is then appended all the same. So a text that ends in the EOS
string ends in two EOS ids, here and in the saved tokenizer: the model always pools the EOS that was
appended, whatever the text says.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ml_embed.errors import UserError, one_line
from ml_embed.files.json_file import read_json
from ml_embed.prepare.time_limit import is_panic, watched

# The public Qwen2/Qwen3 pre-tokenization: contractions, words, single digits, punctuation, line
# ends, spaces.
QWEN_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# A folder with none of these has no vocabulary; transformers would make an empty tokenizer from
# config.json alone.
VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
BEGINNING_CHARACTERS = 8
"""Per token of a beginning: twice what English takes, so that one beginning is nearly always
enough."""
_CUT = re.compile(r"(?<=\S)(?= )|(?<=\n)(?=\S)|(?<=[0-9])")
"""Where a text can be cut: before a space, at the start of a line, after a digit."""


def load_tokenizer(folder: Path, needs_padding: bool = True) -> PreTrainedTokenizerBase:
    """The fast tokenizer in a folder; code that comes with it is never run.

    Its `eos_token` is the end token, whatever its configuration says.

    Raises:
        UserError: there is none, it asks for code of its own, it has no fast (`tokenizers`)
            version, or its end token, or with `needs_padding` its padding token, is not set.
    """
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise UserError(
            f"no tokenizer in {folder}: it holds none of {', '.join(VOCABULARY_FILES)}. "
            "Give a folder made by save_pretrained."
        )
    _check_own_code(folder / "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except BaseException as error:  # tokenizers raises bare Exception for a broken file
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise UserError(
            f"cannot load a tokenizer from {folder}: {one_line(error).rstrip('.')}. "
            "Check that its files are whole."
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the tokenizer in {folder} has no fast version. Give one that has a tokenizer.json."
        )
    if (end := end_token(tokenizer)) is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    _check_usable(
        tokenizer, folder, ("eos_token", "pad_token") if needs_padding else ("eos_token",)
    )
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of all that decides the ids of a text.

    The post-processor, truncation and padding are left out: they add to ids or cut them but do not
    change them. So a tokenizer keeps its fingerprint when it is saved with a post-processor that
    appends EOS.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    for key in ("post_processor", "truncation", "padding"):
        description.pop(key, None)
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id at the end of every text, where its vector is read.

    It is the one that the tokenizer appends by itself, where it appends exactly one and puts
    nothing in front (Qwen3-Embedding's: `<|endoftext|>`, while its `eos_token` is `<|im_end|>`);
    else its `eos_token`.
    """
    added = _added_ids(tokenizer)
    return added[0] if added is not None and len(added) == 1 else tokenizer.eos_token_id


def appends_end_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer by itself gives the ids that `TextTokenizer` gives."""
    return _added_ids(tokenizer) == [end_token(tokenizer)]


def append_eos_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a tokenizer, in place, append exactly one end token to each text, truncated ones too.

    The end token is its `eos_token` from then on.

    Afterwards `tokenizer(text, truncation=True, max_length=n).input_ids` are the ids
    `TextTokenizer(tokenizer, n)` gives. A post-processor that adds anything else (a BOS, a [CLS])
    is replaced, because training ids have no such token; one that adds nothing (byte-level offsets)
    is kept in front.
    """
    backend = tokenizer.backend_tokenizer
    added, end = _added_ids(tokenizer), end_token(tokenizer)
    tokenizer.eos_token = eos = tokenizer.convert_ids_to_tokens(end)
    if added == [end]:
        return
    template = processors.TemplateProcessing(
        single=f"$A {eos}",
        pair=f"$A {eos} $B:1 {eos}:1",
        special_tokens=[(eos, end)],
    )
    keep_existing = backend.post_processor is not None and added == []
    backend.post_processor = (
        processors.Sequence([backend.post_processor, template]) if keep_existing else template
    )


class TextTokenizer:
    """Texts to token ids for training: truncated to max_length - 1, then exactly one EOS.

    Works on a copy of the tokenizer without truncation, padding or post-processing; the caller's is
    not touched. Of a text that is much longer than `max_length`, only a beginning is tokenized
    where that gives the same ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        if max_length < 2:
            raise UserError(
                f"maximum sequence length is {max_length}: it must be at least 2 (one token and "
                "EOS)."
            )
        self.max_length = max_length
        self.eos_id = end_token(tokenizer)
        description = tokenizer.backend_tokenizer.to_str()
        self._can_be_cut = _can_be_cut(json.loads(description))
        self._backend: Tokenizer = Tokenizer.from_str(description)
        self._backend.no_truncation()
        self._backend.no_padding()
        # Not part of the tokenizer's JSON, but transformers sets it before each of its own calls.
        self._backend.encode_special_tokens = bool(
            getattr(tokenizer, "split_special_tokens", False)
        )

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """For each text 1..max_length int32 ids: those of that text alone, then EOS."""
        return self.token_ids(self.tokenize(texts))

    def tokenize(self, texts: list[str]) -> list[Encoding]:
        """The first half of a call, for pipelines: Rust, on all cores, without the GIL."""
        beginnings = [
            self._beginning(text, BEGINNING_CHARACTERS * self.max_length) for text in texts
        ]
        encodings = self._encode(beginnings)
        for i, text in enumerate(texts):
            while len(beginnings[i]) < len(text) and len(encodings[i]) < self.max_length:
                beginnings[i] = self._beginning(text, 4 * len(beginnings[i]))
                encodings[i] = self._encode([beginnings[i]])[0]
        return encodings

    def _encode(self, texts: list[str]) -> list[Encoding]:
        return watched(
            lambda texts: self._backend.encode_batch_fast(texts, add_special_tokens=False), texts
        )

    def _beginning(self, text: str, characters: int) -> str:
        """At least so many characters of a text, up to the next `_CUT`; all if none is near."""
        if len(text) <= characters or not self._can_be_cut:
            return text
        place = _CUT.search(text, characters, 2 * characters)
        return text if place is None else text[: place.start()]

    def token_ids(self, encodings: list[Encoding]) -> list[np.ndarray]:
        """The second half of a call: Python, under a tenth of the first half's time (measured)."""
        return [self._finish(encoding.ids) for encoding in encodings]

    def _finish(self, ids: list[int]) -> np.ndarray:
        del ids[self.max_length - 1 :]
        ids.append(self.eos_id)
        return np.fromiter(ids, np.int32, len(ids))  # measured: faster than np.array here


def _can_be_cut(description: dict[str, Any]) -> bool:
    """Whether a text may be cut at any `_CUT` without a change of the ids before it.

    Args:
        description: the tokenizer's tokenizer.json.

    With Qwen's pre-tokenization it may, because none of the steps looks across such a place:
    - Added tokens are found first, from the left. None of them spans such a place, and none depends
      on what stands beside it.
    - NFC joins nothing there: a space, a line end or a digit does not compose with what follows,
      and a space does not compose with what stands before it.
    - QWEN_SPLIT_PATTERN begins a new piece there. No alternative matches a space after anything but
      white space, or a digit together with anything else. Only the last two alternatives look
      ahead, at the end of a run of white space; that run ends before the place, or at the place
      with a line end, and then an earlier alternative has matched it whole.
    - The model (BPE) sees each piece alone, if it has no random part (dropout).
    """
    return (
        splits_as_qwen(description)
        and not description["model"].get("dropout")
        and not any(_looks_beside(token) for token in description["added_tokens"])
    )


def splits_as_qwen(description: dict[str, Any]) -> bool:
    """Whether a tokenizer.json normalises texts and cuts them into pieces as Qwen's does."""
    steps = (description["pre_tokenizer"] or {}).get("pretokenizers", [])
    pattern = [step.get("pattern") for step in steps]
    return (
        description["normalizer"] in (None, {"type": "NFC"})
        and [step["type"] for step in steps] == ["Split", "ByteLevel"]
        and (pattern[0], steps[0]["behavior"], steps[0]["invert"])
        == ({"Regex": QWEN_SPLIT_PATTERN}, "Isolated", False)
        and not (steps[1]["use_regex"] or steps[1]["add_prefix_space"])
    )


def _looks_beside(token: dict[str, Any]) -> bool:
    within = any(
        0 < place.start() < len(token["content"]) for place in _CUT.finditer(token["content"])
    )
    return within or token["lstrip"] or token["single_word"]


def _added_ids(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The ids that the post-processor appends to a text; None if it does anything else to it."""
    backend = tokenizer.backend_tokenizer
    if backend.post_processor is None:
        return []
    bare = backend.encode("a", add_special_tokens=False)
    processed = backend.post_process(bare, None, True).ids
    return processed[len(bare.ids) :] if processed[: len(bare.ids)] == bare.ids else None


def _check_own_code(path: Path) -> None:
    """Refuse a tokenizer_config.json that is damaged or asks for code."""
    if path.is_file() and read_json(path, "copy the tokenizer again").get("auto_map"):
        raise UserError(
            f"{path}: auto_map asks for code of the folder's own, which is never run; if "
            "tokenizer.json is all that the tokenizer needs, remove auto_map"
        )


def _check_usable(tokenizer: Any, folder: Path, needed: tuple[str, ...]) -> None:
    for name in needed:
        if getattr(tokenizer, f"{name}_id") is None:
            raise UserError(
                f"the tokenizer in {folder} has no {name}. Set {name!r} in its "
                "tokenizer_config.json to a token of its vocabulary."
            )
