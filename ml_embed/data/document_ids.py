"""Finds the row of a document by its id, a string: 16 bytes of memory per document.

Ids are hashed to 64 bits by a multilinear hash: two sums of byte x random 64-bit weight of its
position, the top 32 bits of each (D. Lemire and O. Kaser, "Strongly universal string hashing is
fast", 2014). Two different ids collide with probability 2^-64; among 50 million ids the odds of any
collision are 7e-5.
"""

from functools import cache

import numpy as np
import pyarrow as pa

_WEIGHT_SEEDS = (0x5EED1, 0x5EED2)


class DocumentIds:
    """The row of each id of a corpus: `add` all ids in row order, `finish`, then ask `rows_of`."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._sorted_hashes = np.empty(0, np.uint64)
        self._rows = np.empty(0, np.int64)

    def add(self, ids: pa.Array) -> None:
        """Add the ids (strings, no null) of the corpus's next rows."""
        self._parts.append(hash_strings(ids))

    def finish(self) -> np.ndarray:
        """Make `rows_of` ready, and find ids that occur more than once.

        Returns:
            (pairs, 2) int64: (the first row with an id, another row with it).
        """
        hashes = np.concatenate(self._parts) if self._parts else np.empty(0, np.uint64)
        self._parts.clear()
        self._rows = np.argsort(hashes, kind="stable")
        self._sorted_hashes = hashes[self._rows]
        repeated = np.flatnonzero(self._sorted_hashes[1:] == self._sorted_hashes[:-1]) + 1
        first = np.searchsorted(self._sorted_hashes, self._sorted_hashes[repeated], side="left")
        return np.stack([self._rows[first], self._rows[repeated]], axis=1)

    def rows_of(self, ids: pa.Array) -> np.ndarray:
        """(len(ids),) int64: the first row with each id, -1 for an unknown id. No nulls."""
        hashes = hash_strings(ids)
        position = np.searchsorted(self._sorted_hashes, hashes)
        position[position == len(self._sorted_hashes)] = 0
        return np.where(self._sorted_hashes[position] == hashes, self._rows[position], -1)


def hash_strings(strings: pa.Array) -> np.ndarray:
    """(n,) uint64 hashes of n strings without null, by their UTF-8 bytes."""
    strings = strings.cast(pa.large_string())
    if len(strings) == 0:
        return np.empty(0, np.uint64)
    _, offset_buffer, byte_buffer = strings.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[
        strings.offset : strings.offset + len(strings) + 1
    ]
    text = np.frombuffer(byte_buffer or b"", np.uint8)[offsets[0] : offsets[-1]]
    return hash_lists(text, np.diff(offsets))


def hash_lists(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(n,) uint64 hashes of n lists of integers (at least 0), which lie one after another."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    position = np.arange(len(values)) - np.repeat(ends[:-1], lengths)
    capacity = 1 << int(lengths.max(initial=1) - 1).bit_length()
    # +1 so that a value of 0 counts: "a" and "a\0" differ.
    counted = values.astype(np.uint64) + np.uint64(1)
    high, low = (
        _segment_sums(counted * _weights(seed, capacity)[position], ends) for seed in _WEIGHT_SEEDS
    )
    return (high >> np.uint64(32) << np.uint64(32)) | (low >> np.uint64(32))


def _segment_sums(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The sum of values[ends[i]:ends[i + 1]] for each i, modulo 2^64."""
    # Differences of running sums are right modulo 2^64, too.
    running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values, dtype=np.uint64)])
    return running[ends[1:]] - running[ends[:-1]]


@cache
def _weights(seed: int, capacity: int) -> np.ndarray:
    """`capacity` random weights; more weights of the same seed begin with these."""
    return np.random.Generator(np.random.PCG64(seed)).integers(
        0, 2**64, size=capacity, dtype=np.uint64
    )
