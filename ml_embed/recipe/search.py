"""Exact nearest-neighbour search, block by block: no (queries, documents) matrix ever exists.

Letters: Q queries of a block, N documents, K neighbours, D vector length, P pairs.
"""

import numpy as np
import torch
from torch import Tensor

DOCUMENT_BLOCK = 65536
"""Documents scored at a time: with 1,024 queries in float32, 256 MB of scores."""


def nearest(
    queries: Tensor,
    documents: np.ndarray,
    count: int,
    excluded: Tensor,
    block_size: int = DOCUMENT_BLOCK,
) -> tuple[Tensor, Tensor]:
    """The best documents of each query, best first, by dot product.

    Args:
        queries: (Q, D) float32, on the device to compute on.
        documents: (N, D) float32; may be a memory map, which is read block by block.
        count: K.
        excluded: (P, 2) pairs of query and document rows that are not found.
        block_size: documents scored at a time; only the order of equal scores depends on it.
    Returns:
        scores (Q, min(K, N)) float32, -inf where there are fewer documents, and their rows
        (Q, min(K, N)) int64.
    """
    device, count = queries.device, min(count, len(documents))
    best = torch.full((len(queries), count), -torch.inf, device=device)
    rows = torch.zeros((len(queries), count), dtype=torch.int64, device=device)
    excluded = excluded.to(device)
    for start in range(0, len(documents), block_size):
        block = torch.from_numpy(np.array(documents[start : start + block_size])).to(device)
        scores = queries @ block.T
        here = excluded[(excluded[:, 1] >= start) & (excluded[:, 1] < start + len(block))]
        scores[here[:, 0], here[:, 1] - start] = -torch.inf
        top, places = scores.topk(min(count, len(block)), dim=1)
        both, order = torch.cat([best, top], dim=1).sort(dim=1, descending=True, stable=True)
        best = both[:, :count]
        rows = torch.cat([rows, places + start], dim=1).gather(1, order[:, :count])
    return best, rows
