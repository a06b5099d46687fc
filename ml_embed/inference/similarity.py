"""Cosines between vectors, as sentence-transformers' `similarity` gives them.

Letters: N and M vectors, D their length.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

Vectors = Tensor | np.ndarray | Sequence[Tensor] | Sequence[np.ndarray]
"""(N, D), or (D,) for one."""


def similarity(left: Vectors, right: Vectors) -> Tensor:
    """(N, D), (M, D) -> (N, M) cosines, on the device of `left`."""
    rows = _unit_rows(left)
    return rows @ _unit_rows(right).to(rows.device).T


def similarity_pairwise(left: Vectors, right: Vectors) -> Tensor:
    """(N, D), (N, D) -> (N,) cosines of each with the other of its place."""
    rows = _unit_rows(left)
    return (rows * _unit_rows(right).to(rows.device)).sum(dim=-1)


def _unit_rows(vectors: Vectors) -> Tensor:
    if not isinstance(vectors, Tensor | np.ndarray):
        vectors = torch.stack([torch.as_tensor(vector) for vector in vectors])
    return normalize(torch.atleast_2d(torch.as_tensor(vectors)).float(), dim=-1)
