"""One process's share of a training step: packed texts, and what the losses need to know of them.

Letters: n rows of the global batch, W processes, R = ceil(n / W) rows of each process (fillers
included), K negatives, N distinct texts of this process, T tokens, E exits, H vector length.

Fillers are rows of weight 0 that make the shares of all processes equally long.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ml_embed.config import Task
from ml_embed.data.packing import PackedBatch, PackedSequences, moved


@dataclass(frozen=True)
class PartVectors:
    """The vectors of a share's queries, passages and negatives.

    A text that is a query in one row and a document in another may have two different vectors: a
    teacher has a prompt for each.
    """

    query: Tensor
    """(E, R, H)"""
    passage: Tensor
    """(E, R, H)"""
    negatives: Tensor
    """(E, R, K, H); where a sample has fewer than K, any finite numbers"""

    @classmethod
    def of_texts(cls, vectors: Tensor, batch: "ContrastiveBatch") -> "PartVectors":
        """From the (E, N, H) vectors of the batch's distinct texts; gradients flow back to them."""
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
        """A copy on `device` that is not waited for."""
        return PartVectors(
            moved(self.query, device), moved(self.passage, device), moved(self.negatives, device)
        )


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
    """(R,) index into the texts"""
    negatives: Tensor
    """(R, K) index into the texts, 0 where a sample has fewer than K"""
    excluded_candidates: Tensor
    """(R, 1 + K) bool, the passage first: negatives that a sample lacks, or right answers
    to its query"""
    sample_weights: Tensor
    """(R,) float32, W / n, and 0 for fillers: engines average gradients over processes, so the
    shares of all processes add up to the mean over the n rows"""
    negative_weights: Tensor
    """(R, K) float32, W / (negatives of the global batch), and 0 where there is none or for
    fillers: the weights of a mean over all negatives"""
    gathered_rows: Tensor
    """(n,) which of the W R rows that the processes gather are no fillers, in the global order"""
    in_batch_documents: Tensor | None
    """(n',) which of the W R (1 + K) candidates that the processes gather are the documents of the
    in-batch losses, each document once; None = the passages of the n rows, then n' is n"""
    target: Tensor
    """(R,) where each sample's passage stands among those n'"""
    excluded_passages: Tensor | None
    """(R, n') bool: documents of other rows that the data pairs with the sample's query; None if
    none is"""
    uncompared: Tensor | None
    """(R, n' + n) bool, of those documents and then of the global batch's queries: with what a
    sample's passage is not compared, and its query not with queries. These are its own, those of
    rows of which the data pairs one's query with the other's passage, and documents that are no
    row's passage. None where queries are compared with documents alone"""
    query_numbers: Tensor
    """(R,) which rows ask the same (`TokenizedDataset.query_numbers`)"""
    passage_documents: Tensor
    """(R,) document number of each passage"""
    global_documents: Tensor
    """(n',) the same of the documents of the in-batch losses"""
    negative_documents: Tensor
    """(R, K) document number of each negative, -1 where a sample has fewer than K"""
    scores: Tensor | None
    """(n,) float32 graded similarity of the global batch's pairs; None for other tasks"""
    teacher_scores: Tensor | None
    """(R, 1 + K) float32 stored scores of a teacher, the passage first; any finite number where a
    sample has no negative; None if the data has none"""
    languages: tuple[str, ...]
    """codes of the dataset's languages; empty if the data says none"""
    language_numbers: Tensor | None
    """(R,) each row's place in `languages`; None if there are none"""
    language_samples: np.ndarray
    """(languages,) rows of the global batch"""
    row_tokens: Tensor
    """(R,) tokens of each row's query, passage and negatives, and 0 for fillers"""
    num_tokens: int
    """tokens of this process's queries, passages and negatives"""
    num_encoded_tokens: int
    """T: the same with each distinct text counted once"""
    teacher: PartVectors | None = None
    """vectors that a teacher computed beforehand; None without them"""

    def to(self, device: torch.device) -> "ContrastiveBatch":
        """A copy on `device` that is not waited for."""
        tensors: dict[str, Any] = {
            name: moved(value, device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        teacher = None if self.teacher is None else self.teacher.to(device)
        return replace(self, texts=self.texts.to(device), teacher=teacher, **tensors)


def token_chunks(packed: PackedSequences, max_tokens: int) -> list[tuple[int, int]]:
    """Cut texts into GradCache chunks of at most `max_tokens` tokens; a longer text is one alone.

    Returns:
        (first, last) of each chunk, in order: it holds the texts first to last - 1.
    """
    chunks, first, tokens = [], 0, 0
    for text, length in enumerate(packed.lengths):
        if text > first and tokens + length > max_tokens:
            chunks.append((first, text))
            first, tokens = text, 0
        tokens += length
    return [*chunks, (first, len(packed.lengths))]


def slice_texts(texts: PackedBatch, first: int, last: int) -> PackedBatch:
    """The texts first to last - 1 as a packed batch."""
    before = sum(texts.packed.lengths[:first])
    lengths = texts.packed.lengths[first:last]
    ids = texts.input_ids[before : before + sum(lengths)]
    return PackedBatch(ids, PackedSequences.from_lengths(lengths, ids.device))
