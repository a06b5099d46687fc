"""The parts of a nested model: a cut is one rank, depth and vector length of it.

Imports nothing heavy, so that commands can name cuts before torch is loaded.
"""

import itertools
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ml_embed.errors import UserError

if TYPE_CHECKING:
    from transformers import Qwen3Config

    from ml_embed.model_folders.record import ModelRecord


@dataclass(frozen=True, order=True)
class Cut:
    """A part of a nested model; cuts are sorted by rank, then depth, then dim."""

    rank: int
    """rank of the token factors; 0 is a whole token table"""
    depth: int
    """decoder layers run"""
    dim: int
    """vector length"""

    @property
    def name(self) -> str:
        """What the cut is called in a run's metrics."""
        return f"rank_{self.rank}_depth_{self.depth}_dim_{self.dim}"

    @classmethod
    def of_name(cls, name: str) -> "Cut | None":
        """The cut that has this `name`; None for any other text."""
        match = re.fullmatch(r"rank_(\d+)_depth_(\d+)_dim_(\d+)", name)
        return None if match is None else cls(*map(int, match.groups()))

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Cut":
        """The cut that a row of an evaluation is about."""
        return cls(row["rank"], row["depth"], row["dim"])

    def __str__(self) -> str:
        """What the cut is called in tables."""
        return f"depth {self.depth}, dim {self.dim}, {table_name(self.rank)}"


def table_name(rank: int) -> str:
    """What the token table of this rank is called in tables."""
    return f"rank {rank}" if rank else "whole token table"


def single_axes(cut: Cut, whole: Cut) -> tuple[Cut, Cut, Cut]:
    """The cuts of each of a cut's axes alone: rank, depth, dim."""
    return (
        Cut(cut.rank, whole.depth, whole.dim),
        Cut(whole.rank, cut.depth, whole.dim),
        Cut(whole.rank, whole.depth, cut.dim),
    )


@dataclass(frozen=True)
class Cube:
    """The sizes looked at on each axis, ascending."""

    ranks: tuple[int, ...]
    """(0,) is a whole token table"""
    depths: tuple[int, ...]
    dims: tuple[int, ...]

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Every combination, sorted."""
        return tuple(itertools.starmap(Cut, itertools.product(self.ranks, self.depths, self.dims)))


def whole_cut(record: "ModelRecord", config: "Qwen3Config") -> Cut:
    """The whole of a model."""
    rank = record.ranks[-1] if record.ranks else 0
    return Cut(rank, config.num_hidden_layers, record.dims[0])


def choose_cut(
    record: "ModelRecord",
    config: "Qwen3Config",
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
    given = {"depth": depth, "dim": dim, "rank": rank}
    wanted = {axis: _whole_number(axis, size) for axis, size in given.items() if size is not None}
    if "rank" in wanted and not record.ranks:
        raise UserError(
            f"rank {wanted['rank']}: this model has a whole token table, which has no rank to cut; "
            "leave rank out"
        )
    whole = whole_cut(record, config)
    axes = {
        "depth": ((*record.exits, whole.depth), whole.depth),
        "dim": (record.dims, config.hidden_size),
        "rank": (record.ranks, whole.rank),
    }
    problems = [_problem(axis, size, *axes[axis], allow_untrained) for axis, size in wanted.items()]
    if any(problems):
        raise UserError("; ".join(filter(None, problems)))
    return Cut(**vars(whole) | wanted)


def _whole_number(axis: str, value: Any) -> int:
    """An int of whatever counts as one: a NumPy integer too, but no 2.0. Raises UserError."""
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(
            f"{axis} {value!r} must be a whole number, not of type {type(value).__name__}"
        ) from None


def _problem(
    axis: str, size: int, trained: Sequence[int], largest: int, allow_untrained: bool
) -> str | None:
    if size in trained:
        return None
    listed = ", ".join(map(str, sorted(set(trained))))
    if not 1 <= size <= largest:
        return (
            f"{axis} {size!r} is not possible: it must be from 1 to {largest} (trained: {listed})"
        )
    if allow_untrained:
        return None
    return (
        f"{axis} {size} was not trained (trained: {listed}); take one of these, or allow "
        "untrained values"
    )


def choose_cube(
    record: "ModelRecord",
    config: "Qwen3Config",
    ranks: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
) -> Cube:
    """The wanted sizes of a model, trained or not; None is all that were trained.

    Raises:
        UserError: a size that the model does not have.
    """

    def chosen(axis: str, sizes: Sequence[int] | None, trained: Sequence[int]) -> tuple[int, ...]:
        found = {
            getattr(choose_cut(record, config, **{axis: size}, allow_untrained=True), axis)
            for size in sizes or ()
        }
        return tuple(sorted(found or trained))

    return Cube(
        chosen("rank", ranks, record.ranks or (0,)),
        chosen("depth", depths, record.exits),
        chosen("dim", dims, record.dims),
    )
