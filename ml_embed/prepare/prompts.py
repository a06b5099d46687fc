"""Prompts: instructions that tokenization puts in front of texts, and that a model folder records.

A prompt is the exact text in front, e.g. "Instruct: Given a question, find its answer.\\nQuery: ".
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ml_embed.config import DatasetConfig, TrainConfig, match_settings
from ml_embed.data.manifest import DatasetEntry
from ml_embed.data.store import Store
from ml_embed.errors import UserError
from ml_embed.notices import notice


@dataclass(frozen=True)
class Prompts:
    """The prompts of one dataset; "" is none."""

    query: str = ""
    passage: str = ""
    """in front of passages and negatives"""
    passage_share: float = 1.0
    """share of the documents that get it"""

    @classmethod
    def of_settings(cls, settings: DatasetConfig) -> "Prompts":
        return cls(
            settings.prompt or "", settings.passage_prompt or "", settings.passage_prompt_share
        )

    @classmethod
    def of_manifest(cls, entry: DatasetEntry) -> "Prompts":
        """From a dataset's entry in manifest.json. Raises UserError if it is damaged."""
        prompts = {} if entry.prompts is None else entry.prompts
        try:
            query, passage = prompts.get("query", ""), prompts.get("passage", "")
            return cls(query + "", passage + "", float(prompts.get("passage_share", 1)))
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(
                f"manifest.json: the prompts {prompts!r} are damaged ({error}); tokenize again"
            ) from None

    def to_json(self) -> dict[str, Any] | None:
        """For the manifest; None where there is no prompt."""
        return dict(vars(self)) if self.query or self.passage else None

    def choose(self, documents: Sequence[bytes | memoryview], seed: int) -> np.ndarray:
        """(documents,) bool: which documents get the passage prompt.

        That depends on a document's UTF-8 and the seed alone: wherever a document stands, it stays
        the same document.
        """
        if not self.passage or self.passage_share in (0, 1):
            return np.full(len(documents), bool(self.passage) and self.passage_share == 1)
        key = seed.to_bytes(16, "little", signed=True)
        digests = [
            hashlib.blake2b(document, digest_size=8, key=key).digest() for document in documents
        ]
        limit = self.passage_share * 2**64
        return np.array([int.from_bytes(digest, "little") < limit for digest in digests], bool)


def prompt_of_input(
    name: str, role: Literal["query", "document"], datasets: Mapping[str, DatasetConfig]
) -> str | None:
    """What the config's `datasets` put in front of inputs of an evaluation; None = it says nothing.

    Documents get a passage prompt that all of them have in training; if only a share has, none.

    Args:
        name: of the task or file that is evaluated, matched like the name of a dataset.
        role: of the input.
        datasets: of a config.
    """
    settings = match_settings(name, datasets)
    if role == "query":
        return settings.prompt
    return settings.passage_prompt if settings.passage_prompt_share == 1 else None


def say_without_prompt(used: Mapping[str, Mapping[str, str]]) -> None:
    """Name what was evaluated without any prompt; `used` is name -> role -> what stood in front."""
    without = [name for name, prompts in used.items() if not any(prompts.values())]
    if without:
        notice(f"no prompt stood in front of the texts of {', '.join(without)}")


def check_prompts(config: TrainConfig, store: Store) -> None:
    """Refuse a config that names other prompts than the data was tokenized with.

    Raises:
        UserError: for all such datasets at once.
    """
    if store.manifest is None:  # the released layout does not say
        return
    problems = []
    for name, entry in store.manifest.datasets.items():
        settings, used = match_settings(name, config.datasets), Prompts.of_manifest(entry)
        compared: list[tuple[str, str | float | None, str | float]] = [
            ("prompt", settings.prompt, used.query),
            ("passage_prompt", settings.passage_prompt, used.passage),
        ]
        if settings.passage_prompt:
            compared.append(
                ("passage_prompt_share", settings.passage_prompt_share, used.passage_share)
            )
        for key, wanted, given in compared:
            if wanted is not None and wanted != given:
                problems.append(
                    f"datasets.{name}.{key}: the config says {wanted!r}, the data was made with "
                    f"{given!r}"
                )
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(
            "prompts are part of the tokenized data; run tokenize_data_qwen.py with --config and "
            "--overwrite again:\n"
            f"{listing}"
        )


def prompts_to_record(
    config: TrainConfig, store: Store, former: Mapping[str, str]
) -> dict[str, str]:
    """What the model folder offers its users: prompt name -> the text put in front.

    Each dataset's query prompt under the dataset's name. Where all datasets share one, also as
    "query", which sentence-transformers' `encode_query` takes; likewise "document" for a prompt
    that all documents have.

    Args:
        config: its prompts count where the data does not say which it was made with (the released
            layout).
        store: tokenized data.
        former: the prompts of the model that training starts from, kept where no new one has the
            name.
    """
    prompts = {
        name: Prompts.of_manifest(store.manifest.datasets[name])
        if store.manifest is not None
        else Prompts.of_settings(match_settings(name, config.datasets))
        for name in store.datasets
    }
    named = {name: used.query for name, used in prompts.items() if used.query}
    queries = {used.query for used in prompts.values()}
    documents = {used.passage if used.passage_share == 1 else "" for used in prompts.values()}
    for role, texts in (("query", queries), ("document", documents)):
        if len(texts) == 1 and (text := texts.pop()):
            named[role] = text
    return {**former, **named}
