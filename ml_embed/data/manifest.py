"""manifest.json of a folder of tokenized data: what it says, and the one place that reads it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ml_embed.errors import UserError
from ml_embed.files.digests import SEAL, seal_is_broken
from ml_embed.files.json_file import read_json

MANIFEST = "manifest.json"
AGAIN = "run tokenize_data_qwen.py again with --overwrite"
FORMAT_VERSION = 2
"""Version 1 has no optional columns, digests, or numbers of what was left out. It is still read."""


@dataclass(frozen=True)
class DatasetEntry:
    """What the manifest says of one dataset. Values that are None do not stand in the file."""

    rows: int
    documents: int
    tokens: int | None = None
    """of queries and documents, each document once"""
    negatives: Mapping[str, int] | None = None
    """`min` and `max` per row, and `total`"""
    task: str | None = None
    prompts: Mapping[str, Any] | None = None
    """`Prompts.to_json`; None if no text got one"""
    source: Mapping[str, Any] | None = None
    """file, bytes and sha256 of the raw data"""
    provenance: Mapping[str, str] | None = None
    """`source`, `revision` and `license`, those that are known; None if none is"""
    bytes: Mapping[str, int] | None = None
    """size of the `query` and the `corpus` file"""
    digests: Mapping[str, str] | None = None
    """xxh3_128 of the two files' content"""
    columns: Sequence[str] | None = None
    """optional columns of the query file, of `query_id, language, score, pos_score, neg_scores`"""
    queries: int | None = None
    """different `query_id`s; None if there is no such column"""
    languages: Mapping[str, int] | None = None
    """rows of each `language`; None if there is no such column"""
    text_sizes: Mapping[str, Mapping[str, int]] | None = None
    """`characters` and `tokens` of the texts of each `language`, those with a prompt and those that
    were cut left aside; None if there is no such column"""
    left_out: Mapping[str, int] | None = None
    """rows that are not there, by the reason; None if there are none"""
    texts_cut: Mapping[str, int] | None = None
    """`queries` and `documents` that were longer than max_seq_length; None if there are none"""
    labels: int | None = None
    """of labelled text"""

    def to_json(self) -> dict[str, Any]:
        return _without_none(self)


@dataclass(frozen=True)
class Manifest:
    """All of it. Values that are None do not stand in the file."""

    eos_id: int
    vocab_size: int
    """largest token id of the tokenizer, plus one"""
    tokenizer_fingerprint: str
    pad_id: int | None = None
    max_seq_length: int | None = None
    """tokens of a text at most, EOS included"""
    max_samples: int | None = None
    """rows kept of each dataset; 0 = all"""
    seed: int | None = None
    """of the choice of rows and of documents that get a prompt"""
    datasets: Mapping[str, DatasetEntry] = field(default_factory=dict)
    passed_over: Sequence[str] | None = None
    """files of the input that are no data; None if there are none"""
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Raises UserError if the file is missing, damaged or of another format version."""
        content = read_json(path, AGAIN)
        if seal_is_broken(content):
            raise UserError(
                f"{path} has changed since it was written. Copy it again, or run "
                f"tokenize_data_qwen.py with --overwrite; if you have edited it on purpose, remove "
                f"its key {SEAL!r}."
            )
        version = content.get("format_version")
        if version not in (1, FORMAT_VERSION):
            raise UserError(
                f"{path} has format version {version!r}; this program reads versions 1 and "
                f"{FORMAT_VERSION}. "
                "Tokenize the data again with this version's tokenize_data_qwen.py."
            )
        required = {"datasets", "eos_id", "vocab_size", "tokenizer_fingerprint"}
        if missing := required - content.keys():
            raise UserError(f"{path} lacks {', '.join(sorted(missing))}; {AGAIN}")
        try:
            return cls.from_json(content)
        except (TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); {AGAIN}") from error

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Manifest":
        """Raises TypeError or AttributeError if a key is missing or of another kind."""
        listed = content["datasets"].items()
        datasets = {name: _of_json(DatasetEntry, entry) for name, entry in listed}
        return _of_json(cls, {**content, "datasets": datasets})

    def to_json(self) -> dict[str, Any]:
        datasets = {name: entry.to_json() for name, entry in self.datasets.items()}
        further = {"passed_over": list(self.passed_over)} if self.passed_over else {}
        return {**self.settings(), **further, "datasets": datasets}

    def settings(self) -> dict[str, Any]:
        """What holds for all datasets, as it stands in the file."""
        return {
            key: value
            for key, value in _without_none(self).items()
            if key not in ("datasets", "passed_over")
        }


def _of_json(kind: type, content: Mapping[str, Any]) -> Any:
    """A dataclass from its JSON object; keys that it does not have are passed over."""
    known = get_type_hints(kind)
    values = {key: value for key, value in content.items() if key in known}
    for key, value in values.items():
        if not _fits(value, known[key]):
            raise TypeError(f"{key} cannot be {json.dumps(value)[:60]}")
    return kind(**values)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of a field's type; numbers are counts and fit into 63 bits."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(_fits(value, part) for part in parts)
    if origin is Mapping:
        return isinstance(value, dict) and all(_fits(v, parts[1]) for v in value.values())
    if origin is Sequence:
        return isinstance(value, list) and all(_fits(v, parts[0]) for v in value)
    if hint is int:
        return type(value) is int and abs(value) < 2**63
    return hint is Any or isinstance(value, hint)


def _without_none(record: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if value is not None}
