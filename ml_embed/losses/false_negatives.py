"""Which logits of a batch are left out, because what stands there is or may be a right answer.

Two rules: the sample's own positive document, standing somewhere else (DESIGN 4.9; `BatchBuilder`
    finds these); and, as
an option, whatever lies nearer to the query than the positive does, by more than a margin.

Letters: R rows of this process, K negatives, n passages of the global batch, H hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ml_embed.data.batch import ContrastiveBatch
from ml_embed.losses.nested import LOGITS_AT_ONCE

ROUNDING = 1e-6
"""By how much equal cosines may differ in float32: a copy of the positive is not nearer than the
positive."""


@dataclass(frozen=True)
class LeftOut:
    """The logits that a share's losses do without, and how many there are. A query and a document
    count once, not for each exit and dim; fillers and negatives that a sample does not have do not
    count."""

    candidates: Tensor
    """(R, 1 + K) bool: fillers too"""
    passages: Tensor | None
    """(R, n) bool; None where there is none, or no in-batch loss"""
    by_document: Tensor
    """scalar, int64"""
    by_margin: Tensor
    """scalar, int64: those that are not left out by document already"""


@torch.no_grad()
def leave_out(
    query: Tensor,
    candidates: Tensor,
    passages: Tensor | None,
    batch: ContrastiveBatch,
    margin: float | None,
) -> LeftOut:
    """One decision for all losses, exits and dims, by the whole vectors of the deepest exit.

    Those are the best that the model knows of two texts. A cut of few components takes many
    documents for near that are not; if each cut decided for itself, it would leave out its own
    mistakes, which are what it should learn from.

    Args:
        query: (R, H), candidates: (R, 1 + K, H), the positive first, both of the deepest exit.
        passages: (n, H) of the global batch, of the deepest exit; None where there is no in-batch
            loss.
        batch: what is left out by document.
        margin: a document is left out too if its cosine is above the positive's by more than this;
            None = none is.
    """
    real, present = batch.sample_weights > 0, batch.negative_weights > 0
    of_candidates = batch.excluded_candidates
    of_passages = batch.excluded_passages if passages is not None else None
    by_document = (of_candidates[:, 1:] & present).sum()
    if of_passages is not None:
        by_document = by_document + of_passages.sum()
    by_margin = torch.zeros_like(by_document)
    if margin is None:
        return LeftOut(of_candidates, of_passages, by_document, by_margin)
    query = normalize(query, dim=-1)
    scores = (query.unsqueeze(1) * normalize(candidates, dim=-1)).sum(-1)  # (R, 1 + K)
    limit = scores[:, :1] + margin + ROUNDING  # (R, 1)
    near = (scores > limit) & ~of_candidates
    near[:, 1:] &= present
    by_margin = near.sum()
    of_candidates = of_candidates | near
    if passages is not None:
        near = _above(query, normalize(passages, dim=-1), limit) & real.unsqueeze(1)  # (R, n)
        near[torch.arange(len(near), device=near.device), batch.target] = False
        if of_passages is not None:
            near &= ~of_passages
        by_margin = by_margin + near.sum()
        of_passages = near if of_passages is None else of_passages | near
    return LeftOut(of_candidates, of_passages, by_document, by_margin)


def _above(query: Tensor, passages: Tensor, limit: Tensor) -> Tensor:
    """(R, n) bool: which cosines are above a row's limit; so many at a time as the in-batch loss
    holds."""
    rows = max(1, LOGITS_AT_ONCE // len(passages))
    blocks = [
        own @ passages.T > allowed
        for own, allowed in zip(query.split(rows), limit.split(rows), strict=True)
    ]
    return torch.cat(blocks)
