"""The whole training objective of one batch, from the vectors of its texts.

Letters: E exits, N texts, R rows of this process, K negatives, n rows of the global batch, H hidden
    size. A teacher's
are E' and H'.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ml_embed.config import DistillationLoss
from ml_embed.data.batch import ContrastiveBatch, PartVectors
from ml_embed.distributed.collectives import gather_rows
from ml_embed.losses.false_negatives import LeftOut, leave_out
from ml_embed.losses.nested import (
    MatryoshkaSpec,
    candidate_similarity_loss,
    distillation_loss,
    hard_loss,
    in_batch_loss,
    in_batch_similarity_loss,
)


@dataclass(frozen=True)
class LossTerms:
    """Shares of this process: their mean over processes is the value for the global batch. Scalars,
    float32."""

    hard: Tensor
    """mean over exits"""
    in_batch: Tensor
    """mean over exits; 0 for tasks without it"""
    distillation: Tensor
    """mean over exits, before kd_weight; 0 without a teacher"""
    total: Tensor
    """hard + in_batch + kd_weight * distillation"""
    left_out: LeftOut
    """which logits the contrastive losses did without; its counts are sums, not means, over
    processes"""


def batch_objective(
    vectors: Tensor,
    batch: ContrastiveBatch,
    spec: MatryoshkaSpec,
    teacher: PartVectors | None = None,
    kd_loss: DistillationLoss = "vectors",
    kd_weight: float = 1.0,
    false_negative_margin: float | None = None,
) -> LossTerms:
    """Total = mean over exits of (hard + in-batch) + kd_weight * mean over exits of distillation
    (DESIGN 3).

    Args:
        vectors: (E, N, H) of the batch's distinct texts.
        batch: which text plays which part.
        spec: nested dims, their weights, temperature.
        teacher: a teacher's vectors, (E', ..., H'), of any float type, or None.
        kd_loss: what is learned from it: `_vector_distillation` or `_similarity_distillation`.
        kd_weight: weight of the distillation term.
        false_negative_margin: see `leave_out`; None = off.
    """
    student = PartVectors.of_texts(vectors, batch)
    # One collective for all exits, and only where some loss looks at other rows' passages.
    similarities = teacher is not None and kd_loss == "similarity"
    passages = (
        _of_all(student.passage, batch) if batch.task == "retrieval" or similarities else None
    )  # (n, E, H)
    candidates = student.candidates()  # (E, R, 1 + K, H)
    hard, in_batch, left_out = _contrastive(
        student.query, candidates, passages, batch, spec, false_negative_margin
    )
    if teacher is None:
        distillation = vectors.new_zeros(())
    elif kd_loss == "similarity":
        assert passages is not None
        distillation = _similarity_distillation(
            student.query, candidates, passages, teacher, batch, spec
        )
    else:
        distillation = _vector_distillation(student, teacher, batch)
    return LossTerms(
        hard, in_batch, distillation, hard + in_batch + kd_weight * distillation, left_out
    )


def _of_all(passage: Tensor, batch: ContrastiveBatch) -> Tensor:
    """(E, R, H) of each process -> (n, E, H): the rows of the global batch in its own order,
    without fillers."""
    return gather_rows(passage.transpose(0, 1)).index_select(0, batch.gathered_rows)


def _contrastive(
    query: Tensor,
    candidates: Tensor,
    passages: Tensor | None,
    batch: ContrastiveBatch,
    spec: MatryoshkaSpec,
    margin: float | None,
) -> tuple[Tensor, Tensor, LeftOut]:
    """Hard and in-batch loss, each the mean over exits, and what they left out."""
    exits = len(query)
    passages = passages if batch.task == "retrieval" else None
    deepest_passages = None if passages is None else passages[:, -1]
    left_out = leave_out(query[-1], candidates[-1], deepest_passages, batch, margin)
    nothing = query.new_zeros(())
    hard = sum(
        (
            hard_loss(query[e], candidates[e], left_out.candidates, batch.sample_weights, spec)
            for e in range(exits)
        ),
        start=nothing,
    )
    if passages is None:
        return hard / exits, nothing, left_out
    in_batch = sum(
        (
            in_batch_loss(
                query[e],
                passages[:, e],
                batch.target,
                left_out.passages,
                batch.sample_weights,
                spec,
            )
            for e in range(exits)
        ),
        start=nothing,
    )
    return hard / exits, in_batch / exits, left_out


def _vector_distillation(
    student: PartVectors, teacher: PartVectors, batch: ContrastiveBatch
) -> Tensor:
    """Sum over query, passage and negatives of the mean squared error to the teacher's leading
    components.

    Mean over the exits, paired from the deepest: student exits beyond the teacher's have no part in
    it.
    """
    pairs = min(len(student.query), len(teacher.query))
    parts = (
        (student.query, teacher.query, batch.sample_weights),
        (student.passage, teacher.passage, batch.sample_weights),
        (
            student.negatives.flatten(1, 2),
            teacher.negatives.flatten(1, 2),
            batch.negative_weights.flatten(),
        ),
    )
    total = student.query.new_zeros(())
    for own, wanted, weights in parts:
        of_pairs = weights.repeat(pairs) / pairs
        total = total + distillation_loss(
            own[-pairs:].flatten(0, 1), wanted[-pairs:].flatten(0, 1), of_pairs
        )
    return total


def _similarity_distillation(
    query: Tensor,
    candidates: Tensor,
    passages: Tensor,
    teacher: PartVectors,
    batch: ContrastiveBatch,
    spec: MatryoshkaSpec,
) -> Tensor:
    """Squared differences of cosines, so that a teacher's width does not matter.

    With s the student's cosines, t the teacher's, of its deepest exit and whole vectors, for a
    sample i with its positive and k_i negatives as candidates c, and the n positives p of the
    global batch:

        1/n sum_i [ 1/(1 + k_i) sum_c (s(q_i, c) - t(q_i, c))^2  +  1/n sum_j (s(q_i, p_j) - t(q_i,
        p_j))^2 ]

    With nested dims, (s - t)^2 is the mean of the dims' weighted by c_n. The mean over all exits of
    the student: each learns from the teacher's best. What the contrastive losses leave out counts
        here: a teacher knows how near it is.
    """
    teacher_query = normalize(teacher.query[-1].float(), dim=-1)  # (R, H')
    own = normalize(teacher.candidates()[-1].float(), dim=-1)  # (R, 1 + K, H')
    wanted = (own @ teacher_query.unsqueeze(2)).squeeze(2)  # (R, 1 + K)
    teacher_passages = _of_all(own[None, :, 0], batch)[:, 0]  # (n, H')

    negatives_present = (batch.negative_weights > 0).float()
    present = torch.cat([torch.ones_like(wanted[:, :1]), negatives_present], dim=1)  # (R, 1 + K)
    entry_weights = (
        batch.sample_weights.unsqueeze(1) * present / present.sum(1, keepdim=True)
    )  # (R, 1 + K)
    total = query.new_zeros(())
    for e in range(len(query)):
        total = total + candidate_similarity_loss(
            query[e], candidates[e], wanted, entry_weights, spec
        )
        total = total + in_batch_similarity_loss(
            query[e], passages[:, e], teacher_query, teacher_passages, batch.sample_weights, spec
        )
    return total / len(query)
