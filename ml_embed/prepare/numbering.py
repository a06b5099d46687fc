"""Numbers texts in the order they are first seen, in 24 bytes of memory per distinct text.

Texts are told apart by 128-bit hashes (BLAKE2b). Two different texts share one with probability
2^-128: among 100 million texts the odds that any two do are below 2e-23.
"""

import hashlib

import numpy as np

RECENT_LIMIT = 500_000  # about 100 MB as a dict


def text_digest(encoded: bytes | memoryview, front: bytes = b"") -> bytes:
    """The 16-byte hash of a text's UTF-8 bytes, `front` before `encoded`."""
    digest = hashlib.blake2b(front, digest_size=16)
    digest.update(encoded)
    return digest.digest()


class TextNumbers:
    """Numbers distinct digests 0, 1, 2, ... in the order they are first seen.

    New digests go to a dict. When it is full they are settled: moved to arrays that are sorted by
    the digests' first halves.
    """

    def __init__(self, recent_limit: int = RECENT_LIMIT):
        self.count = 0
        self._recent_limit = recent_limit
        self._recent: dict[bytes, int] = {}
        self._first_half = np.empty(0, np.uint64)  # sorted
        self._second_half = np.empty(0, np.uint64)
        self._numbers = np.empty(0, np.int64)

    def number(self, digests: list[bytes]) -> tuple[list[int], list[int]]:
        """The number of each digest, and the positions in `digests` of those never seen before."""
        numbers = self._settled_numbers(digests)
        new = []
        for i, digest in enumerate(digests):
            if numbers[i] >= 0:
                continue
            if (number := self._recent.get(digest)) is None:
                number = self._recent[digest] = self.count
                self.count += 1
                new.append(i)
            numbers[i] = number
        if len(self._recent) >= self._recent_limit:
            self._settle()
        return numbers, new

    def _settled_numbers(self, digests: list[bytes]) -> list[int]:
        """Numbers of the settled digests, -1 for others."""
        numbers = np.full(len(digests), -1, np.int64)
        first, second = _halves(digests)
        position = np.searchsorted(self._first_half, first)
        pending = np.arange(len(digests))
        while pending.size:  # more than one turn only where first halves collide
            pending = pending[position[pending] < len(self._first_half)]
            pending = pending[self._first_half[position[pending]] == first[pending]]
            found = self._second_half[position[pending]] == second[pending]
            numbers[pending[found]] = self._numbers[position[pending[found]]]
            pending = pending[~found]
            position[pending] += 1
        return numbers.tolist()

    def _settle(self) -> None:
        first, second = _halves(list(self._recent))
        numbers = np.fromiter(self._recent.values(), np.int64, len(self._recent))
        order = np.argsort(first)
        at = np.searchsorted(self._first_half, first[order])
        self._second_half = np.insert(self._second_half, at, second[order])
        self._numbers = np.insert(self._numbers, at, numbers[order])
        self._first_half = np.insert(self._first_half, at, first[order])
        self._recent.clear()


def _halves(digests: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.frombuffer(b"".join(digests), np.dtype("<u8")).reshape(-1, 2)
    return pairs[:, 0].copy(), pairs[:, 1].copy()
