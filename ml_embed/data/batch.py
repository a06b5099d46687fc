"""One process's share of a step: distinct texts in one packed row, and the indices that the losses
need.

Letters: n rows of the global batch, W processes, R = ceil(n / W) rows of each process (fillers
    included), K negatives,
N distinct texts of this process, T tokens, E exits, H vector length.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ml_embed.config import Task
from ml_embed.data.packing import PackedBatch, PackedSequences


@dataclass(frozen=True)
class PartVectors:
    """Vectors of the texts of a share, by the parts that they play. A teacher may give one text two
    vectors, one as a query and one as a document, because it has other prompts for them."""

    query: Tensor
    """(E, R, H)"""
    passage: Tensor
    """(E, R, H)"""
    negatives: Tensor
    """(E, R, K, H), of any finite value where a sample has fewer than K"""

    @classmethod
    def of_texts(cls, vectors: Tensor, batch: "ContrastiveBatch") -> "PartVectors":
        """From (E, N, H) vectors of the batch's distinct texts, with gradients."""
        negatives = vectors.index_select(1, batch.negatives.flatten()).unflatten(
            1, batch.negatives.shape
        )
        return cls(
            vectors.index_select(1, batch.query), vectors.index_select(1, batch.passage), negatives
        )

    def candidates(self) -> Tensor:
        """(E, R, 1 + K, H): each row's passage, then its negatives."""
        return torch.cat([self.passage.unsqueeze(2), self.negatives], dim=2)

    def to(self, device: torch.device) -> "PartVectors":
        moved = (
            part.to(device, non_blocking=True)
            for part in (self.query, self.passage, self.negatives)
        )
        return PartVectors(*moved)


@dataclass(frozen=True)
class ContrastiveBatch:
    """One process's share of a global batch."""

    dataset: str
    task: Task
    texts: PackedBatch
    """the N distinct texts, shortest first"""
    query: Tensor
    """(R,) index into the texts"""
    passage: Tensor
    """(R,)"""
    negatives: Tensor
    """(R, K), 0 where a sample has fewer than K"""
    excluded_candidates: Tensor
    """(R, 1 + K) bool: fillers, and negatives that are the sample's own positive document"""
    sample_weights: Tensor
    """(R,) float32, W / n, or 0 for a row that only fills up. Engines average gradients over
    processes, so the shares of all processes add up to the mean over the n rows"""
    negative_weights: Tensor
    """(R, K) float32, W / (negatives of the global batch), 0 for fillers: the weight of each in a
    mean over all"""
    gathered_rows: Tensor
    """(n,) which rows of the W R gathered ones are real, in the global order"""
    target: Tensor
    """(R,) where each sample's passage stands among those n"""
    excluded_passages: Tensor | None
    """(R, n) bool: the sample's own document in another row; None when there is none"""
    passage_documents: Tensor
    """(R,) the document number of each passage"""
    negative_documents: Tensor
    """(R, K)"""
    num_tokens: int
    """real tokens of this process's queries, passages and negatives"""
    num_encoded_tokens: int
    """T: the same with each distinct text counted once"""
    teacher: PartVectors | None = None
    """a teacher's vectors that were computed beforehand; None without them"""

    def to(self, device: torch.device) -> "ContrastiveBatch":
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        teacher = None if self.teacher is None else self.teacher.to(device)
        return replace(self, texts=self.texts.to(device), teacher=teacher, **moved)


def token_chunks(packed: PackedSequences, max_tokens: int) -> list[tuple[int, int]]:
    """[first, last) texts of each chunk, in order, with at most `max_tokens` tokens (or one text
    that has more)."""
    chunks, first, tokens = [], 0, 0
    for text, length in enumerate(packed.lengths):
        if text > first and tokens + length > max_tokens:
            chunks.append((first, text))
            first, tokens = text, 0
        tokens += length
    return [*chunks, (first, len(packed.lengths))]


def slice_texts(texts: PackedBatch, first: int, last: int) -> PackedBatch:
    """Texts first .. last - 1 as a packed batch of their own."""
    before = sum(texts.packed.lengths[:first])
    lengths = texts.packed.lengths[first:last]
    ids = texts.input_ids[before : before + sum(lengths)]
    return PackedBatch(ids, PackedSequences.from_lengths(lengths, ids.device))
