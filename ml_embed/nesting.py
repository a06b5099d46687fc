"""The nested sizes of the three axes: exits (MLL), dims (MRL), ranks (MEL), and the weight of each dim.

Letters: L layers, H hidden size, r rank of the factorised token table.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

EXIT_LAYERS = (1, 2, 4, 8, 16, 24, 32, 40, 48)
SMALLEST_DIM = 8
SMALLEST_RANK = 64

Cell = tuple[int, int, int]
"""rank (0: a whole token table), depth and dim of a cut of the model"""


@dataclass(frozen=True)
class Cube:
    """The sizes looked at on each axis."""

    ranks: tuple[int, ...]
    """ascending; (0,) is a whole token table"""
    depths: tuple[int, ...]
    """ascending"""
    dims: tuple[int, ...]
    """ascending"""

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(itertools.product(self.ranks, self.depths, self.dims))


def cell_name(rank: int, depth: int, dim: int) -> str:
    """What a cell of the cube is called in a run's metrics."""
    return f"rank_{rank}_depth_{depth}_dim_{dim}"


def cell_of_name(name: str) -> Cell | None:
    """rank, depth and dim of a `cell_name`; None for another name."""
    match = re.fullmatch(r"rank_(\d+)_depth_(\d+)_dim_(\d+)", name)
    if match is None:
        return None
    rank, depth, dim = map(int, match.groups())
    return rank, depth, dim


def default_exits(num_layers: int) -> tuple[int, ...]:
    """Layers after which a vector is read, ascending; always ends with the last one."""
    return tuple(sorted({layer for layer in EXIT_LAYERS if layer <= num_layers} | {num_layers}))


def _doublings(smallest: int, largest: int) -> set[int]:
    """{smallest, 2 smallest, 4 smallest, ... < largest} and largest."""
    sizes = {largest}
    size = smallest
    while size < largest:
        sizes.add(size)
        size *= 2
    return sizes


def default_dims(hidden_size: int) -> tuple[int, ...]:
    """Nested vector lengths, largest first: H, ..., 32, 16, 8."""
    return tuple(sorted(_doublings(SMALLEST_DIM, hidden_size), reverse=True))


def default_ranks(rank: int) -> tuple[int, ...]:
    """Nested ranks of the token table, ascending: 64, 128, 256, ..., r."""
    return tuple(sorted(_doublings(SMALLEST_RANK, rank)))


def dim_weights(dims: Sequence[int]) -> tuple[float, ...]:
    """Loss weight c_n = 1 / (n sqrt(d_1 / d_n)) of the n-th largest dim, n from 1 (arXiv 2605.15081).

    `dims` are given largest first; d_1 is the whole vector.
    """
    largest = dims[0]
    return tuple(1.0 / (n * math.sqrt(largest / dim)) for n, dim in enumerate(dims, start=1))
