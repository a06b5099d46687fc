"""Builds packed batches from row numbers: draws negatives, finds equal texts, sorts, and masks.

Batches are built in groups: array operations run once for several steps, which makes a batch of
few rows three times cheaper. A batch does not depend on the group in which it is built.

Letters: S steps of a group, n rows of the global batch, W processes, R = ceil(n / W) rows of each
process (fillers included), K negatives, M distinct texts of a group.

Fillers are copies of a row, with weight 0, that make the shares of all processes equally long.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ml_embed.data.batch import ContrastiveBatch
from ml_embed.data.packing import PackedBatch, PackedSequences
from ml_embed.data.random import key_hash
from ml_embed.data.schedule import DatasetPlan, draw_negatives, share_of
from ml_embed.data.store import TokenizedDataset

ID_BYTES = np.dtype(np.int32).itemsize


class TextPool:
    """Collects the distinct texts of each batch of a group, and numbers them.

    Texts with the same token ids are the same text, whether it is a query or a document. Ids are
    kept as bytes (of int32), which are dictionary keys and are joined without an array per text.
    """

    def __init__(self) -> None:
        self._texts: list[bytes] = []
        self._first: list[int] = [0]
        self._number: dict[bytes, int] = {}

    def add(self, texts: Iterable[bytes]) -> list[int]:
        """The number of each text, counted over the group; equal texts of a batch share it."""
        number, first = self._number, self._first[-1]
        return [number.setdefault(ids, first + len(number)) for ids in texts]

    def end_batch(self) -> None:
        """Begin the next batch: what is added from now on belongs to it."""
        self._texts += self._number
        self._first.append(len(self._texts))
        self._number = {}

    def pack(self) -> tuple[list[PackedBatch], np.ndarray, np.ndarray]:
        """Pack the texts of each batch, shortest first: attention runs equal lengths in one call.

        Returns:
            the packed texts of each batch; (M,) each number's place in its batch; (M,) its tokens.
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
    """A text's ids, or its first `max_bytes` bytes of them with the last id replaced by EOS."""
    return ids if len(ids) <= max_bytes else ids[: max_bytes - len(eos)] + eos


@dataclass(frozen=True)
class _GroupTexts:
    """The distinct texts of each step of a group, and which of them each row uses."""

    packed: list[PackedBatch]
    """the texts of each step, shortest first"""
    query: np.ndarray
    """(S, R) place among the step's texts"""
    passage: np.ndarray
    """(S, R) the same"""
    negatives: np.ndarray
    """(S, R, K) the same, 0 where a row has fewer than K"""
    tokens: np.ndarray
    """(S, R) tokens of all texts of a row"""


@dataclass(frozen=True)
class BatchBuilder:
    """Builds one process's share of global batches."""

    seed: int
    max_length: int
    """most tokens of a text, EOS included"""
    eos_id: int
    mask_false_negatives: bool
    process: int
    processes: int
    all_negatives: bool = False
    """the in-batch losses of retrieval look at all documents of the global batch, not at passages
    alone"""
    all_pairs: bool = False
    """the in-batch loss of retrieval also compares queries with queries and passages with both"""
    scored: bool = False
    """the distillation learns from scores that the data hold"""

    def build(
        self, dataset: TokenizedDataset, plan: DatasetPlan, rows: np.ndarray, epoch: int
    ) -> ContrastiveBatch:
        """The batch of one step; `rows` is (n,), the rest as in `build_group`."""
        return self.build_group(dataset, plan, rows[None], epoch)[0]

    def build_group(
        self, dataset: TokenizedDataset, plan: DatasetPlan, rows: np.ndarray, epoch: int
    ) -> list[ContrastiveBatch]:
        """This process's share of several steps of one dataset.

        Args:
            dataset: what the rows belong to.
            plan: how the dataset is trained on.
            rows: (S, n) the global batch of each step, the same on every process.
            epoch: each epoch draws other negatives.
        """
        own = self.own_rows(rows)  # (S, R)
        documents = dataset.passage_documents[own]  # (S, R)
        places = self._draw(dataset, plan, own, epoch)  # (S, R, K), -1 for none
        most = (places >= 0).sum(axis=2).max(axis=1).tolist()  # K of each batch alone
        drawn = None
        if self.all_negatives and plan.task == "retrieval":
            drawn = _documents(dataset, self._draw(dataset, plan, rows, epoch))  # (S, n, K)
            most = (drawn >= 0).sum(axis=2).max(axis=1).tolist()  # the same on every process
            width = drawn.shape[2] - places.shape[2]
            places = np.pad(places, ((0, 0), (0, 0), (0, width)), constant_values=-1)
        negatives = _documents(dataset, places)
        texts = self._texts(dataset, own, documents, negatives)
        excluded = self._excluded_candidates(dataset, own, negatives)
        weights = self._negative_weights(dataset, plan, rows, negatives >= 0)
        row_tokens = texts.tokens * self._is_real(rows.shape[1])  # (S, R)
        gathered_rows, sample_weights, target = self._same_in_every_step(rows.shape[1])
        shared = torch.from_numpy(gathered_rows), torch.from_numpy(sample_weights)
        passages = dataset.passage_documents[rows]  # (S, n)
        in_batch = (
            _InBatch([None] * len(rows), passages, np.tile(target, (len(rows), 1)))
            if drawn is None
            else self._each_document_once(passages, drawn, gathered_rows)
        )
        excluded_passages = self._excluded_passages(dataset, plan, rows, in_batch)
        uncompared = self._uncompared(dataset, plan, rows, in_batch)
        query_numbers = dataset.query_numbers[own]  # (S, R)
        return [
            ContrastiveBatch(
                dataset=plan.name,
                task=plan.task,
                texts=texts.packed[s],
                query=torch.from_numpy(texts.query[s]),
                passage=torch.from_numpy(texts.passage[s]),
                negatives=torch.from_numpy(texts.negatives[s, :, :k]),
                excluded_candidates=torch.from_numpy(excluded[s, :, : 1 + k]),
                negative_weights=torch.from_numpy(weights[s, :, :k]),
                excluded_passages=excluded_passages[s],
                uncompared=uncompared[s],
                query_numbers=torch.from_numpy(query_numbers[s]),
                passage_documents=torch.from_numpy(documents[s]),
                global_documents=torch.from_numpy(in_batch.of_step(s)),
                negative_documents=torch.from_numpy(negatives[s, :, :k]),
                scores=_scores(dataset, plan, rows[s]),
                teacher_scores=self._teacher_scores(dataset, own[s], places[s, :, :k]),
                languages=dataset.languages,
                language_numbers=_language_numbers(dataset, own[s]),
                language_samples=_language_samples(dataset, rows[s]),
                row_tokens=torch.from_numpy(row_tokens[s]),
                num_tokens=int(row_tokens[s].sum()),
                num_encoded_tokens=len(texts.packed[s].input_ids),
                gathered_rows=shared[0],
                in_batch_documents=in_batch.gathered[s],
                sample_weights=shared[1],
                target=torch.from_numpy(in_batch.target[s]),
            )
            for s, k in enumerate(most)
        ]

    def own_rows(self, rows: np.ndarray) -> np.ndarray:
        """(..., R) this process's rows, fillers last, of global batches (..., n)."""
        own = rows[..., self._share(rows.shape[-1])]
        # Every process must take part in the collectives with the same shapes.
        fillers = self._rows_per_process(rows.shape[-1]) - own.shape[-1]
        return np.concatenate([own, np.repeat(rows[..., :1], fillers, axis=-1)], axis=-1)

    def _share(self, n: int) -> slice:
        return share_of(n, self.process, self.processes)

    def _rows_per_process(self, n: int) -> int:
        """R, fillers included."""
        return -(-n // self.processes)

    def _is_real(self, n: int) -> np.ndarray:
        """(R,) bool: which of this process's rows are no fillers."""
        share = self._share(n)
        return np.arange(self._rows_per_process(n)) < share.stop - share.start

    def _draw(
        self, dataset: TokenizedDataset, plan: DatasetPlan, own: np.ndarray, epoch: int
    ) -> np.ndarray:
        """(S, R, K) places of each row's drawn negatives among the dataset's, -1 for none."""
        rows = own.ravel()
        key = key_hash(self.seed, "negatives", plan.name, epoch)
        places = draw_negatives(_negative_counts(dataset, rows), rows, plan.num_negatives, key)
        first = dataset.negative_offsets[rows][:, None]
        return np.where(places >= 0, first + places, -1).reshape(*own.shape, -1)

    def _texts(
        self,
        dataset: TokenizedDataset,
        own: np.ndarray,
        documents: np.ndarray,
        negatives: np.ndarray,
    ) -> _GroupTexts:
        """Look up, cut and pack the texts of rows `own`, with their documents and negatives."""
        present = negatives >= 0
        distinct, index = np.unique(
            np.concatenate([documents.ravel(), negatives[present]]), return_inverse=True
        )
        looked_up = self._cut(dataset.document_bytes(distinct))
        parts = (
            self._cut(dataset.query_bytes(own.ravel())),
            [looked_up[i] for i in index[: own.size].tolist()],
            [looked_up[i] for i in index[own.size :].tolist()],
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
        places, tokens = np.zeros_like(negatives), np.zeros_like(negatives)
        places[present], tokens[present] = place[numbers[2]], length[numbers[2]]
        row_tokens = length[query] + length[passage] + tokens.sum(axis=2)
        return _GroupTexts(packed, place[query], place[passage], places, row_tokens)

    def _cut(self, texts: list[bytes]) -> list[bytes]:
        longest, eos = self.max_length * ID_BYTES, np.int32(self.eos_id).tobytes()
        return [cut_to_length(ids, longest, eos) for ids in texts]

    def _same_in_every_step(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`gathered_rows`, `sample_weights`, `target` of each batch of n rows, shared by them."""
        is_real, per_process = self._is_real(n), self._rows_per_process(n)
        shares = [share_of(n, process, self.processes) for process in range(self.processes)]
        gathered_rows = [
            number * per_process + np.arange(share.stop - share.start)
            for number, share in enumerate(shares)
        ]
        weights = (is_real * (self.processes / n)).astype(np.float32)
        target = (self._share(n).start + np.arange(per_process)) * is_real
        return np.concatenate(gathered_rows), weights, target

    def _negative_weights(
        self, dataset: TokenizedDataset, plan: DatasetPlan, rows: np.ndarray, present: np.ndarray
    ) -> np.ndarray:
        """(S, R, K) float32 weight of each own negative in a mean over those of the global batch.

        `present` (S, R, K) says which negatives there are.
        """
        used = _negative_counts(dataset, rows).clip(max=plan.num_negatives).sum(axis=1)  # (S,)
        weight = (self.processes / used.clip(min=1)).astype(np.float32)
        return (present & self._is_real(rows.shape[1])[:, None]) * weight[:, None, None]

    def _excluded_candidates(
        self, dataset: TokenizedDataset, own: np.ndarray, negatives: np.ndarray
    ) -> np.ndarray:
        """(S, R, 1 + K): negatives that a row lacks, or that are right answers to its query."""
        excluded = np.zeros((*own.shape, 1 + negatives.shape[2]), bool)
        excluded[..., 1:] = negatives < 0
        if self.mask_false_negatives:
            queries = dataset.query_numbers[own]
            excluded[..., 1:] |= dataset.are_right(queries[..., None], negatives)
        return excluded

    def _each_document_once(
        self, passages: np.ndarray, drawn: np.ndarray, gathered_rows: np.ndarray
    ) -> "_InBatch":
        """All documents of global batches: passages (S, n), and drawn negatives (S, n, K)."""
        n = passages.shape[1]
        candidates = np.concatenate([passages[..., None], drawn], axis=2)  # (S, n, 1 + K)
        documents = np.full((len(passages), n * candidates.shape[2]), -1)
        target = np.zeros((len(passages), self._rows_per_process(n)), np.int64)
        gathered = []
        for s, of_step in enumerate(candidates):
            of_step = of_step[:, (of_step >= 0).any(axis=0)]  # as wide as this step's negatives
            present, width = of_step >= 0, of_step.shape[1]
            place = gathered_rows[:, None] * width + np.arange(width)
            distinct, first = np.unique(of_step[present], return_index=True)
            gathered.append(torch.from_numpy(place[present][first]))
            documents[s, : len(distinct)] = distinct
            own = of_step[self._share(n), 0]
            target[s, : len(own)] = np.searchsorted(distinct, own)
        return _InBatch(gathered, documents, target)

    def _excluded_passages(
        self, dataset: TokenizedDataset, plan: DatasetPlan, rows: np.ndarray, in_batch: "_InBatch"
    ) -> list[Tensor | None]:
        """(R, n') of each step: other rows' right answers to a row's query; None without any.

        `rows` are those of the global batches, (S, n). Documents are compared, not texts. Only
        retrieval has a loss that looks at other rows' documents.
        """
        excluded: list[Tensor | None] = [None] * len(rows)
        if plan.task != "retrieval" or not self.mask_false_negatives:
            return excluded
        documents, queries = in_batch.documents, dataset.query_numbers[rows]
        several = dataset.right_answers(queries) > 1
        in_order = np.sort(documents, axis=1)
        twice = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
        if not (several.any() or twice.any()):
            return excluded
        share = self._share(rows.shape[1])
        own = np.arange(share.stop - share.start)
        right = dataset.passage_documents[rows[:, share, None]] == documents[:, None]
        step, row = np.nonzero(several[:, share])
        right[step, row] = dataset.are_right(queries[:, share][step, row, None], documents[step])
        right[np.arange(len(rows))[:, None], own, in_batch.target[:, own]] = False
        fillers = self._rows_per_process(rows.shape[1]) - len(own)
        right = np.pad(right, ((0, 0), (0, fillers), (0, 0)))
        for s in np.flatnonzero(right.any(axis=(1, 2))).tolist():
            excluded[s] = torch.from_numpy(right[s, :, : len(in_batch.of_step(s))])
        return excluded

    def _uncompared(
        self, dataset: TokenizedDataset, plan: DatasetPlan, rows: np.ndarray, in_batch: "_InBatch"
    ) -> list[Tensor | None]:
        """`ContrastiveBatch.uncompared` of each step; `rows` are those of `_excluded_passages`."""
        if not self.all_pairs or plan.task != "retrieval":
            return [None] * len(rows)
        share = self._share(rows.shape[1])
        own = np.arange(share.stop - share.start)
        related = np.zeros((len(rows), self._rows_per_process(rows.shape[1]), rows.shape[1]), bool)
        related[:, own, share.start + own] = True
        passages = dataset.passage_documents[rows]  # (S, n)
        if self.mask_false_negatives:
            queries = dataset.query_numbers[rows]
            related[:, own] |= dataset.are_right(queries[:, share, None], passages[:, None])
            related[:, own] |= dataset.are_right(queries[:, None], passages[:, share, None])
        uncompared: list[Tensor | None] = []
        for s, of_queries in enumerate(related):
            of_documents = of_queries
            if in_batch.gathered[s] is not None:
                documents = in_batch.of_step(s)
                place = np.searchsorted(documents, passages[s])  # of each row's passage
                of_documents = np.ones((len(of_queries), len(documents)), bool)
                for is_related in (False, True):  # one row with that passage is enough
                    row, other = np.nonzero(of_queries == is_related)
                    of_documents[row, place[other]] = is_related
            uncompared.append(torch.from_numpy(np.hstack([of_documents, of_queries])))
        return uncompared

    def _teacher_scores(
        self, dataset: TokenizedDataset, rows: np.ndarray, places: np.ndarray
    ) -> Tensor | None:
        """(R, 1 + K) of rows (R,) and of their negatives at `places` (R, K); 0 for none."""
        if not self.scored or dataset.passage_scores is None or dataset.negative_scores is None:
            return None
        scores = np.zeros((len(rows), 1 + places.shape[1]), np.float32)
        scores[:, 0] = dataset.passage_scores[rows]
        drawn = places >= 0
        scores[:, 1:][drawn] = dataset.negative_scores[places[drawn]]
        return torch.from_numpy(np.nan_to_num(scores))


@dataclass(frozen=True)
class _InBatch:
    """The documents that the in-batch losses of each step look at."""

    gathered: Sequence[Tensor | None]
    """`ContrastiveBatch.in_batch_documents` of each step"""
    documents: np.ndarray
    """(S, n') their numbers, -1 after the last of a step that has fewer"""
    target: np.ndarray
    """(S, R) where each row's passage stands among them; 0 for fillers"""

    def of_step(self, step: int) -> np.ndarray:
        """(n',) the documents of one step."""
        documents = self.documents[step]
        return documents[documents >= 0] if documents[-1] < 0 else documents


def _language_numbers(dataset: TokenizedDataset, rows: np.ndarray) -> Tensor | None:
    if not dataset.languages:
        return None
    return torch.from_numpy(dataset.language_numbers[rows].astype(np.int64))


def _language_samples(dataset: TokenizedDataset, rows: np.ndarray) -> np.ndarray:
    """(languages,) how many of the rows each language of the dataset has."""
    if not dataset.languages:
        return np.zeros(0, np.int64)
    return np.bincount(dataset.language_numbers[rows], minlength=len(dataset.languages))


def _scores(dataset: TokenizedDataset, plan: DatasetPlan, rows: np.ndarray) -> Tensor | None:
    if plan.task != "similarity":
        return None
    assert dataset.scores is not None
    return torch.from_numpy(dataset.scores[rows])


def _documents(dataset: TokenizedDataset, places: np.ndarray) -> np.ndarray:
    """The documents at some places among a dataset's negatives, -1 for none."""
    drawn = places >= 0
    documents = np.full(places.shape, -1)
    documents[drawn] = dataset.negative_documents[places[drawn]]
    return documents


def _negative_counts(dataset: TokenizedDataset, rows: np.ndarray) -> np.ndarray:
    """How many negatives each row has, in the shape of `rows`."""
    return dataset.negative_offsets[rows + 1] - dataset.negative_offsets[rows]
