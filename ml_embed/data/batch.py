"""From rows of a step to one packed batch: distinct texts, no padding, and the indices that the losses need.

Letters: n rows of the global batch, W processes, R = ceil(n / W) rows of each process (fillers included), K negatives,
N distinct texts of this process, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ml_embed.attention import PackedSequences
from ml_embed.config import Task
from ml_embed.data.random import key_hash
from ml_embed.data.schedule import DatasetPlan, draw_negatives, share_of_process
from ml_embed.data.store import TokenizedDataset
from ml_embed.model import PackedBatch


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
    """(R,) float32, W / n, or 0 for a row that only fills up. Engines average gradients over processes, so the shares
    of all processes add up to the mean over the n rows"""
    negative_weights: Tensor
    """(R, K) float32, W / (negatives of the global batch), 0 for fillers: the weight of each in a mean over all"""
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

    def to(self, device: torch.device) -> "ContrastiveBatch":
        moved = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, texts=self.texts.to(device), **moved)


class TextPool:
    """The distinct texts of a batch, told apart by their ids: a query may be some row's document."""

    def __init__(self, dataset: TokenizedDataset, max_length: int, eos_id: int):
        self._dataset = dataset
        self._max_length = max_length
        self._eos_id = eos_id
        self._number: dict[bytes, int] = {}
        self._document_number: dict[int, int] = {}
        self._texts: list[np.ndarray] = []

    def add_query(self, row: int) -> int:
        return self._add(self._dataset.query(row))

    def add_document(self, document: int) -> int:
        number = self._document_number.get(document)
        if number is None:
            number = self._document_number[document] = self._add(self._dataset.document(document))
        return number

    def _add(self, ids: np.ndarray) -> int:
        ids = cut_to_length(ids, self._max_length, self._eos_id)
        number = self._number.setdefault(ids.tobytes(), len(self._texts))
        if number == len(self._texts):
            self._texts.append(ids)
        return number

    def pack(self) -> tuple[PackedBatch, np.ndarray]:
        """The texts, shortest first, and for each number its place among them."""
        lengths = np.array([len(text) for text in self._texts])
        order = np.argsort(lengths, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return pack_texts([self._texts[i] for i in order]), place

    def lengths(self) -> np.ndarray:
        return np.array([len(text) for text in self._texts])


def cut_to_length(ids: np.ndarray, max_length: int, eos_id: int) -> np.ndarray:
    """At most `max_length` ids; the last of a cut text is replaced by EOS."""
    if len(ids) <= max_length:
        return ids
    cut = ids[:max_length].copy()
    cut[-1] = eos_id
    return cut


def pack_texts(texts: Sequence[np.ndarray]) -> PackedBatch:
    """Texts one behind another. Equal lengths should stand together: attention runs them in one call."""
    input_ids = torch.from_numpy(np.concatenate(texts).astype(np.int64))
    return PackedBatch(input_ids, PackedSequences.from_lengths(len(text) for text in texts))


@dataclass(frozen=True)
class BatchBuilder:
    """Turns the rows of a global batch into this process's share of it."""

    seed: int
    max_length: int
    """tokens of a text, EOS included"""
    eos_id: int
    mask_false_negatives: bool
    process: int
    processes: int

    def build(self, dataset: TokenizedDataset, plan: DatasetPlan, rows: np.ndarray, epoch: int) -> ContrastiveBatch:
        """
        Args:
            dataset, plan: what the rows belong to.
            rows: (n,) the global batch, the same on every process.
            epoch: renews the draw of negatives.
        """
        n, processes = len(rows), self.processes
        share = share_of_process(n, self.process, processes)
        real = share.stop - share.start
        per_process = -(-n // processes)
        # A share that is short is filled up with weightless copies: every process must take part in the collectives.
        own = np.concatenate([rows[share], np.repeat(rows[:1], per_process - real)])

        negatives, negatives_in_all = self._draw(dataset, plan, rows, own, epoch)
        width = max((len(chosen) for chosen in negatives), default=0)
        own_documents = np.asarray(dataset.passage_documents[own])

        pool = TextPool(dataset, self.max_length, self.eos_id)
        query = np.array([pool.add_query(int(row)) for row in own])
        passage = np.array([pool.add_document(int(document)) for document in own_documents])
        negative = np.zeros((per_process, width), dtype=np.int64)
        filler = np.ones((per_process, width), dtype=bool)
        negative_documents = np.full((per_process, width), -1, dtype=np.int64)
        for i, chosen in enumerate(negatives):
            negative[i, : len(chosen)] = [pool.add_document(int(document)) for document in chosen]
            filler[i, : len(chosen)] = False
            negative_documents[i, : len(chosen)] = chosen
        own_document = negative_documents == own_documents[:, None]
        excluded = filler | own_document if self.mask_false_negatives else filler

        is_real = np.arange(per_process) < real
        negative_weight = processes / max(1, negatives_in_all)
        lengths = pool.lengths()
        used = np.concatenate([query[:real], passage[:real], negative[:real][~filler[:real]]])
        texts, place = pool.pack()
        return ContrastiveBatch(
            dataset=plan.name,
            task=plan.task,
            texts=texts,
            query=torch.from_numpy(place[query]),
            passage=torch.from_numpy(place[passage]),
            negatives=torch.from_numpy(place[negative]),
            excluded_candidates=torch.from_numpy(np.pad(excluded, ((0, 0), (1, 0)))),
            sample_weights=torch.from_numpy((is_real * (processes / n)).astype(np.float32)),
            negative_weights=torch.from_numpy(((~filler & is_real[:, None]) * negative_weight).astype(np.float32)),
            gathered_rows=self._gathered_rows(n, per_process),
            target=torch.from_numpy(np.where(is_real, share.start + np.arange(per_process), 0)),
            excluded_passages=self._excluded_passages(dataset, rows, share, per_process),
            passage_documents=torch.from_numpy(own_documents),
            negative_documents=torch.from_numpy(negative_documents),
            num_tokens=int(lengths[used].sum()),
            num_encoded_tokens=len(texts.input_ids),
        )

    def _draw(
        self, dataset: TokenizedDataset, plan: DatasetPlan, rows: np.ndarray, own: np.ndarray, epoch: int
    ) -> tuple[list[np.ndarray], int]:
        """The document numbers of each own row's negatives, and how many the whole global batch uses."""
        offsets = dataset.negative_offsets
        starts, counts = np.asarray(offsets[own]), np.asarray(offsets[own + 1]) - np.asarray(offsets[own])
        key = key_hash(self.seed, "negatives", plan.name, epoch)
        places = draw_negatives(counts, own, plan.num_negatives, key)
        documents = dataset.negative_documents
        negatives = [np.asarray(documents[start + place]) for start, place in zip(starts, places, strict=True)]
        all_counts = np.asarray(offsets[rows + 1]) - np.asarray(offsets[rows])
        return negatives, int(np.minimum(all_counts, plan.num_negatives).sum())

    def _gathered_rows(self, n: int, per_process: int) -> Tensor:
        shares = [share_of_process(n, process, self.processes) for process in range(self.processes)]
        blocks = [p * per_process + np.arange(share.stop - share.start) for p, share in enumerate(shares)]
        return torch.from_numpy(np.concatenate(blocks))

    def _excluded_passages(
        self, dataset: TokenizedDataset, rows: np.ndarray, share: slice, per_process: int
    ) -> Tensor | None:
        """(R, n): passages of other rows that are the sample's own document (decision 9: by document, not by text)."""
        if not self.mask_false_negatives:
            return None
        documents = np.asarray(dataset.passage_documents[rows])
        if len(np.unique(documents)) == len(documents):
            return None
        same = documents[share, None] == documents[None, :]
        same[np.arange(len(same)), share.start + np.arange(len(same))] = False
        return torch.from_numpy(np.pad(same, ((0, per_process - len(same)), (0, 0))))


def token_chunks(packed: PackedSequences, max_tokens: int) -> list[tuple[int, int]]:
    """[first, last) texts of each chunk, in order, with at most `max_tokens` tokens (or one text that has more)."""
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
