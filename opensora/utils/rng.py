"""Randomness as a function of (seed, step or epoch, sample, purpose), never of call order.

Every draw of the project (noise, timesteps, dropout, crops, order) comes from a generator keyed by what the draw
is for. Ranks that share a sample therefore agree without talking, results do not depend on the layout or on the
number of workers, and a checkpoint has no generator state to save.
"""

import hashlib

import numpy as np
import torch


def derive_key(*parts: int | str) -> int:
    """A 63-bit key from integers and strings, the same on every platform and in every process.

    Parts are hashed with their types and lengths, so ``("a", "bc")`` and ``("ab", "c")`` differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = f"{type(part).__name__}:{part}"
        digest.update(f"{len(text)}|{text}".encode())
    return int.from_bytes(digest.digest(), "little") >> 1


def torch_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator for tensor draws; draw on the CPU and move, so that devices agree."""
    return torch.Generator().manual_seed(derive_key(*parts))


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """A numpy generator for scalar draws and permutations (Philox: counter-based, cheap to create)."""
    return np.random.Generator(np.random.Philox(key=derive_key(*parts)))
