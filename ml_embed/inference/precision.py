"""Vectors in fewer bits, computed as sentence-transformers' `quantize_embeddings` does."""

from typing import Literal, get_args

import numpy as np

from ml_embed.errors import UserError
from ml_embed.notices import warn

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
STEADY_FROM = 100
"""Vectors from which on the ranges of integers hardly move."""


def quantize(vectors: np.ndarray, precision: Precision) -> np.ndarray:
    """(N, D) float32 -> (N, D) integers, or (N, D / 8) bytes of one bit per component.

    Integers have 256 levels between the least and the greatest value that each component has in
    these vectors, so those of different calls cannot be compared. Bits say which components are
    above 0; "binary" and "int8" are signed.

    Raises:
        UserError: integers for a single vector, whose components have no range.
    """
    if precision == "float32":
        return vectors
    if precision == "ubinary":
        return np.packbits(vectors > 0, axis=-1)
    if precision == "binary":
        return (np.packbits(vectors > 0, axis=-1) - 128).astype(np.int8)
    if not len(vectors):
        return vectors.astype(precision)
    if len(vectors) == 1:
        raise UserError(
            f"precision {precision!r} needs several vectors, whose least and greatest values give "
            "the range; encode all texts in one call, or take 'binary'"
        )
    if len(vectors) < STEADY_FROM:
        warn(f"the ranges of {precision} come from {len(vectors)} vectors only")
    least, greatest = vectors.min(axis=0), vectors.max(axis=0)
    steps = (greatest - least) / 255
    steps[steps == 0] = 1
    levels = np.clip(np.floor((vectors - least) / steps), 0, 255)
    return (levels if precision == "uint8" else levels - 128).astype(precision)


def check_precision(precision: str) -> None:
    """Raises UserError for one that is not known."""
    if precision not in get_args(Precision):
        raise UserError(
            f"precision {precision!r} is not known; take one of {', '.join(get_args(Precision))}"
        )
