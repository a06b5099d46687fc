"""Masks of a batch's logits: documents that are, or may be, right answers and so are no negatives.

Two rules. By document: every document that the data pairs with the sample's query, wherever it
stands in the batch (`BatchBuilder` finds these). By margin, an option: any document that is nearer
to the query than the positive is, by more than the margin.

The margin has an edge, in which a document is masked in part: cosines differ in their last digits
with the number of processes, and a threshold would turn that into another loss.

Letters: R rows of this process, K negatives, n documents of the in-batch loss, H hidden size.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ml_embed.data.batch import ContrastiveBatch
from ml_embed.losses.nested import rows_at_once

EDGE, NARROWEST_EDGE = 0.25, 0.005
"""Width of the edge: this share of the margin, or of a cosine where that is more. A guess, in which
an error of a cosine moves the loss up to about eight times as much as it does everywhere (by 1 /
temperature): with float32's 1e-7 still less than the 1e-5 that processes may differ by."""
ROUNDING = 1e-6
"""By how much equal cosines may differ in float32: a copy of the positive is not nearer than it."""


@dataclass(frozen=True)
class MaskedLogits:
    """Which logits the contrastive losses of this process's rows mask, and how many.

    The counts are of pairs of a sample's query and a document: a pair counts once, not per exit
    and dim. Rows that only fill up, and negatives that a sample does not have, do not count.
    """

    candidates: Tensor
    """(R, 1 + K), for `masked_logits`: bool, or float with a margin; also leaves out negatives that
    a sample does not have"""
    passages: Tensor | None
    """(R, n), likewise; None where nothing is masked, or there is no in-batch loss"""
    pairs: Tensor | None
    """(R, 2, G), likewise, of n documents and the global batch's queries: with what a sample's
    query, and with what its passage, is not compared; None where all pairs are not compared"""
    by_document: Tensor
    """scalar, int64"""
    by_margin: Tensor
    """scalar, float64: pairs that are not masked by document already; those at the edge in part"""


@torch.no_grad()
def mask_false_negatives(
    query: Tensor,
    candidates: Tensor,
    passages: Tensor | None,
    batch: ContrastiveBatch,
    margin: float | None,
    temperature: float,
    queries: Tensor | None = None,
) -> MaskedLogits:
    """Masks for all exits and dims, decided once, by the whole vectors of the deepest exit.

    The deepest exit's whole vectors are the best that the model knows of two texts. A cut vector
    takes many documents for near that are not. If each cut decided for itself, it would mask its
    own mistakes, which are what it should learn from.

    Args:
        query: (R, H), of the deepest exit.
        candidates: (R, 1 + K, H), of the deepest exit, the positive first.
        passages: (n, H) of the in-batch loss, of the deepest exit; None without an in-batch loss.
        batch: holds the masks by document.
        margin: also mask documents whose cosine is above the positive's by more than this;
            None = off.
        temperature: of the losses.
        queries: (rows of the global batch, H) of the deepest exit, where they are compared too.
    """
    real, present = batch.sample_weights > 0, batch.negative_weights > 0
    candidate_mask = batch.excluded_candidates
    passage_mask = batch.excluded_passages if passages is not None else None
    by_document = (candidate_mask[:, 1:] & present).sum()
    if passage_mask is not None:
        by_document = by_document + passage_mask.sum()
    if margin is None:
        nothing = torch.zeros_like(by_document, dtype=torch.float64)
        pairs = _of_pairs(passage_mask, batch)
        return MaskedLogits(candidate_mask, passage_mask, pairs, by_document, nothing)
    query = normalize(query, dim=-1)
    candidates = normalize(candidates, dim=-1)
    scores = (query.unsqueeze(1) * candidates).sum(-1)  # (R, 1 + K)
    edge = _Edge(scores[:, :1] + margin + ROUNDING, margin, temperature)
    added = edge.added(scores).masked_fill(candidate_mask, 0)
    by_margin = _masked(added[:, 1:].masked_fill(~present, 0))
    candidate_mask = added.masked_fill(candidate_mask, -torch.inf)
    pairs = None
    if passages is not None:
        passages = normalize(passages, dim=-1)
        added = edge.added_to(query, passages)  # (R, n)
        added[~real] = 0
        added[torch.arange(len(added), device=added.device), batch.target] = 0
        if passage_mask is not None:
            added.masked_fill_(passage_mask, 0)
        by_margin = by_margin + _masked(added)
        passage_mask = (
            added if passage_mask is None else added.masked_fill(passage_mask, -torch.inf)
        )
        if queries is not None:
            queries = normalize(queries, dim=-1)
            of_passage = edge.added_to(candidates[:, 0], torch.cat([passages, queries]))
            pairs = _of_pairs(passage_mask, batch, (edge.added_to(query, queries), of_passage))
    return MaskedLogits(candidate_mask, passage_mask, pairs, by_document, by_margin)


def _of_pairs(
    passage_mask: Tensor | None, batch: ContrastiveBatch, near: tuple[Tensor, Tensor] | None = None
) -> Tensor | None:
    """`MaskedLogits.pairs`; with a margin, `near` is what it adds to the logits of queries with
    queries, and of passages with documents and queries.
    """
    if batch.uncompared is None:
        return None
    of_documents, of_queries = batch.uncompared.tensor_split([len(batch.global_documents)], dim=1)
    of_passage = batch.uncompared
    if near is not None:
        of_queries = near[0].masked_fill(of_queries, -torch.inf)
        of_passage = near[1].masked_fill(of_passage, -torch.inf)
    if passage_mask is None:
        passage_mask = torch.zeros_like(of_documents)
    return torch.stack([torch.cat([passage_mask, of_queries], dim=1), of_passage], dim=1)


def each_document_once(
    batch: ContrastiveBatch, masked: MaskedLogits, passages: int
) -> tuple[Tensor, Tensor]:
    """Masks for one softmax over a sample's candidates and the batch's passages.

    They leave out what the contrastive losses leave out, and a document's second place.

    Args:
        passages: n, or 0 where there are none in the softmax.
    Returns:
        (R, 1 + K) and (R, passages), for `masked_logits`.
    """
    own = torch.cat([batch.passage_documents.unsqueeze(1), batch.negative_documents], dim=1)
    of_batch = batch.global_documents[:passages]  # (n,)
    again = (own.unsqueeze(2) == own.unsqueeze(1)).tril(-1).any(2) & (own >= 0)
    among_own = (own.unsqueeze(2) == of_batch).any(1)  # (R, n)
    earlier = (of_batch.unsqueeze(1) == of_batch).tril(-1).any(1)  # (n,)
    return (
        _also(masked.candidates, again),
        _also(masked.passages if passages else None, among_own | earlier),
    )


def _also(mask: Tensor | None, more: Tensor) -> Tensor:
    """A mask as `masked_logits` takes it, that leaves out `more` too."""
    if mask is None:
        return more
    if mask.dtype == torch.bool:
        return mask | more
    return mask.masked_fill(more, -torch.inf)


def _masked(added: Tensor) -> Tensor:
    """How many logits are masked; those at the edge by how much of their exponential is."""
    return -torch.expm1(added).sum(dtype=torch.float64)


@dataclass(frozen=True)
class _Edge:
    """What is added to logits from a limit of their cosines on."""

    limit: Tensor
    """(R, 1): cosines up to here count"""
    margin: float
    temperature: float

    def added(self, scores: Tensor) -> Tensor:
        """0 up to the limit, falling to -inf over the edge's width."""
        width = max(EDGE * self.margin, NARROWEST_EDGE)
        place = ((scores - self.limit) / width).clamp(0, 1)
        # As steep as the logit at the limit is high above the positive's: more would change the
        # loss faster at the beginning of the edge, less at its end.
        return -(1 + self.margin / self.temperature) * place / (1 - place)

    def added_to(self, own: Tensor, others: Tensor) -> Tensor:
        """(R, G): `added` for unit vectors (R, H) with all others (G, H), in as many rows at a time
        as the in-batch loss."""
        rows = rows_at_once(len(others), others.device)
        blocks = [
            replace(self, limit=self.limit[start : start + rows]).added(
                own[start : start + rows] @ others.T
            )
            for start in range(0, len(own), rows)
        ]
        return torch.cat(blocks)
