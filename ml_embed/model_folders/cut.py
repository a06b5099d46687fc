"""Which part of a nested model is wanted: the checks shared by inference, export and evaluation."""

import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, Qwen3Config

from ml_embed.errors import UserError
from ml_embed.model_folders.model_folder import ModelRecord


@dataclass(frozen=True)
class Cut:
    """A cell of the cube."""

    depth: int
    """decoder layers run"""
    dim: int
    """vector length"""
    rank: int
    """rank of the token factors; 0 is a whole token table"""


def read_record(
    folder: Path, config: Qwen3Config, tokenizer: PreTrainedTokenizerBase
) -> ModelRecord:
    """What was trained. A plain backbone counts as trained at its whole depth and length, with the
    prompts that sentence-transformers would use.

    Raises:
        UserError: the record is damaged.
    """
    record = ModelRecord.load(folder)
    if record is not None:
        return record
    return ModelRecord(
        exits=(config.num_hidden_layers,),
        dims=(config.hidden_size,),
        ranks=(),
        temperature=1.0,  # not known; nothing here reads it
        max_seq_length=int(min(tokenizer.model_max_length, config.max_position_embeddings)),
        prompts=_saved_prompts(folder / "config_sentence_transformers.json"),
    )


def _saved_prompts(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).get("prompts") or {})
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); copy the model folder again") from None


def choose_cut(
    record: ModelRecord,
    config: Qwen3Config,
    depth: int | None = None,
    dim: int | None = None,
    rank: int | None = None,
    allow_untrained: bool = False,
) -> Cut:
    """The wanted part of a model; None is the whole of an axis.

    Raises:
        UserError: values that the model does not have or, without `allow_untrained`, was not
            trained at; all problems at once, with the trained values.
    """
    depth, dim, rank = (
        _whole_number(name, value)
        for name, value in (("depth", depth), ("dim", dim), ("rank", rank))
    )
    if rank is not None and not record.ranks:
        raise UserError(
            f"rank {rank}: this model has a whole token table, which has no rank to cut; leave "
            "rank out"
        )
    whole = Cut(config.num_hidden_layers, record.dims[0], record.ranks[-1] if record.ranks else 0)
    axes = (
        ("depth", depth, (*record.exits, whole.depth), whole.depth),
        ("dim", dim, record.dims, config.hidden_size),
        ("rank", rank, record.ranks, whole.rank),
    )
    problems = [_problem(*axis, allow_untrained) for axis in axes]
    if any(problems):
        raise UserError("; ".join(filter(None, problems)))
    return Cut(
        whole.depth if depth is None else depth,
        whole.dim if dim is None else dim,
        whole.rank if rank is None else rank,
    )


def _whole_number(name: str, value: Any) -> int | None:
    """An int of whatever counts as one: a NumPy integer too, but no 2.0. Raises UserError."""
    try:
        return None if value is None else operator.index(value)
    except TypeError:
        raise UserError(
            f"{name} {value!r} must be a whole number, not of type {type(value).__name__}"
        ) from None


def _problem(
    name: str, value: int | None, trained: Sequence[int], largest: int, allow_untrained: bool
) -> str | None:
    if value is None or value in trained:
        return None
    listed = ", ".join(map(str, sorted(set(trained))))
    if not 1 <= value <= largest:
        return (
            f"{name} {value!r} is not possible: it must be from 1 to {largest} (trained: {listed})"
        )
    if allow_untrained:
        return None
    return (
        f"{name} {value} was not trained (trained: {listed}); take one of these, or allow "
        "untrained values"
    )
