"""Quality of vectors in fewer bits: at equal bytes, more components or more bits of each?

Letters: N texts, D vector length.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ml_embed.evaluation.data import TestSet
from ml_embed.evaluation.metrics import metrics_of_ranks

BITS = {"float32": 32, "int8": 8, "binary": 1}
"""Precision of `Embedder.encode` -> bits of a component; uint8 and ubinary hold the same."""
LEVELS = 256


def stored(vectors: Tensor, precision: str) -> Tensor:
    """(N, D) unit vectors -> (N, D): what is left of them in a precision, again of unit length.

    Bits say which components are above 0, so their cosines order vectors as Hamming distances do.
    Integers have 256 levels between the least and the greatest value of each component, as in
    `quantize`; a level stands for its middle.
    """
    if precision == "binary":
        vectors = torch.where(vectors > 0, 1.0, -1.0)
    elif precision == "int8":
        least, greatest = vectors.aminmax(dim=0)
        step = ((greatest - least) / (LEVELS - 1)).clamp(min=1e-12)
        vectors = least + (((vectors - least) / step).floor() + 0.5) * step
    return normalize(vectors, dim=-1)


def precision_rows(
    unit: Tensor, sizes: Mapping[str, Any], test_sets: Iterable[TestSet]
) -> list[dict[str, Any]]:
    """Metrics of one cut's vectors in every precision, on every test set.

    Args:
        unit: (N, D) unit vectors of all texts.
        sizes: of the cut, which stand in every row.
    Returns:
        rows with precision, bytes_per_vector, dataset, split, the metrics, and under "rescored"
        the metrics of queries in float32 against stored documents, which is what rescoring of
        enough candidates gives.
    """
    dim, rows = unit.shape[1], []
    for precision, bits in BITS.items():
        if dim * bits % 8:
            continue
        left = stored(unit, precision)
        for test_set in test_sets:
            named = {"dataset": test_set.dataset, "split": test_set.split}
            kept = {"precision": precision, "bytes_per_vector": dim * bits // 8}
            found = metrics_of_ranks(test_set.ranks(left))
            whole = precision == "float32"  # nothing is lost that rescoring could bring back
            rescored = found if whole else metrics_of_ranks(test_set.ranks(left, unit))
            rows.append({**sizes, **kept, **named, **found, "rescored": rescored})
    return rows
