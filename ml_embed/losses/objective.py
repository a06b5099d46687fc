"""The whole training objective of one batch, from the vectors of its texts.

Letters: E exits, N texts, R rows of this process, K negatives, n rows of the global batch, n' the
documents of its in-batch losses, H hidden size; E' and H' are a teacher's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ml_embed.config import SCORE_LOSSES, DistillationLoss
from ml_embed.data.batch import ContrastiveBatch, PartVectors
from ml_embed.distributed.collectives import gather_rows
from ml_embed.losses.false_negatives import (
    MaskedLogits,
    each_document_once,
    mask_false_negatives,
)
from ml_embed.losses.nested import (
    MatryoshkaSpec,
    SampleLoss,
    all_pairs_loss,
    candidate_similarity_loss,
    cosent_loss,
    distillation_loss,
    exit_shares,
    hard_loss,
    in_batch_loss,
    in_batch_similarity_loss,
    margin_loss,
    pair_cosines,
    score_divergence_loss,
    self_distillation_loss,
)


@dataclass(frozen=True)
class LossTerms:
    """The losses of this process's rows, float32 scalars.

    Each is scaled so that its mean over processes is the loss of the global batch.
    """

    hard: Tensor
    """mean over exits"""
    in_batch: Tensor
    """mean over exits; 0 for tasks without it"""
    similarity: Tensor
    """mean over exits; 0 for tasks without it"""
    distillation: Tensor
    """mean over exits, before kd_weight; 0 without a teacher"""
    self_distillation: Tensor
    """mean over exits, before its weight; 0 without one"""
    of_samples: Tensor | None
    """(2, R) each row's hard and in-batch loss, the mean over exits, without gradients; None where
    the data says no languages"""
    total: Tensor
    """hard + in_batch + similarity, and the distillations times their weights"""
    masked: MaskedLogits
    """of the contrastive losses; its counts add up over processes"""


@dataclass(frozen=True)
class _Student:
    """The model's vectors of a batch, as its losses need them."""

    parts: PartVectors
    candidates: Tensor
    """(E, R, 1 + K, H)"""
    passages: Tensor | None
    """(E, n', H), the documents of the in-batch losses; None where no loss looks at other rows'"""
    queries: Tensor | None
    """(E, n, H), of the global batch; None where no loss looks at other rows'"""

    @property
    def nothing(self) -> Tensor:
        """A loss of 0."""
        return self.parts.query.new_zeros(())

    @property
    def no_loss(self) -> SampleLoss:
        """A loss of 0 for all samples."""
        return SampleLoss(self.nothing, self.parts.query.new_zeros(self.parts.query.shape[:2]))


@dataclass(frozen=True)
class Objective:
    """Mean over exits of (hard + in-batch), or of similarity, and of weighted distillations."""

    spec: MatryoshkaSpec
    kd_loss: DistillationLoss = "vectors"
    """what is learned from a teacher: `_vector_distillation` or `_similarity_distillation` of its
    vectors, or "kl" or "margin_mse" of its stored scores (`_score_distillation`)"""
    kd_weight: float = 1.0
    self_distillation: float = 0.0
    """weight of what exits and dims learn from the deepest exit's whole vectors; 0 = off"""
    false_negative_margin: float | None = None
    """see `mask_false_negatives`; None = off"""

    def __call__(
        self, vectors: Tensor, batch: ContrastiveBatch, teacher: PartVectors | None = None
    ) -> LossTerms:
        """The loss terms of a batch. A collective.

        Args:
            vectors: (E, N, H) of the batch's distinct texts.
            batch: which text plays which part.
            teacher: a teacher's vectors, (E', ..., H'), of any float type; None without one.
        """
        student = self._student(vectors, batch, teacher)
        masked = self._mask(student, batch)
        hard, in_batch = self._hard(student, batch, masked), self._in_batch(student, batch, masked)
        similarity = self._similarity(student, batch)
        if self.kd_loss in SCORE_LOSSES and self.kd_weight:
            distillation = self._score_distillation(student, batch)
        elif teacher is None:
            distillation = student.nothing
        elif self.kd_loss == "similarity":
            distillation = _similarity_distillation(student, teacher, batch, self.spec)
        else:
            distillation = _vector_distillation(student.parts, teacher, batch, self.spec)
        own = self._from_itself(student, batch, masked)
        total = hard.total + in_batch.total + similarity + self.kd_weight * distillation
        total = total + self.self_distillation * own
        return LossTerms(
            hard.total,
            in_batch.total,
            similarity,
            distillation,
            own,
            self._of_samples(hard, in_batch) if batch.languages else None,
            total,
            masked,
        )

    def _student(
        self, vectors: Tensor, batch: ContrastiveBatch, teacher: PartVectors | None
    ) -> _Student:
        parts = PartVectors.of_texts(vectors, batch)
        # One collective for all exits, and only where some loss looks at other rows' documents.
        similarities = teacher is not None and self.kd_loss == "similarity"
        gathered = batch.task == "retrieval" or similarities
        candidates = parts.candidates()
        passages = _in_batch_documents(candidates, batch) if gathered else None
        queries = None if batch.uncompared is None else _of_all_processes(parts.query, batch)
        return _Student(parts, candidates, passages, queries)

    def _mask(self, student: _Student, batch: ContrastiveBatch) -> MaskedLogits:
        passages = student.passages if batch.task == "retrieval" else None
        return mask_false_negatives(
            student.parts.query[-1],
            student.candidates[-1],
            None if passages is None else passages[-1],
            batch,
            self.false_negative_margin,
            self.spec.temperature,
            None if student.queries is None else student.queries[-1],
        )

    def _of_samples(self, hard: SampleLoss, in_batch: SampleLoss) -> Tensor:
        of_exits = torch.stack([hard.of_samples, in_batch.of_samples]).detach()  # (2, E, R)
        return exit_shares(of_exits.shape[1], self.spec, of_exits.device) @ of_exits

    def _hard(self, student: _Student, batch: ContrastiveBatch, masked: MaskedLogits) -> SampleLoss:
        if batch.task == "similarity":
            return student.no_loss
        return hard_loss(
            student.parts.query,
            student.candidates,
            masked.candidates,
            batch.sample_weights,
            self.spec,
        )

    def _in_batch(
        self, student: _Student, batch: ContrastiveBatch, masked: MaskedLogits
    ) -> SampleLoss:
        if batch.task != "retrieval":
            return student.no_loss
        assert student.passages is not None
        query, rest = student.parts.query, (batch.sample_weights, self.spec)
        if student.queries is None:
            return in_batch_loss(query, student.passages, batch.target, masked.passages, *rest)
        assert masked.pairs is not None
        others = torch.cat([student.passages, student.queries], dim=1)  # (E, n' + n, H)
        passage = student.parts.passage
        return all_pairs_loss(query, passage, others, batch.target, masked.pairs, *rest)

    def _score_distillation(self, student: _Student, batch: ContrastiveBatch) -> Tensor:
        """Candidates that the contrastive losses mask take part: a teacher knows how near they are.

        0 for samples without negatives.
        """
        query, candidates, scores = student.parts.query, student.candidates, batch.teacher_scores
        if candidates.shape[2] == 1:
            return student.nothing
        assert scores is not None  # checked before the run
        if self.kd_loss == "margin_mse":
            return margin_loss(query, candidates, scores, batch.negative_weights, self.spec)
        absent = torch.nn.functional.pad(batch.negative_documents < 0, (1, 0))
        return score_divergence_loss(
            query, candidates, scores, absent, batch.sample_weights, self.spec
        )

    def _from_itself(
        self, student: _Student, batch: ContrastiveBatch, masked: MaskedLogits
    ) -> Tensor:
        if not self.self_distillation or batch.task == "similarity":
            return student.nothing
        passages = student.passages if batch.task == "retrieval" else None
        if passages is None:
            passages = student.candidates[:, 0, :0]  # (E, 0, H)
        return self_distillation_loss(
            student.parts.query,
            student.candidates,
            passages,
            each_document_once(batch, masked, passages.shape[1]),
            batch.sample_weights,
            self.spec,
        )

    def _similarity(self, student: _Student, batch: ContrastiveBatch) -> Tensor:
        """The same on every process: its gradients reach the pairs of all through the gather."""
        scores = batch.scores
        if scores is None:
            return student.nothing
        own = pair_cosines(student.parts.query, student.parts.passage, self.spec)  # (E, R, D)
        cosines = _of_all_processes(own, batch)  # (E, n, D)
        return cosent_loss(cosines.transpose(0, 1), scores, self.spec)


def _of_all_processes(rows: Tensor, batch: ContrastiveBatch) -> Tensor:
    """(E, R, H) of each process -> (E, n, H): the global batch's rows in its own order."""
    gathered = gather_rows(rows.transpose(0, 1)).index_select(0, batch.gathered_rows)
    return gathered.transpose(0, 1)


def _in_batch_documents(candidates: Tensor, batch: ContrastiveBatch) -> Tensor:
    """Own candidates (E, R, 1 + K, H) of each process -> (E, n', H): what in-batch losses look at.

    K is the same on all processes where others' negatives are among them.
    """
    if batch.in_batch_documents is None:
        return _of_all_processes(candidates[:, :, 0], batch)
    gathered = gather_rows(candidates.movedim(0, 2)).flatten(0, 1)  # (W R (1 + K), E, H)
    return gathered.index_select(0, batch.in_batch_documents).transpose(0, 1)


def _vector_distillation(
    student: PartVectors, teacher: PartVectors, batch: ContrastiveBatch, spec: MatryoshkaSpec
) -> Tensor:
    """Mean squared error to the teacher's leading components: query + passage + negatives.

    The mean over exits, paired from the deepest: the student's exits that the teacher has no
    counterpart for do not take part.
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
    shares = exit_shares(pairs, spec, total.device)
    for own, wanted, weights in parts:
        row_weights = torch.outer(shares, weights).flatten()
        total = total + distillation_loss(
            own[-pairs:].flatten(0, 1), wanted[-pairs:].flatten(0, 1), row_weights
        )
    return total


def _similarity_distillation(
    student: _Student, teacher: PartVectors, batch: ContrastiveBatch, spec: MatryoshkaSpec
) -> Tensor:
    """Squared differences of cosines, so that a teacher's width does not matter.

    With s the student's cosines, t those of the teacher's deepest exit and whole vectors, for a
    sample i with its positive and k_i negatives as candidates c, and the n documents p of the
    in-batch losses (the positives of the global batch):

        1/n sum_i [ 1/(1 + k_i) sum_c (s(q_i, c) - t(q_i, c))^2
                    + 1/n sum_j (s(q_i, p_j) - t(q_i, p_j))^2 ]

    With nested dims, (s - t)^2 is the mean over dims, weighted by c_n. The mean is over all exits
    of the student: each learns from the teacher's best. Logits that the contrastive losses mask
    take part: a teacher knows how near those documents are.
    """
    assert student.passages is not None
    teacher_query = normalize(teacher.query[-1].float(), dim=-1)  # (R, H')
    own = normalize(teacher.candidates()[-1].float(), dim=-1)  # (R, 1 + K, H')
    wanted = (own @ teacher_query.unsqueeze(2)).squeeze(2)  # (R, 1 + K)
    teacher_passages = _in_batch_documents(own[None], batch)[0]  # (n', H')

    present = torch.ones_like(wanted)  # (R, 1 + K)
    present[:, 1:] = batch.negative_weights > 0
    entry_weights = batch.sample_weights.unsqueeze(1) * present / present.sum(1, keepdim=True)
    query = student.parts.query
    of_candidates = candidate_similarity_loss(
        query, student.candidates, wanted, entry_weights, spec
    )
    of_passages = in_batch_similarity_loss(
        query, student.passages, teacher_query, teacher_passages, batch.sample_weights, spec
    )
    return of_candidates + of_passages
