"""Keyed random numbers for whole columns of sample ids: no state, no order, no loop.

A draw is a hash of (key, sample id), where the key is derived from (seed, epoch, purpose). The hash is SplitMix64
(Steele, Lea and Flood 2014) read at position ``sample id`` of the sequence that starts at the key.
"""

import numpy as np

from opensora.utils.rng import derive_key

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniform(sample_ids: np.ndarray, *key: int | str) -> np.ndarray:
    """(n,) float64 in [0, 1), one per sample id, independent between keys."""
    state = sample_ids.astype(np.uint64)
    state += np.uint64(1)
    state *= _GAMMA
    state += np.uint64(derive_key(*key))
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)) * 2.0**-53


def integer(sample_id: int, below: int, *key: int | str) -> int:
    """One integer in [0, below) for one sample id."""
    return int(uniform(np.array([sample_id]), *key)[0] * below)
