"""From rows of a step to one packed batch: distinct texts, no padding, and the indices that the losses need.

Letters: n rows of the global batch, W processes, R = ceil(n / W) rows of each process (fillers included), K negatives,
N distinct texts of this process, T tokens, E exits, H vector length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ml_embed.attention import PackedSequences
from ml_embed.config import Task
from ml_embed.data.random import key_hash
from ml_embed.data.schedule import DatasetPlan, draw_negatives, share_of_process
from ml_embed.data.store import TokenizedDataset
from ml_embed.model import PackedBatch

ID_BYTES = np.dtype(np.int32).itemsize


@dataclass(frozen=True)
class PartVectors:
    """Vectors of the texts of a share, by the parts that they play. A teacher may give one text two vectors, one as a
    query and one as a document, because it has other prompts for them."""

    query: Tensor
    """(E, R, H)"""
    passage: Tensor
    """(E, R, H)"""
    negatives: Tensor
    """(E, R, K, H), of any finite value where a sample has fewer than K"""

    @classmethod
    def of_texts(cls, vectors: Tensor, batch: "ContrastiveBatch") -> "PartVectors":
        """From (E, N, H) vectors of the batch's distinct texts, with gradients."""
        negatives = vectors.index_select(1, batch.negatives.flatten()).unflatten(1, batch.negatives.shape)
        return cls(vectors.index_select(1, batch.query), vectors.index_select(1, batch.passage), negatives)

    def candidates(self) -> Tensor:
        """(E, R, 1 + K, H): each row's passage, then its negatives."""
        return torch.cat([self.passage.unsqueeze(2), self.negatives], dim=2)

    def to(self, device: torch.device) -> "PartVectors":
        moved = (part.to(device, non_blocking=True) for part in (self.query, self.passage, self.negatives))
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
    teacher: PartVectors | None = None
    """a teacher's vectors that were computed beforehand; None without them"""

    def to(self, device: torch.device) -> "ContrastiveBatch":
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        teacher = None if self.teacher is None else self.teacher.to(device)
        return replace(self, texts=self.texts.to(device), teacher=teacher, **moved)


class TextPool:
    """The distinct texts of a batch, told apart by their ids: a query may be some row's document.

    Ids are kept as bytes (of int32): they are the keys of a dictionary, and are joined without an array for each text.
    """

    def __init__(self, max_length: int, eos_id: int):
        self._max_bytes = max_length * ID_BYTES
        self._eos = np.int32(eos_id).tobytes()
        self._number: dict[bytes, int] = {}

    def add(self, texts: Sequence[bytes]) -> list[int]:
        """A number for each text; the same one for the same text (once cut to the longest length)."""
        number, longest, eos = self._number, self._max_bytes, self._eos
        return [
            number.setdefault(cut_to_length(ids, longest, eos) if len(ids) > longest else ids, len(number))
            for ids in texts
        ]

    def pack(self) -> tuple[PackedBatch, np.ndarray, np.ndarray]:
        """The texts, shortest first; for each number its place among them; for each number its tokens.

        Equal lengths stand together: attention runs them in one call.
        """
        texts = list(self._number)
        lengths = np.fromiter(map(len, texts), np.int64, len(texts)) // ID_BYTES
        order = lengths.argsort(kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        joined = b"".join([texts[i] for i in order.tolist()])
        input_ids = torch.from_numpy(np.frombuffer(joined, np.int32).astype(np.int64))
        return PackedBatch(input_ids, PackedSequences.from_lengths(lengths[order])), place, lengths


def cut_to_length(ids: bytes, max_bytes: int, eos: bytes) -> bytes:
    """At most `max_bytes` of a text's ids; the last id of a cut text is replaced by EOS."""
    return ids if len(ids) <= max_bytes else ids[: max_bytes - len(eos)] + eos


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
        own = self.own_rows(rows)
        per_process = len(own)

        negative_documents, negatives_in_all = self._draw(dataset, plan, rows, own, epoch)  # (R, K), -1 for none
        present = negative_documents >= 0
        own_documents = dataset.passage_documents[own]
        excluded = np.zeros((per_process, 1 + present.shape[1]), bool)
        np.logical_not(present, out=excluded[:, 1:])
        if self.mask_false_negatives:
            excluded[:, 1:] |= negative_documents == own_documents[:, None]

        pool = TextPool(self.max_length, self.eos_id)
        query = pool.add(dataset.query_bytes(own))
        documents = np.concatenate([own_documents, negative_documents[present]]).tolist()
        distinct = list(dict.fromkeys(documents))  # in the order of their first use
        number_of = dict(zip(distinct, pool.add(dataset.document_bytes(np.array(distinct))), strict=True))
        numbers = np.array(query + [number_of[document] for document in documents])  # of all that the rows use
        texts, place, lengths = pool.pack()
        places = place[numbers]
        negatives = np.zeros_like(negative_documents)  # any text will do where there is none
        negatives[present] = places[2 * per_process :]

        is_real = np.arange(per_process) < real
        if real < per_process:
            numbers = numbers[np.concatenate([is_real, is_real, np.repeat(is_real, present.sum(axis=1))])]
        negative_weight = processes / max(1, negatives_in_all)
        return ContrastiveBatch(
            dataset=plan.name,
            task=plan.task,
            texts=texts,
            query=torch.from_numpy(places[:per_process]),
            passage=torch.from_numpy(places[per_process : 2 * per_process]),
            negatives=torch.from_numpy(negatives),
            excluded_candidates=torch.from_numpy(excluded),
            sample_weights=torch.from_numpy((is_real * (processes / n)).astype(np.float32)),
            negative_weights=torch.from_numpy((present & is_real[:, None]) * np.float32(negative_weight)),
            gathered_rows=self._gathered_rows(n, per_process),
            target=torch.from_numpy((share.start + np.arange(per_process)) * is_real),
            excluded_passages=self._excluded_passages(dataset, rows, share, per_process),
            passage_documents=torch.from_numpy(own_documents),
            negative_documents=torch.from_numpy(negative_documents),
            num_tokens=int(lengths[numbers].sum()),
            num_encoded_tokens=len(texts.input_ids),
        )

    def own_rows(self, rows: np.ndarray) -> np.ndarray:
        """(R,) this process's rows of the global batch `rows` (n,), in the order of `build`, fillers included."""
        own = rows[share_of_process(len(rows), self.process, self.processes)]
        # A share that is short is filled up with weightless copies: every process must take part in the collectives.
        fillers = -(-len(rows) // self.processes) - len(own)
        return np.concatenate([own, np.repeat(rows[:1], fillers)]) if fillers else own

    def _draw(
        self, dataset: TokenizedDataset, plan: DatasetPlan, rows: np.ndarray, own: np.ndarray, epoch: int
    ) -> tuple[np.ndarray, int]:
        """(R, K) documents of each own row's negatives, -1 for none; how many the whole global batch uses."""
        offsets = dataset.negative_offsets
        starts = offsets[own]
        counts = offsets[own + 1] - starts
        key = key_hash(self.seed, "negatives", plan.name, epoch)
        places = draw_negatives(counts, own, plan.num_negatives, key)
        drawn = places >= 0
        documents = np.full(places.shape, -1)
        documents[drawn] = dataset.negative_documents[(starts[:, None] + places)[drawn]]
        counts_in_all = counts if self.processes == 1 else offsets[rows + 1] - offsets[rows]
        return documents, int(np.minimum(counts_in_all, plan.num_negatives).sum())

    def _gathered_rows(self, n: int, per_process: int) -> Tensor:
        if n == per_process * self.processes:  # no fillers
            return torch.arange(n)
        shares = [share_of_process(n, process, self.processes) for process in range(self.processes)]
        blocks = [p * per_process + np.arange(share.stop - share.start) for p, share in enumerate(shares)]
        return torch.from_numpy(np.concatenate(blocks))

    def _excluded_passages(
        self, dataset: TokenizedDataset, rows: np.ndarray, share: slice, per_process: int
    ) -> Tensor | None:
        """(R, n): passages of other rows that are the sample's own document (decision 9: by document, not by text)."""
        if not self.mask_false_negatives:
            return None
        documents = dataset.passage_documents[rows]
        if len(set(documents.tolist())) == len(documents):
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
