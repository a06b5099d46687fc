"""Random numbers and permutations that depend on a key alone, not on what was drawn before.

They are the same on every process and after a resume. A key is any sequence of integers and
strings, e.g. (seed, "order", epoch). A permutation of any length takes no memory and no time to
prepare, so a resumed run starts at any step at once.
"""

import hashlib
from functools import lru_cache

import numpy as np

_MASK = (1 << 64) - 1
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTOR_1, _FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@lru_cache(maxsize=1024, typed=True)  # every step uses its epoch's keys
def key_hash(*key: int | str) -> int:
    """A 64-bit integer that depends on every part of the key."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(values: np.ndarray, key: int) -> np.ndarray:
    """A 64-bit hash of (key, integer) for each integer of an array."""
    # Sums of arrays wrap around without a warning.
    return scramble(values.astype(np.uint64) + np.uint64(key & _MASK))


def scramble(x: np.ndarray) -> np.ndarray:
    """Hash each uint64 of an array in place: SplitMix64's finaliser (Steele et al. 2014)."""
    x ^= x >> _SHIFT_1
    x *= _FACTOR_1
    x ^= x >> _SHIFT_2
    x *= _FACTOR_2
    x ^= x >> _SHIFT_3
    return x


def uniform(*key: int | str) -> float:
    """A number in [0, 1), uniformly distributed over keys."""
    return (key_hash("uniform", *key) >> 11) / (1 << 53)


class Permutation:
    """A random order of the numbers 0 to size - 1, computed only at the positions asked for.

    A balanced Feistel network (Luby and Rackoff, 1988) on the smallest even number of bits that
    holds `size`. Results outside the range are encrypted again until they fall inside ("cycle
    walking"), under four times on average.
    """

    ROUNDS = 6

    def __init__(self, size: int, *key: int | str):
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._half = np.uint64((bits + 1) // 2)
        self._low_mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = [key_hash(*key, "round", i) for i in range(self.ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """(n,) positions -> (n,) int64: the numbers that stand there."""
        values = np.asarray(positions, dtype=np.int64).astype(np.uint64)
        assert (values < self.size).all()
        values = self._encrypt(values)
        outside = values >= self.size
        while outside.any():
            values[outside] = self._encrypt(values[outside])
            outside = values >= self.size
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._low_mask
        for key in self._keys:
            left, right = right, left ^ (mix(right, key) & self._low_mask)
        return (left << self._half) | right
