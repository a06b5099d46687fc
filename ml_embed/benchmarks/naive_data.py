"""A naive data path, to compare with: lists of Python integers, a dict of ids, padded batches.

Letters: N texts, S length of the longest.
"""

import random
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor


class NaiveDataset:
    """Both parquet files of a dataset as Python objects; the corpus is a dict of id to tokens."""

    def __init__(self, folder: Path, name: str):
        corpus = pq.read_table(folder / f"{name}_corpus.parquet").column("input_ids").to_pylist()
        self.corpus = {f"{name}-{i}": ids for i, ids in enumerate(corpus)}
        rows = pq.read_table(folder / f"{name}_query.parquet").to_pylist()
        self.rows = [
            (
                row["query_input_ids"],
                f"{name}-{row['passage_doc_id']}",
                [f"{name}-{i}" for i in row["negative_doc_ids"]],
            )
            for row in rows
        ]

    def collate(
        self,
        rows: list[int],
        negatives: list[list[int]] | None,
        count: int,
        max_length: int,
        eos_id: int,
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(ids, mask), each (N, S), of the queries, and of the passages followed by the negatives.

        Args:
            rows: row numbers.
            negatives: which of its own negatives each row uses; None draws them.
            count: how many to draw.
            max_length: tokens of a text.
            eos_id: last token of a cut text, and padding.
        """
        queries, documents, drawn = [], [], []
        for number, row in enumerate(rows):
            query, passage, own = self.rows[row]
            places = (
                random.sample(range(len(own)), count) if negatives is None else negatives[number]
            )
            queries.append(cut(query, max_length, eos_id))
            documents.append(cut(self.corpus[passage], max_length, eos_id))
            drawn += [cut(self.corpus[own[place]], max_length, eos_id) for place in places]
        return pad(queries, eos_id), pad(documents + drawn, eos_id)


def cut(ids: list[int], max_length: int, eos_id: int) -> list[int]:
    """A text's ids, or its first `max_length` ids with the last one replaced by EOS."""
    return ids if len(ids) <= max_length else [*ids[: max_length - 1], eos_id]


def pad(texts: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(N, S) int64 ids and mask."""
    longest = max(map(len, texts))
    ids = [text + [pad_id] * (longest - len(text)) for text in texts]
    mask = [[1] * len(text) + [0] * (longest - len(text)) for text in texts]
    return torch.tensor(ids), torch.tensor(mask)
