"""Hashes of clips that nobody filmed, in any number, with copies among them."""

import numpy as np

from data_pipeline.matching.box import ASKED, CROPS
from data_pipeline.matching.candidates import Prints

_HASHES, _STEP_MS = 40, 125  # of a clip of five seconds


def made_up_prints(clips: int, seed: int) -> tuple[Prints, set[tuple[int, int]]]:
    """(prints, the pairs of which one is a copy). In a clip two bits change from one hash to the next; of a tenth of
    the clips the first one is the same title; a twentieth are copies, in which two more bits are other ones."""
    rng = np.random.default_rng(seed)
    bits = np.empty((clips, _HASHES), np.uint64)
    bits[:, 0] = rng.integers(0, 2**64, clips, dtype=np.uint64)
    bits[: clips // 10, 0] = bits[0, 0]
    for number in range(1, _HASHES):
        bits[:, number] = _changed(bits[:, number - 1], rng)
    count = clips // 20
    originals, copies = rng.permutation(clips // 2)[:count], np.arange(clips - count, clips)
    bits[copies] = _changed(bits[originals], rng)
    asked = np.linspace(0, _HASHES - 1, ASKED).round().astype(np.int64)
    crops = np.stack([_changed(_changed(bits[:, asked], rng), rng) for _ in CROPS], axis=2)
    first = np.arange(clips + 1) * _HASHES
    ms = np.tile(np.arange(_HASHES) * _STEP_MS, clips)
    length = np.full(clips, _HASHES * _STEP_MS)
    prints = Prints(first, ms, bits.ravel(), first[:-1, None] + asked, crops, length)
    return prints, set(zip(originals.tolist(), copies.tolist(), strict=True))


def _changed(bits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """With two bits flipped."""
    for _ in range(2):
        bits = bits ^ (np.uint64(1) << rng.integers(0, 64, bits.shape, dtype=np.uint64))
    return bits
