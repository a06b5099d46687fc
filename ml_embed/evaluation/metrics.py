"""Metrics: where a query's relevant document ranks among its candidates; correlation of ranks.

Pure functions of tensors, used by validation during training and by the evaluation of finished
models.

Letters: Q queries, N documents, C candidates of a query, D vector length, P pairs.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

CUTOFF = 10
METRICS = ("recall@1", f"mrr@{CUTOFF}", f"ndcg@{CUTOFF}")
TIE = 1e-6
"""Cosines closer than this are a tie. Matrix products of different shapes give the same cosine up
to about 2e-7 apart (float32), and a model that maps all texts to one vector must not win by that.
"""
QUERIES_AT_ONCE = 1024


def ranks_of_scores(scores: Tensor | np.ndarray, positive: Tensor | np.ndarray) -> Tensor:
    """The 1-based rank of each query's positive.

    Documents that tie with the positive (within 1e-6) stand half before it: the rank is the
    expected one under a random order of ties. A score that is NaN stands before the positive, and a
    positive that is NaN stands last.

    Args:
        scores: (Q, C), higher is better; -inf where a query has fewer than C candidates.
        positive: (Q,) column of the relevant document.
    Returns:
        (Q,) float64.
    """
    scores, positive = torch.as_tensor(scores), torch.as_tensor(positive)
    own = scores.gather(1, positive.unsqueeze(1).long())  # (Q, 1)
    competes = scores != -torch.inf
    better, tied = _compare(scores, own, competes)
    return _rank(better, tied, competes.sum(1))


def ranks_of_positives(
    queries: Tensor,
    documents: Tensor,
    positive: Tensor,
    at_once: int = 16384,
    excluded: Tensor | None = None,
) -> Tensor:
    """`ranks_of_scores` of all queries over all documents, without ever holding (Q, N) scores.

    Args:
        queries: (Q, D), rows of unit length.
        documents: (N, D), rows of unit length, on the same device.
        positive: (Q,) row of each query's relevant document.
        at_once: documents scored at a time; it does not change the result.
        excluded: (P, 2) distinct pairs of query and document rows that do not compete, such as
            other right answers; never a query and its own positive. None is no such pair.
    Returns:
        (Q,) float64, on the CPU.
    """
    device = queries.device
    positive = positive.to(device).long()
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        queries, documents = queries.float(), documents.float()
        own = (queries * documents[positive]).sum(1, keepdim=True)  # (Q, 1)
        better = torch.zeros(len(queries), dtype=torch.int64, device=device)
        tied = better.clone()
        count = torch.full_like(better, len(documents))
        for rows in torch.arange(len(queries), device=device).split(QUERIES_AT_ONCE):
            for some in documents.split(at_once):
                more_better, more_tied = _compare(queries[rows] @ some.T, own[rows])
                better[rows] += more_better
                tied[rows] += more_tied
        for pairs in () if excluded is None else excluded.to(device).long().split(at_once):
            q, d = pairs.unbind(1)
            pair_better, pair_tied = _compare(
                (queries[q] * documents[d]).sum(1, keepdim=True), own[q]
            )
            better.index_add_(0, q, -pair_better)
            tied.index_add_(0, q, -pair_tied)
            count.index_add_(0, q, torch.full_like(q, -1))
        return _rank(better, tied, count).cpu()


def _compare(scores: Tensor, own: Tensor, competes: Tensor | bool = True) -> tuple[Tensor, Tensor]:
    """How many of (Q, C) scores are better than their row's (Q, 1) positive, and how many tie.

    "Not worse" and not "greater", so that NaN counts as better.
    """
    tied = (scores - own).abs() <= TIE
    return (~(scores < own) & ~tied & competes).sum(1), tied.sum(1)


def _rank(better: Tensor, tied: Tensor, count: Tensor) -> Tensor:
    """Ranks; the positive itself is among `tied`, or among `better` if it is NaN."""
    return (1 + better.double() + (tied - 1).clamp(min=0).double() / 2).minimum(count.double())


def metrics_of_ranks(ranks: Tensor | ArrayLike) -> dict[str, float]:
    """Means over queries with one relevant document each: recall@1, MRR@10, nDCG@10.

    Args:
        ranks: (Q,) 1-based rank of the relevant document; a fraction where it ties with others.
    Returns:
        Metric name -> 0..1; NaN for no queries.
    """
    values = values_of_ranks(ranks)
    return {name: float(own.mean()) if len(own) else float("nan") for name, own in values.items()}


def values_of_ranks(ranks: Tensor | ArrayLike) -> dict[str, np.ndarray]:
    """What each query counts in `metrics_of_ranks`: metric name -> (Q,) 0..1."""
    ranks = np.asarray(ranks, dtype=np.float64)
    found = ranks <= CUTOFF
    values = ((ranks <= 1).astype(float), found / ranks, found / np.log2(1 + ranks))
    return dict(zip(METRICS, values, strict=True))


def spearman(left: Tensor, right: Tensor) -> float:
    """Spearman's rank correlation of two (n,) lists, -1..1; equal values share their mean rank.

    NaN where one list is constant, or has fewer than two values.
    """
    ranks = torch.stack([_mean_ranks(left), _mean_ranks(right)])
    return float(torch.corrcoef(ranks)[0, 1]) if len(left) > 1 else float("nan")


def _mean_ranks(values: Tensor) -> Tensor:
    """(n,) float64 rank of each value, the mean one where values are equal."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)  # ascending
    last = count.cumsum(0).double()
    return (last - (count - 1).double() / 2)[place]


def chance_metrics(candidates: ArrayLike) -> dict[str, float]:
    """What a random order achieves on average.

    Args:
        candidates: (Q,) how many documents each query chooses among.
    """
    total = dict.fromkeys(METRICS, 0.0)
    sizes, counts = np.unique(np.asarray(candidates, dtype=np.int64), return_counts=True)
    for size, queries in zip(sizes, counts, strict=True):
        # All ranks are equally likely; those beyond the cut-off count as 0.
        first: Mapping[str, float] = metrics_of_ranks(np.arange(1, min(size, CUTOFF) + 1))
        for name in METRICS:
            total[name] += first[name] * min(size, CUTOFF) / size * queries
    return {name: float(value / counts.sum()) for name, value in total.items()}
