"""The whole training objective of one batch, from the vectors of its texts.

Letters: E exits, N texts, R rows of this process, K negatives, n rows of the global batch, H hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ml_embed.data.batch import ContrastiveBatch
from ml_embed.distributed import gather_rows
from ml_embed.false_negatives import LeftOut, leave_out
from ml_embed.losses import MatryoshkaSpec, distillation_loss, hard_loss, in_batch_loss


@dataclass(frozen=True)
class LossTerms:
    """Shares of this process: their mean over processes is the value for the global batch. Scalars, float32."""

    hard: Tensor
    """mean over exits"""
    in_batch: Tensor
    """mean over exits; 0 for tasks without it"""
    distillation: Tensor
    """mean over exits, before kd_weight; 0 without a teacher"""
    total: Tensor
    """hard + in_batch + kd_weight * distillation"""
    left_out: LeftOut
    """which logits the contrastive losses did without; its counts are sums, not means, over processes"""


def batch_objective(
    vectors: Tensor,
    batch: ContrastiveBatch,
    spec: MatryoshkaSpec,
    teacher_vectors: Tensor | None = None,
    kd_weight: float = 1.0,
    false_negative_margin: float | None = None,
) -> LossTerms:
    """Total = mean over exits of (hard + in-batch) + kd_weight * mean over exits of distillation (DESIGN 3).

    Args:
        vectors: (E, N, H) of the batch's distinct texts.
        batch: which text plays which part.
        spec: nested dims, their weights, temperature.
        teacher_vectors: (E', N, H') or None; exits are paired from the deepest.
        kd_weight: weight of the distillation term.
        false_negative_margin: see `leave_out`; None = off.
    """
    hard, in_batch, left_out = _contrastive(vectors, batch, spec, false_negative_margin)
    distillation = vectors.new_zeros(())
    if teacher_vectors is not None:
        distillation = _distillation(vectors, teacher_vectors, batch)
    return LossTerms(hard, in_batch, distillation, hard + in_batch + kd_weight * distillation, left_out)


def _contrastive(
    vectors: Tensor, batch: ContrastiveBatch, spec: MatryoshkaSpec, margin: float | None
) -> tuple[Tensor, Tensor, LeftOut]:
    """Hard and in-batch loss, each the mean over exits, and what they left out."""
    exits = len(vectors)
    query = vectors.index_select(1, batch.query)  # (E, R, H)
    passage = vectors.index_select(1, batch.passage)  # (E, R, H)
    negatives = vectors.index_select(1, batch.negatives.flatten()).unflatten(1, batch.negatives.shape)  # (E, R, K, H)
    candidates = torch.cat([passage.unsqueeze(2), negatives], dim=2)  # (E, R, 1 + K, H)
    passages = None
    if batch.task == "retrieval":
        # One collective for all exits. Fillers are dropped, so that the columns are the global batch in its own order.
        passages = gather_rows(passage.transpose(0, 1)).index_select(0, batch.gathered_rows)  # (n, E, H)
    deepest_passages = None if passages is None else passages[:, -1]
    left_out = leave_out(query[-1], candidates[-1], deepest_passages, batch, margin)
    hard = sum(
        hard_loss(query[e], candidates[e], left_out.candidates, batch.sample_weights, spec) for e in range(exits)
    )
    if passages is None:
        return hard / exits, vectors.new_zeros(()), left_out
    in_batch = sum(
        in_batch_loss(query[e], passages[:, e], batch.target, left_out.passages, batch.sample_weights, spec)
        for e in range(exits)
    )
    return hard / exits, in_batch / exits, left_out


def _distillation(vectors: Tensor, teacher_vectors: Tensor, batch: ContrastiveBatch) -> Tensor:
    """Sum over query, passage and negatives of the mean squared error to the teacher, mean over the paired exits."""
    pairs = min(len(vectors), len(teacher_vectors))
    texts = torch.cat([batch.query, batch.passage, batch.negatives.flatten()])
    weights = torch.cat([batch.sample_weights, batch.sample_weights, batch.negative_weights.flatten()])
    student = vectors[-pairs:].index_select(1, texts).flatten(0, 1)
    teacher = teacher_vectors[-pairs:].index_select(1, texts).flatten(0, 1)
    return distillation_loss(student, teacher, weights.repeat(pairs) / pairs)
