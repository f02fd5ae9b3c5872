"""Keyed random numbers for whole columns: no state, no order, no loop.

A draw is a hash of (key, number), where the key is derived from (seed, epoch, purpose). The hash is SplitMix64
(Steele, Lea and Flood 2014) read at position ``number`` of the sequence that starts at the key.
"""

import numpy as np

from opensora.utils.rng import derive_key

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ROUNDS = 4  # each changes both halves; fewer leave traces in permutations of a few elements


def bits(numbers: np.ndarray, *key: int | str) -> np.ndarray:
    """(n,) uint64, one hash per number, independent between keys."""
    return _hash(numbers.astype(np.uint64), np.uint64(derive_key(*key)))


def uniform(sample_ids: np.ndarray, *key: int | str) -> np.ndarray:
    """(n,) float64 in [0, 1), one per sample id, independent between keys."""
    return (bits(sample_ids, *key) >> np.uint64(11)) * 2.0**-53


def integer(sample_id: int, below: int, *key: int | str) -> int:
    """One integer in [0, below) for one sample id."""
    return int(uniform(np.array([sample_id]), *key)[0] * below)


def permuted(positions: np.ndarray, sizes: np.ndarray | int, keys: np.ndarray | int) -> np.ndarray:
    """(n,) int64: where a permutation of range(size), one for each key, sends each position. O(1) memory per element.

    A Feistel network on the smallest power of two that holds ``size``, walked until it lands inside (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002): less than two walks on average.

    Args:
        positions: (n,) integers, 0 <= position < size.
        sizes, keys: (n,) or one for all; a key is 64 random bits.
    """
    value = positions.astype(np.uint64)
    size = np.broadcast_to(np.asarray(sizes, dtype=np.uint64), value.shape)
    key = np.broadcast_to(np.asarray(keys, dtype=np.uint64), value.shape)
    width = np.frexp(size - np.uint64(1))[1].astype(np.uint64)  # bits of size - 1
    low = (width + np.uint64(1)) >> np.uint64(1)
    outside = slice(None) if len(value) else np.zeros(0, dtype=np.int64)
    while True:
        value[outside] = _feistel(value[outside], key[outside], low[outside], (width - low)[outside])
        outside = np.flatnonzero(value >= size)
        if not len(outside):
            return value.astype(np.int64)


def _feistel(value: np.ndarray, key: np.ndarray, low_bits: np.ndarray, high_bits: np.ndarray) -> np.ndarray:
    """A keyed bijection on [0, 2^(low_bits + high_bits)); the halves may differ in size, so they change in turn."""
    one = np.uint64(1)
    low_mask, high_mask = (one << low_bits) - one, (one << high_bits) - one
    high, low = value >> low_bits, value & low_mask
    for r in range(_ROUNDS):
        # Round numbers stand above the halves, which have at most 32 bits: no two calls share a hash.
        high = high ^ (_hash(low + np.uint64((2 * r) << 40), key) & high_mask)
        low = low ^ (_hash(high + np.uint64((2 * r + 1) << 40), key) & low_mask)
    return high << low_bits | low


def _hash(numbers: np.ndarray, key: np.ndarray | np.uint64) -> np.ndarray:
    state = numbers + np.uint64(1)
    state *= _GAMMA
    state += key
    state ^= state >> np.uint64(30)
    state *= _MIX_1
    state ^= state >> np.uint64(27)
    state *= _MIX_2
    state ^= state >> np.uint64(31)
    return state
