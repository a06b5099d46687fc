"""Which rows of a dataset are trained on, and which are held out for validation.

The split never changes in a run: it follows from seed and data. In retrieval data the positive
document decides, by a hash: all rows of a document are held out, or none is. Else a document that
was trained on would be searched for in validation. For the same reason a held-out row whose query
is also trained on is used for neither.
"""

from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np

from ml_embed.config import Task
from ml_embed.data.random import Permutation, key_hash, mix
from ml_embed.data.store import TokenizedDataset
from ml_embed.files.arrays import blocks

_ROWS_AT_ONCE = 2**20
_HASHES = 2**64
_NO_ROWS = np.empty(0, np.int64)


@dataclass(frozen=True)
class Split:
    """The rows of a dataset: trained on, held out, or left out of both."""

    order: Permutation
    """of the rows that are not in `left_out`"""
    skipped: int
    """how many places of `order` are held out; training has the rest of them"""
    left_out: np.ndarray
    """ascending rows, held out or not, that have no place in `order`"""
    held_out: np.ndarray
    """rows that validation uses, in its order"""

    @property
    def train_rows(self) -> int:
        return self.order.size - self.skipped

    @property
    def dropped_rows(self) -> int:
        """How many rows are used for nothing."""
        return max(0, len(self.left_out) - len(self.held_out))

    def training_rows(self, places: np.ndarray) -> np.ndarray:
        """(n,) rows at some places of training's own order, 0 to train_rows - 1."""
        numbers = self.order(self.skipped + places)
        return numbers + np.searchsorted(self._shifts, numbers, side="right")

    @cached_property
    def _shifts(self) -> np.ndarray:
        """A number i is the row i + k, where k of these are at most i."""
        return self.left_out - np.arange(len(self.left_out))


_SPLITS = WeakKeyDictionary[TokenizedDataset, dict[tuple[Task, float, int], Split]]()
"""of datasets that are open: the plan, the languages and the schedule ask for the same"""


def split_dataset(dataset: TokenizedDataset, task: Task, fraction: float, seed: int) -> Split:
    """Hold out about `fraction` of the rows, never all of them; 0 = none."""
    known = _SPLITS.setdefault(dataset, {})
    key = task, fraction, seed
    if key not in known:
        known[key] = _split(dataset, *key)
    return known[key]


def _split(dataset: TokenizedDataset, task: Task, fraction: float, seed: int) -> Split:
    rows = dataset.num_rows
    wanted = min(int(rows * fraction + 0.5), rows - 1)
    if task == "retrieval" and wanted:
        return _split_by_document(dataset, wanted, seed)
    return random_split(dataset.name, rows, wanted, seed)


def random_split(name: str, rows: int, valid_rows: int, seed: int) -> Split:
    """Hold out `valid_rows` of `rows` rows, whatever they hold."""
    order = Permutation(rows, seed, "split", name)
    return Split(order, valid_rows, _NO_ROWS, order(np.arange(valid_rows)))


def hold_out_all(name: str, rows: int, seed: int) -> Split:
    """Hold out every row of data that is there for validation."""
    return random_split(name, rows, rows, seed)


def _split_by_document(dataset: TokenizedDataset, wanted: int, seed: int) -> Split:
    left_out = _rows_of_some_documents(dataset, wanted, key_hash(seed, "held out"))
    trained = _queries_of_others(dataset, left_out)
    held_out = left_out[~trained[dataset.query_numbers[left_out]]]
    order = Permutation(dataset.num_rows - len(left_out), seed, "split", dataset.name)
    shuffled = held_out
    if len(held_out):
        shuffled = held_out[
            Permutation(len(held_out), seed, "held out", dataset.name)(np.arange(len(held_out)))
        ]
    return Split(order, 0, left_out, shuffled)


def _rows_of_some_documents(dataset: TokenizedDataset, wanted: int, key: int) -> np.ndarray:
    """Ascending: all rows of the documents with the smallest hashes, at most `wanted` rows.

    A document that has more rows than that is passed over.
    """
    share = min(1.0, 2 * wanted / dataset.num_rows)
    while True:
        rows, hashes = _rows_below(dataset, key, share)
        _, document, count = np.unique(hashes, return_inverse=True, return_counts=True)
        fits = count <= wanted
        total = np.cumsum(count * fits)
        if share == 1 or (len(total) and total[-1] >= wanted):
            return rows[(fits & (total <= wanted))[document]]
        share = min(1.0, 4 * share)


def _rows_below(dataset: TokenizedDataset, key: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose document's hash lies in the first `share` of all hashes, and those hashes."""
    bound = np.uint64(min(int(share * _HASHES), _HASHES - 1))
    found = []
    for block in blocks(dataset.num_rows, _ROWS_AT_ONCE):
        hashes = mix(dataset.document_hashes[dataset.passage_documents[block]], key)
        below = np.flatnonzero(hashes <= bound)
        found.append((block.start + below, hashes[below]))
    rows, hashes = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return rows, hashes


def _queries_of_others(dataset: TokenizedDataset, rows: np.ndarray) -> np.ndarray:
    """(distinct queries,) bool: which stand in a row that is not among `rows`, ascending."""
    found = np.zeros(len(dataset.positive_offsets) - 1, bool)
    for block in blocks(dataset.num_rows, _ROWS_AT_ONCE):
        first, last = np.searchsorted(rows, (block.start, block.stop))
        found[np.delete(dataset.query_numbers[block], rows[first:last] - block.start)] = True
    return found
