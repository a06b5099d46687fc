"""The nested sizes of the three axes: exits (MLL), dims (MRL), ranks (MEL), and the weight of each
dim.

Letters: L layers, H hidden size, r rank of the factorised token table.
"""

import itertools
import re
from dataclasses import dataclass

BYTES_PER_COMPONENT = 4  # vectors are given as float32


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
