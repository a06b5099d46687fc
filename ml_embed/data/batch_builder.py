"""From rows of a dataset to packed batches: what is drawn, told apart, sorted and masked.

Batches are built in blocks: the array operations are done once for several steps, which makes a
batch of a few rows
three times cheaper. A batch does not depend on the block that it is built in.

Letters: S steps of a block, n rows of the global batch, W processes, R = ceil(n / W) rows of each
    process (fillers
included), K negatives, M distinct texts of a block.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ml_embed.data.batch import ContrastiveBatch
from ml_embed.data.packing import PackedBatch, PackedSequences
from ml_embed.data.random import key_hash
from ml_embed.data.schedule import DatasetPlan, draw_negatives, share_of_process
from ml_embed.data.store import TokenizedDataset

ID_BYTES = np.dtype(np.int32).itemsize


class TextPool:
    """The distinct texts of each batch of a block, told apart by their ids: a query may be some
    row's document.

    Ids are kept as bytes (of int32): they are the keys of a dictionary, and are joined without an
    array for each text.
    """

    def __init__(self) -> None:
        self._texts: list[bytes] = []
        self._first: list[int] = [0]
        self._number: dict[bytes, int] = {}

    def add(self, texts: Iterable[bytes]) -> list[int]:
        """A number for each text, counted over the whole block; the same one for the same text of a
        batch."""
        number, first = self._number, self._first[-1]
        return [number.setdefault(ids, first + len(number)) for ids in texts]

    def end_batch(self) -> None:
        """What is added from now on belongs to the next batch."""
        self._texts += self._number
        self._first.append(len(self._texts))
        self._number = {}

    def pack(self) -> tuple[list[PackedBatch], np.ndarray, np.ndarray]:
        """The texts of each batch, shortest first; for each number (M of them) its place in its
        batch and its tokens.

        Equal lengths stand together: attention runs them in one call.
        """
        first = np.array(self._first)
        batch_of = np.repeat(np.arange(len(first) - 1), np.diff(first))
        lengths = np.fromiter(map(len, self._texts), np.int64, len(self._texts)) // ID_BYTES
        order = np.lexsort((lengths, batch_of))  # stable
        place = np.empty_like(order)
        place[order] = np.arange(len(order)) - first[batch_of]
        joined = b"".join([self._texts[i] for i in order.tolist()])
        sequences = [
            PackedSequences.from_lengths(part) for part in np.split(lengths[order], first[1:-1])
        ]
        input_ids = torch.from_numpy(np.frombuffer(joined, np.int32).astype(np.int64))
        parts = input_ids.split([sum(packed.lengths) for packed in sequences])
        return [PackedBatch(*pair) for pair in zip(parts, sequences, strict=True)], place, lengths


def cut_to_length(ids: bytes, max_bytes: int, eos: bytes) -> bytes:
    """At most `max_bytes` of a text's ids; the last id of a cut text is replaced by EOS."""
    return ids if len(ids) <= max_bytes else ids[: max_bytes - len(eos)] + eos


@dataclass(frozen=True)
class BatchBuilder:
    """Turns the rows of global batches into this process's share of them."""

    seed: int
    max_length: int
    """tokens of a text, EOS included"""
    eos_id: int
    mask_false_negatives: bool
    process: int
    processes: int

    def build(
        self, dataset: TokenizedDataset, plan: DatasetPlan, rows: np.ndarray, epoch: int
    ) -> ContrastiveBatch:
        """The batch of one step; `rows` is (n,), the rest as in `build_block`."""
        return self.build_block(dataset, plan, rows[None], epoch)[0]

    def build_block(
        self, dataset: TokenizedDataset, plan: DatasetPlan, rows: np.ndarray, epoch: int
    ) -> list[ContrastiveBatch]:
        """
        Args:
            dataset, plan: what the rows belong to.
            rows: (S, n) the global batches of several steps, the same on every process.
            epoch: renews the draw of negatives.
        """
        n, processes = rows.shape[1], self.processes
        share = share_of_process(n, self.process, processes)
        own = self.own_rows(rows)  # (S, R)
        real = share.stop - share.start
        is_real = np.arange(own.shape[1]) < real

        own_documents = dataset.passage_documents[own]  # (S, R)
        negative_documents = self._draw(dataset, plan, own, epoch)  # (S, R, K), -1 for none
        present = negative_documents >= 0
        excluded = np.zeros((*own.shape, 1 + present.shape[2]), bool)
        excluded[..., 1:] = ~present
        if self.mask_false_negatives:
            excluded[..., 1:] |= negative_documents == own_documents[..., None]

        texts, (query, passage, negatives), tokens = self._texts(
            dataset, own, own_documents, negative_documents
        )
        num_tokens = tokens[:, :real].sum(axis=1).tolist()
        negatives_of_row = _negative_counts(dataset, rows).clip(max=plan.num_negatives)
        negative_weight = (processes / negatives_of_row.sum(axis=1).clip(min=1)).astype(np.float32)
        negative_weights = (present & is_real[:, None]) * negative_weight[:, None, None]
        all_documents = dataset.passage_documents[rows]
        # The same in every batch of the block, and never written to.
        gathered_rows = self._gathered_rows(n, len(is_real))
        sample_weights = torch.from_numpy((is_real * (processes / n)).astype(np.float32))
        target = torch.from_numpy((share.start + np.arange(len(is_real))) * is_real)
        width = present.sum(axis=2).max(axis=1).tolist()  # K of each batch alone
        return [
            ContrastiveBatch(
                dataset=plan.name,
                task=plan.task,
                texts=texts[s],
                query=torch.from_numpy(query[s]),
                passage=torch.from_numpy(passage[s]),
                negatives=torch.from_numpy(negatives[s, :, :k]),
                excluded_candidates=torch.from_numpy(excluded[s, :, : 1 + k]),
                sample_weights=sample_weights,
                negative_weights=torch.from_numpy(negative_weights[s, :, :k]),
                gathered_rows=gathered_rows,
                target=target,
                excluded_passages=self._excluded_passages(all_documents[s], share, len(is_real)),
                passage_documents=torch.from_numpy(own_documents[s]),
                negative_documents=torch.from_numpy(negative_documents[s, :, :k]),
                num_tokens=num_tokens[s],
                num_encoded_tokens=len(texts[s].input_ids),
            )
            for s, k in enumerate(width)
        ]

    def own_rows(self, rows: np.ndarray) -> np.ndarray:
        """(..., R) this process's rows of global batches (..., n), in the order of `build`, fillers
        included."""
        n = rows.shape[-1]
        own = rows[..., share_of_process(n, self.process, self.processes)]
        # A share that is short is filled up with weightless copies: every process must take part in
        # the collectives.
        fillers = -(-n // self.processes) - own.shape[-1]
        return np.concatenate([own, np.repeat(rows[..., :1], fillers, axis=-1)], axis=-1)

    def _draw(
        self, dataset: TokenizedDataset, plan: DatasetPlan, own: np.ndarray, epoch: int
    ) -> np.ndarray:
        """(S, R, K) documents of each own row's negatives, -1 for none."""
        rows = own.ravel()
        key = key_hash(self.seed, "negatives", plan.name, epoch)
        places = draw_negatives(_negative_counts(dataset, rows), rows, plan.num_negatives, key)
        drawn = places >= 0
        documents = np.full(places.shape, -1)
        documents[drawn] = dataset.negative_documents[
            (dataset.negative_offsets[rows][:, None] + places)[drawn]
        ]
        return documents.reshape(*own.shape, -1)

    def _texts(
        self,
        dataset: TokenizedDataset,
        own: np.ndarray,
        own_documents: np.ndarray,
        negative_documents: np.ndarray,
    ) -> tuple[list[PackedBatch], tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
        """The distinct texts of each batch; the places among them of the queries (S, R), passages
        (S, R) and negatives (S, R, K), 0 for none; the tokens of each row, (S, R)."""
        present = negative_documents >= 0
        drawn = negative_documents[present]
        documents, index = np.unique(
            np.concatenate([own_documents.ravel(), drawn]), return_inverse=True
        )
        distinct = self._cut(dataset.document_bytes(documents))
        parts = (
            self._cut(dataset.query_bytes(own.ravel())),
            [distinct[i] for i in index[: own.size].tolist()],
            [distinct[i] for i in index[own.size :].tolist()],
        )
        ends = np.arange(1, len(own) + 1) * own.shape[1], present.sum(axis=(1, 2)).cumsum()
        pool = TextPool()
        numbers: tuple[list[int], ...] = ([], [], [])
        for step in range(len(own)):
            for texts, number, end in zip(parts, numbers, (ends[0], ends[0], ends[1]), strict=True):
                number += pool.add(texts[len(number) : end[step]])
            pool.end_batch()
        packed, place, length = pool.pack()
        query, passage = (np.array(number).reshape(own.shape) for number in numbers[:2])
        negatives, tokens = np.zeros_like(negative_documents), np.zeros_like(negative_documents)
        negatives[present], tokens[present] = place[numbers[2]], length[numbers[2]]
        return (
            packed,
            (place[query], place[passage], negatives),
            length[query] + length[passage] + tokens.sum(axis=2),
        )

    def _cut(self, texts: list[bytes]) -> list[bytes]:
        longest, eos = self.max_length * ID_BYTES, np.int32(self.eos_id).tobytes()
        return [cut_to_length(ids, longest, eos) for ids in texts]

    def _gathered_rows(self, n: int, per_process: int) -> Tensor:
        shares = [share_of_process(n, process, self.processes) for process in range(self.processes)]
        blocks = [
            p * per_process + np.arange(share.stop - share.start) for p, share in enumerate(shares)
        ]
        return torch.from_numpy(np.concatenate(blocks))

    def _excluded_passages(
        self, documents: np.ndarray, share: slice, per_process: int
    ) -> Tensor | None:
        """(R, n): passages of other rows that are the sample's own document (decision 9: by
        document, not by text).

        `documents` are those of the global batch, (n,).
        """
        if not self.mask_false_negatives or len(set(documents.tolist())) == len(documents):
            return None
        same = documents[share, None] == documents[None, :]
        same[np.arange(len(same)), share.start + np.arange(len(same))] = False
        return torch.from_numpy(np.pad(same, ((0, per_process - len(same)), (0, 0))))


def _negative_counts(dataset: TokenizedDataset, rows: np.ndarray) -> np.ndarray:
    """How many negatives each row has, in the shape of `rows`."""
    return dataset.negative_offsets[rows + 1] - dataset.negative_offsets[rows]
