"""Random draws as docs/training.md states them: a function of a key, never of what was drawn before."""

import hashlib

import numpy as np
import torch
from torch import Tensor

MASK = (1 << 64) - 1


def key(*parts: int | str) -> int:
    """63 bits: BLAKE2b of 8 bytes over ``LENGTH|TYPE:VALUE`` of every part, little-endian, without its lowest bit."""
    texts = [f"{type(part).__name__}:{part}" for part in parts]
    message = "".join(f"{len(text)}|{text}" for text in texts)
    digest = hashlib.blake2b(message.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") // 2


def normal(shape: tuple[int, ...], *parts: int | str) -> Tensor:
    """Standard normal fp32, from torch's CPU generator seeded with the key."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(key(*parts)), dtype=torch.float32)


def philox(*parts: int | str) -> np.random.Generator:
    """numpy's Philox generator, seeded with the key."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))


def splitmix64(start: int, number: int) -> int:
    """Output ``number`` (from 0) of the SplitMix64 sequence that starts at ``start``; plain integers."""
    z = (start + (number + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def uniform(number: int, *parts: int | str) -> float:
    """[0, 1): the upper 53 bits of output ``number`` of the key's sequence."""
    return (splitmix64(key(*parts), number) >> 11) / 2**53


def below(limit: int, number: int, *parts: int | str) -> int:
    """An integer in [0, limit)."""
    return int(uniform(number, *parts) * limit)


def permuted(position: int, size: int, bits: int) -> int:
    """Where a permutation of range(size) keyed by ``bits`` sends a position.

    A Feistel network of four rounds on the smallest power of two that holds ``size``; what lands outside goes again.
    """
    width = (size - 1).bit_length()
    low_bits = (width + 1) // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (width - low_bits)) - 1
    while True:
        high, low = position >> low_bits, position & low_mask
        for turn in range(4):
            high ^= splitmix64(bits, low + (2 * turn << 40)) & high_mask
            low ^= splitmix64(bits, high + (2 * turn + 1 << 40)) & low_mask
        position = high << low_bits | low
        if position < size:
            return position
