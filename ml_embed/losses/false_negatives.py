"""Masks of a batch's logits: documents that are, or may be, right answers and so are no negatives.

Two rules. By document: every document that the data pairs with the sample's query, wherever it
stands in the batch (`BatchBuilder` finds these). By margin, an option: any document that is nearer
to the query than the positive is, by more than the margin.

Letters: R rows of this process, K negatives, n passages of the global batch, H hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ml_embed.data.batch import ContrastiveBatch
from ml_embed.losses.nested import rows_at_once

ROUNDING = 1e-6
"""By how much equal cosines may differ in float32: a copy of the positive is not nearer than it."""


@dataclass(frozen=True)
class MaskedLogits:
    """Which logits the contrastive losses of this process's rows mask, and how many.

    The counts are of pairs of a query and a document: a pair counts once, not per exit and dim.
    Rows that only fill up, and negatives that a sample does not have, do not count.
    """

    candidates: Tensor
    """(R, 1 + K) bool: also true for negatives that a sample does not have"""
    passages: Tensor | None
    """(R, n) bool; None where nothing is masked, or there is no in-batch loss"""
    by_document: Tensor
    """scalar, int64"""
    by_margin: Tensor
    """scalar, int64: pairs that are not masked by document already"""


@torch.no_grad()
def mask_false_negatives(
    query: Tensor,
    candidates: Tensor,
    passages: Tensor | None,
    batch: ContrastiveBatch,
    margin: float | None,
) -> MaskedLogits:
    """Masks for all exits and dims, decided once, by the whole vectors of the deepest exit.

    The deepest exit's whole vectors are the best that the model knows of two texts. A cut vector
    takes many documents for near that are not. If each cut decided for itself, it would mask its
    own mistakes, which are what it should learn from.

    Args:
        query: (R, H), of the deepest exit.
        candidates: (R, 1 + K, H), of the deepest exit, the positive first.
        passages: (n, H) of the global batch, of the deepest exit; None without an in-batch loss.
        batch: holds the masks by document.
        margin: also mask documents whose cosine is above the positive's by more than this;
            None = off.
    """
    real, present = batch.sample_weights > 0, batch.negative_weights > 0
    candidate_mask = batch.excluded_candidates
    passage_mask = batch.excluded_passages if passages is not None else None
    by_document = (candidate_mask[:, 1:] & present).sum()
    if passage_mask is not None:
        by_document = by_document + passage_mask.sum()
    if margin is None:
        return MaskedLogits(
            candidate_mask, passage_mask, by_document, torch.zeros_like(by_document)
        )
    query = normalize(query, dim=-1)
    scores = (query.unsqueeze(1) * normalize(candidates, dim=-1)).sum(-1)  # (R, 1 + K)
    limit = scores[:, :1] + margin + ROUNDING  # (R, 1)
    near = (scores > limit) & ~candidate_mask
    near[:, 1:] &= present
    by_margin = near.sum()
    candidate_mask = candidate_mask | near
    if passages is not None:
        near = _above(query, normalize(passages, dim=-1), limit) & real.unsqueeze(1)  # (R, n)
        near[torch.arange(len(near), device=near.device), batch.target] = False
        if passage_mask is not None:
            near &= ~passage_mask
        by_margin = by_margin + near.sum()
        passage_mask = near if passage_mask is None else passage_mask | near
    return MaskedLogits(candidate_mask, passage_mask, by_document, by_margin)


def _above(query: Tensor, passages: Tensor, limit: Tensor) -> Tensor:
    """(R, n) bool: which cosines are above their row's limit (R, 1).

    In as many rows at a time as the in-batch loss.
    """
    rows = rows_at_once(len(passages), passages.device)
    blocks = [
        own @ passages.T > allowed
        for own, allowed in zip(query.split(rows), limit.split(rows), strict=True)
    ]
    return torch.cat(blocks)
