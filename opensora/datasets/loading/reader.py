"""A micro-batch of the plan as pixels and prompts."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from opensora.datasets.buckets.bucket import Bucket
from opensora.datasets.config import DataConfig, parse_colour
from opensora.datasets.decode.api import DecodeError
from opensora.datasets.decode.common import ResizeToFill
from opensora.datasets.decode.process import DecoderLost, ReadFrames
from opensora.datasets.loading.feature_store import Features, FeatureStore
from opensora.datasets.loading.window import crop_origin, random_crop_origin, sampled_frames, told_fps
from opensora.datasets.plan.batch_plan import MicroBatch
from opensora.datasets.plan.counter_rng import integer
from opensora.datasets.table.manifest import ClipTable
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.prompt_suffix import with_suffix

MAX_TRIES = 8  # substitutes tried for one unreadable sample


class ReadTask(NamedTuple):
    """What the plan says about one micro-batch."""

    micro_batch: MicroBatch
    members: Sequence[int]  # ids of all samples of its bucket in its epoch: where substitutes come from


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch, ready for the device. Slot i belongs to ``sample_ids[i]``, also where a substitute fills it."""

    pixels: Tensor | None  # (B, 3, T, H, W) uint8; None where features were read in their place
    prompts: list[str]
    sample_ids: tuple[int, ...]  # as planned: what noise and every other draw of the slot is keyed by
    bucket: Bucket
    fps: Tensor  # (B,) float32 after the frame interval, 0 where unknown
    epoch: int
    weight: float  # 0: not counted
    degree: int | None = None  # processes that cut its samples; None: all that can
    replaced: tuple[tuple[int, int, str], ...] = ()  # (unreadable sample, its substitute, why)
    features: Features | None = None
    read_s: float = 0.0  # time that reading took, where several processes read at once: of each


@dataclass(frozen=True)
class PackedBatch:
    """A pack of the plan, ready for the device: batches of several buckets that become one sequence."""

    parts: tuple[Batch, ...]

    @property
    def sample_ids(self) -> tuple[int, ...]:
        return tuple(sample for part in self.parts for sample in part.sample_ids)

    @property
    def replaced(self) -> tuple[tuple[int, int, str], ...]:
        return tuple(substitute for part in self.parts for substitute in part.replaced)

    @property
    def read_s(self) -> float:
        return sum(part.read_s for part in self.parts)

    @property
    def degree(self) -> None:
        """All that can cut its samples."""

    @property
    def weight(self) -> float:
        return self.parts[0].weight


class BatchReader:
    """Reads the files of a ``ReadTask`` into its ``Batch``; the shape never depends on whether files can be read.

    A clip that cannot be read gives its slot (pixels and caption) to another one of the same bucket, chosen by
    (seed, epoch, sample id, try). Only errors of the file count; a programming error goes through. A clip whose
    decoder hung or died is read once more, and if that fails never again. Threads may share a reader.
    """

    def __init__(self, table: ClipTable, cfg: DataConfig, seed: int, *, substitutes: bool = True) -> None:
        """
        Args:
            substitutes: False: what cannot be read is grey, and stated as replaced by itself.
        """
        self._table, self._substitutes = table, substitutes
        self._cfg = cfg
        self._seed = seed
        self._cache = _FrameCache(cfg.cache_mib * 2**20)
        self._given_up: dict[int, DecoderLost] = {}

    def load(self, job: ReadTask, pixels: Tensor, read: ReadFrames) -> Batch:
        """Fill ``pixels`` (B, 3, T, H, W) uint8 with what ``read`` finds.

        Raises:
            UserError: an unreadable clip with no readable substitute in its bucket.
        """
        began = time.monotonic()
        micro_batch = job.micro_batch
        used: list[int] = []
        replaced: list[tuple[int, int, str]] = []
        target = pixels.numpy()  # numpy copies with one thread: others are at work
        for slot, sample_id in enumerate(micro_batch.sample_ids):
            clip, source, reason = self._read_or_replace(sample_id, job, read)
            target[slot] = clip.transpose(3, 0, 1, 2)
            used.append(source)
            if reason:
                replaced.append((sample_id, source, reason))
        rates = [told_fps(self._cfg, float(self._table.fps[source])) for source in used]
        return Batch(
            pixels=pixels,
            prompts=[self._prompt(source, fps) for source, fps in zip(used, rates, strict=True)],
            sample_ids=micro_batch.sample_ids,
            bucket=micro_batch.bucket,
            fps=torch.tensor(rates, dtype=torch.float32),
            epoch=micro_batch.epoch,
            weight=micro_batch.weight,
            degree=micro_batch.degree,
            replaced=tuple(replaced),
            read_s=time.monotonic() - began,
        )

    def _read_or_replace(self, sample_id: int, job: ReadTask, read: ReadFrames) -> tuple[np.ndarray, int, str]:
        """(frames, the sample they are of, why it is another than planned)."""
        first_reason = ""
        for source in self._candidates(sample_id, job):
            try:
                return self._read_again_if_lost(source, job.micro_batch, read), source, first_reason
            except (DecodeError, OSError) as error:
                first_reason = first_reason or str(error) or type(error).__name__
        bucket = job.micro_batch.bucket
        if not self._substitutes:
            return np.full((bucket.frames, bucket.height, bucket.width, 3), 128, np.uint8), sample_id, first_reason
        raise UserError(
            f"data.table: {first_reason}; no substitute in bucket {bucket.resolution} x {bucket.frames} "
            f"({bucket.height}x{bucket.width}) can be read either: repair the files or take their rows out"
        )

    def _read_again_if_lost(self, sample_id: int, micro_batch: MicroBatch, read: ReadFrames) -> np.ndarray:
        if sample_id in self._given_up:
            raise self._given_up[sample_id]
        try:
            return self._read(sample_id, micro_batch, read)
        except DecoderLost as lost:
            announce(f"sample {sample_id}: {lost}; reading it once more")
        try:
            return self._read(sample_id, micro_batch, read)
        except DecoderLost as lost:
            self._given_up[sample_id] = lost
            raise

    def _candidates(self, sample_id: int, job: ReadTask) -> Iterator[int]:
        """The sample itself, then up to MAX_TRIES distinct others of its bucket."""
        yield sample_id
        if not self._substitutes:
            return
        members, epoch = job.members, job.micro_batch.epoch
        tried = {sample_id}
        for attempt in range(MAX_TRIES):
            if len(tried) >= len(members):
                return
            position = integer(sample_id, len(members), self._seed, epoch, "substitute", attempt)
            while int(members[position]) in tried:
                position = (position + 1) % len(members)
            tried.add(int(members[position]))
            yield int(members[position])

    def _read(self, sample_id: int, micro_batch: MicroBatch, read: ReadFrames) -> np.ndarray:
        """(T, H, W, 3) uint8: the sample's window, scaled to cover the bucket's size and cropped."""
        bucket = micro_batch.bucket
        height, width = bucket.height, bucket.width
        self._table.check(sample_id, sample_id + 1)
        key = {"seed": self._seed, "epoch": micro_batch.epoch, "sample_id": sample_id}
        length, fps = int(self._table.num_frames[sample_id]), float(self._table.fps[sample_id])
        start, interval, span = sampled_frames(self._cfg, length, fps, bucket.frames, **key)
        frames = self._cache.get(
            (sample_id, start, bucket.frames, height, width),
            lambda: read(
                self._table.path(sample_id),
                start,
                bucket.frames,
                interval,
                span=span,
                resize=ResizeToFill(height, width, bilinear=self._cfg.interpolation == "bilinear"),
                threads=self._cfg.decode_threads,
                decoder=self._cfg.decoder,
                timeout_s=self._cfg.decode_timeout_s,
                background=parse_colour(self._cfg.background),
            ),
        )
        if self._cfg.crop == "random":
            top, left = random_crop_origin(frames.shape[1], frames.shape[2], height, width, **key)
        else:
            top, left = crop_origin(frames.shape[1], frames.shape[2], height, width)
        return frames[:, top : top + height, left : left + width]

    def _prompt(self, sample_id: int, fps: float) -> str:
        caption = self._table.caption(sample_id)
        if not self._cfg.prompt_suffix:
            return caption
        motion, camera = float(self._table.motion_score[sample_id]), self._table.camera_motion(sample_id)
        return with_suffix(caption, fps, motion, camera)


class FeatureReader:
    """Reads what was made of a micro-batch's files in place of the files."""

    def __init__(self, table: ClipTable, cfg: DataConfig) -> None:
        """
        Raises:
            UserError: ``features`` is no complete folder.
        """
        self._table, self._cfg = table, cfg
        self._store = FeatureStore(Path(cfg.features))

    def load(self, micro_batch: MicroBatch) -> Batch:
        """
        Raises:
            UserError: a sample that is not there, or a damaged file.
        """
        began = time.monotonic()
        ids = micro_batch.sample_ids
        for sample_id in ids:
            self._table.check(sample_id, sample_id + 1)
        return Batch(
            pixels=None,
            prompts=[self._table.caption(sample_id) for sample_id in ids],
            sample_ids=ids,
            bucket=micro_batch.bucket,
            fps=torch.tensor([told_fps(self._cfg, float(self._table.fps[i])) for i in ids], dtype=torch.float32),
            epoch=micro_batch.epoch,
            weight=micro_batch.weight,
            degree=micro_batch.degree,
            features=self._store.read(micro_batch),
            read_s=time.monotonic() - began,
        )


class _FrameCache:
    """The most recently used windows, up to a number of bytes; what is read twice is the same either way."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._windows: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._guard = threading.Lock()

    def get(self, key: Hashable, read: Callable[[], np.ndarray]) -> np.ndarray:
        """What is kept, or what ``read`` gives; that may lie in memory which its next call writes to."""
        with self._guard:
            if key in self._windows:
                self._windows.move_to_end(key)
                return self._windows[key]
        window = read()
        if window.nbytes > self._limit:
            return window
        window = window.copy()
        with self._guard:
            if key not in self._windows:  # another thread may have read the same meanwhile
                self._held += window.nbytes
            self._windows[key] = window
            while self._held > self._limit:
                self._held -= self._windows.popitem(last=False)[1].nbytes
        return window
