"""Random numbers and permutations that depend on a key alone, not on what was drawn before.

They are the same on every process and after a resume. A key is any sequence of integers and
strings, e.g. (seed, "order", epoch). A permutation of any length takes no memory and no time to
prepare, so a resumed run starts at any step at once.
"""

import hashlib
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

ROUNDS = 6
"""of the Feistel network that makes permutations"""
_MASK = (1 << 64) - 1
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTOR_1, _FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@lru_cache(maxsize=1024, typed=True)  # every step uses its epoch's keys
def key_hash(*key: int | str) -> int:
    """A 64-bit integer that depends on every part of the key."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(values: np.ndarray, key: int | np.ndarray) -> np.ndarray:
    """A 64-bit hash of (key, integer) for each integer of an array; one key for all, or as many."""
    # Sums of arrays wrap around without a warning.
    added = key if isinstance(key, np.ndarray) else np.uint64(key & _MASK)
    return scramble(values.astype(np.uint64) + added)


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

    def __init__(self, size: int, *key: int | str):
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._half = np.uint64((bits + 1) // 2)
        self._keys = [key_hash(*key, "round", i) for i in range(ROUNDS)]

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
        return _feistel(values, self._half, self._keys)


def permuted(positions: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """What stands at each position of a random order of its own: of `sizes` numbers, by its key.

    As `Permutation`, for many short orders at once. All arrays are (n,), keys of uint64.
    """
    # frexp: the number of bits, exactly, of numbers below 2^53
    bits = np.maximum(2, np.frexp((sizes - 1).astype(np.float64))[1]).astype(np.uint64)
    half, sizes = (bits + np.uint64(1)) // np.uint64(2), sizes.astype(np.uint64)
    rounds = np.stack([mix(keys, key_hash("round", i)) for i in range(ROUNDS)])
    values = positions.astype(np.uint64)
    assert (values < sizes).all()
    walking = np.arange(len(values))
    while len(walking):
        values[walking] = _feistel(values[walking], half[walking], rounds[:, walking])
        walking = walking[values[walking] >= sizes[walking]]
    return values.astype(np.int64)


def _feistel(
    values: np.ndarray, half: np.uint64 | np.ndarray, keys: Iterable[int | np.ndarray]
) -> np.ndarray:
    """Encrypt integers of 2 x `half` bits; half and each round's key are one for all, or (n,)."""
    low_mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & low_mask
    for key in keys:
        left, right = right, left ^ (mix(right, key) & low_mask)
    return (left << half) | right
