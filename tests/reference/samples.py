"""Which samples make a step, and which pixels each of them is, from a clip table with one square resolution."""

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tests.reference import draws

MAX_FPS = 24.0


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A row of the table with its frames (T, H, W, 3) uint8."""

    text: str
    frames: np.ndarray
    fps: float = 0.0  # 0: unknown, as of a still
    motion: float | None = None

    @property
    def interval(self) -> int:
        """Every how many frames one is used, so that at most 24 a second remain."""
        return math.ceil(self.fps / MAX_FPS) if self.fps >= MAX_FPS else 1


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """One square resolution: its side in pixels, {frames: batch size}, and pixels per token side."""

    side: int
    batch_sizes: dict[int, int]
    multiple: int

    @property
    def lengths(self) -> list[int]:
        """Longest first: the order of buckets."""
        return sorted(self.batch_sizes, reverse=True)

    def length_of(self, clip: Clip) -> int:
        """The longest row that the clip fills; a still has the row of one frame."""
        if len(clip.frames) == 1:
            return 1
        return max(length for length in self.lengths if 1 < length <= len(clip.frames) // clip.interval)

    def kind_of(self, clip: Clip) -> int:
        """Clips of one kind fit the same rows: 0 for a still, else 1 + the rows of more than a frame that fit. Of the
        two halves (too small, large enough for the resolution) the second."""
        fitting = 0
        if len(clip.frames) > 1:
            fitting = 1 + sum(1 < length <= len(clip.frames) // clip.interval for length in self.lengths)
        return 2 * fitting + 1

    def tokens(self, length: int) -> int:
        return ((length - 1) // 4 + 1) * (self.side // self.multiple) ** 2

    def cost(self, length: int, samples: int) -> float:
        """Of a micro-batch, by the default cost model: L + L^2 / (6 d) a sample, d = 3072."""
        tokens = self.tokens(length)
        return samples * tokens + samples * tokens * tokens / (6 * 3072)


Step = tuple[int, list[tuple[int, int]]]  # epoch, (sample id, frames) of every sample
MicroBatch = tuple[int, list[int]]  # frames, sample ids


def steps(clips: list[Clip], shapes: Shapes, *, micro_batches: int, pack: int, seed: int, count: int) -> list[Step]:
    """The samples of the first ``count`` updates."""
    found: list[Step] = []
    epoch = 0
    while len(found) < count:
        batches = _in_order(_micro_batches(clips, shapes, seed, epoch), shapes, micro_batches, pack, seed, epoch)
        for step in batches:
            found.append((epoch, [(sample, length) for length, ids in step for sample in ids]))
        epoch += 1
    return found[:count]


def members(clips: list[Clip], shapes: Shapes, length: int, seed: int, epoch: int) -> list[int]:
    """The samples of a bucket: its kinds one after the other, each permuted."""
    kinds: dict[int, list[int]] = defaultdict(list)
    for sample, clip in enumerate(clips):
        kinds[shapes.kind_of(clip)].append(sample)
    found = []
    for kind, ids in sorted(kinds.items()):
        order = _bits(kind, seed, epoch, "order of a kind")
        found += [ids[draws.permuted(i, len(ids), order)] for i in range(len(ids))]
    return [sample for sample in found if shapes.length_of(clips[sample]) == length]


def _micro_batches(clips: list[Clip], shapes: Shapes, seed: int, epoch: int) -> list[MicroBatch]:
    """Of an epoch, bucket by bucket: equal cuts of a bucket's samples, which are permuted once more."""
    found = []
    for bucket, length in enumerate(shapes.lengths):
        inside, order = members(clips, shapes, length, seed, epoch), _bits(bucket, seed, epoch, "order of samples")
        mixed = [inside[draws.permuted(i, len(inside), order)] for i in range(len(inside))]
        cuts = math.ceil(len(mixed) / shapes.batch_sizes[length])
        found += [(length, mixed[cut * len(mixed) // cuts : (cut + 1) * len(mixed) // cuts]) for cut in range(cuts)]
    return found


def _in_order(
    batches: list[MicroBatch], shapes: Shapes, micro_batches: int, pack: int, seed: int, epoch: int
) -> list[list[MicroBatch]]:
    """Steps: micro-batches in random order, joined to packs, these sorted by cost and cut, and the cuts shuffled; a
    rest is the last step."""
    order = draws.key(seed, epoch, "order of micro-batches")
    mixed = [batches[draws.permuted(i, len(batches), order)] for i in range(len(batches))]
    full = len(mixed) // micro_batches * micro_batches

    def cost(joined: list[MicroBatch]) -> float:
        return sum(shapes.cost(length, len(ids)) for length, ids in joined)

    # Round by round the next cheaper micro-batches, the most expensive of them to the cheapest pack so far.
    by_cost = sorted(mixed[:full], key=lambda batch: -cost([batch]))
    size = full // pack
    packs = [[batch] for batch in by_cost[:size]]
    for first in range(size, full, size):
        packs.sort(key=cost)
        packs = [[*joined, batch] for joined, batch in zip(packs, by_cost[first : first + size], strict=True)]
    in_row = [batch for joined in sorted(packs, key=cost) for batch in joined]
    whole = [in_row[i : i + micro_batches] for i in range(0, full, micro_batches)]
    shuffle = draws.philox(seed, epoch, 0, "order of steps").permutation(len(whole))
    rest = [mixed[full:]] if full < len(mixed) else []
    return [whole[i] for i in shuffle] + rest


def substitute(clips: list[Clip], shapes: Shapes, sample: int, damaged: frozenset[int], seed: int, epoch: int) -> int:
    """The sample itself if it can be read, else the first of its bucket that can, tried in a drawn order."""
    tried = [sample]
    inside = members(clips, shapes, shapes.length_of(clips[sample]), seed, epoch)
    while tried[-1] in damaged:
        position = draws.below(len(inside), sample, seed, epoch, "substitute", len(tried) - 1)
        while inside[position] in tried:
            position = (position + 1) % len(inside)
        tried.append(inside[position])
    return tried[-1]


def _bits(number: int, seed: int, epoch: int, purpose: str) -> int:
    return draws.splitmix64(draws.key(seed, epoch, purpose), number)


def pixels(clip: Clip, sample: int, *, length: int, side: int, crop: str, seed: int, epoch: int) -> np.ndarray:
    """(T, side, side, 3) uint8: a random window in time, scaled to cover the square, and a crop of that."""
    span = (length - 1) * clip.interval + 1
    start = draws.below(max(1, len(clip.frames) - span + 1), sample, seed, epoch, "window")
    frames = clip.frames[start : start + span : clip.interval]
    height, width = frames.shape[1:3]
    scale = side / min(height, width)
    if scale != 1:
        size = (max(side, round(width * scale)), max(side, round(height * scale)))
        frames = np.stack(
            [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames]
        )
    top, left = (frames.shape[1] - side) // 2, (frames.shape[2] - side) // 2
    if crop == "random":
        top = draws.below(frames.shape[1] - side + 1, sample, seed, epoch, "crop top")
        left = draws.below(frames.shape[2] - side + 1, sample, seed, epoch, "crop left")
    return frames[:, top : top + side, left : left + side]


def prompt(clip: Clip) -> str:
    """``TEXT FPS FPS. MOTION motion score.``; parts that are unknown are left out."""
    words = [clip.text]
    if clip.fps:
        kept = clip.fps if clip.fps < MAX_FPS else math.floor(clip.fps / clip.interval)
        words.append(f"{kept:g} FPS.")
    if clip.motion is not None:
        words.append(f"{clip.motion:g} motion score.")
    return " ".join(words)
