"""A micro-batch of the plan as pixels and prompts."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from opensora.datasets.bucket import Bucket, frame_interval, sampled_fps
from opensora.datasets.config import DataConfig
from opensora.datasets.decode import DecodeError, read_frames
from opensora.datasets.draws import integer
from opensora.datasets.manifest import ClipTable
from opensora.datasets.plan import BatchPlan, MicroBatch
from opensora.datasets.transforms import cover_size, crop_origin, random_crop_origin, window_start
from opensora.utils.errors import UserError
from opensora.utils.prompt import with_suffix

MAX_TRIES = 8  # substitutes tried for one unreadable sample


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch, ready for the device. Slot i belongs to ``sample_ids[i]``, also where a substitute fills it."""

    pixels: Tensor  # (B, 3, T, H, W) uint8
    prompts: list[str]
    sample_ids: tuple[int, ...]  # as planned: what noise and every other draw of the slot is keyed by
    bucket: Bucket
    fps: Tensor  # (B,) float32 after the frame interval, 0 where unknown
    epoch: int
    weight: float  # 0: not counted
    replaced: tuple[tuple[int, int, str], ...] = ()  # (unreadable sample, its substitute, why)

    def pin_memory(self) -> "Batch":
        """The same batch with page-locked pixels; the DataLoader calls this."""
        return replace(self, pixels=self.pixels.pin_memory())


class VideoDataset(Dataset[Batch | UserError]):
    """Maps a ``MicroBatch`` to its ``Batch``; the shape never depends on whether files can be read.

    A clip that cannot be read gives its slot (pixels and caption) to another one of the same bucket, chosen by
    (seed, epoch, sample id, try). Only errors of the file count; a programming error goes through.
    """

    def __init__(self, table: ClipTable, plan: BatchPlan, cfg: DataConfig, seed: int) -> None:
        self._table = table
        self._plan = plan
        self._cfg = cfg
        self._seed = seed
        self._cache = _FrameCache(cfg.cache_mib * 2**20)

    def __getitem__(self, micro_batch: MicroBatch) -> Batch | UserError:
        """The batch, or the error that the loader raises in the training process (where one line stays one line)."""
        try:
            return self._load(micro_batch)
        except UserError as error:
            return error

    def _load(self, micro_batch: MicroBatch) -> Batch:
        bucket = micro_batch.bucket
        shape = (len(micro_batch.sample_ids), 3, bucket.frames, bucket.height, bucket.width)
        pixels = torch.empty(shape, dtype=torch.uint8)
        used: list[int] = []
        replaced: list[tuple[int, int, str]] = []
        for slot, sample_id in enumerate(micro_batch.sample_ids):
            clip, source, reason = self._read_or_replace(sample_id, micro_batch)
            pixels[slot] = torch.from_numpy(clip).permute(3, 0, 1, 2)
            used.append(source)
            if source != sample_id:
                replaced.append((sample_id, source, reason))
        rates = [sampled_fps(float(self._table.fps[source])) for source in used]
        return Batch(
            pixels=pixels,
            prompts=[self._prompt(source, fps) for source, fps in zip(used, rates, strict=True)],
            sample_ids=micro_batch.sample_ids,
            bucket=bucket,
            fps=torch.tensor(rates, dtype=torch.float32),
            epoch=micro_batch.epoch,
            weight=micro_batch.weight,
            replaced=tuple(replaced),
        )

    def _read_or_replace(self, sample_id: int, micro_batch: MicroBatch) -> tuple[np.ndarray, int, str]:
        """(frames, the sample they are of, why it is another than planned)."""
        first_reason = ""
        for source in self._candidates(sample_id, micro_batch):
            try:
                return self._read(source, micro_batch), source, first_reason
            except (DecodeError, OSError) as error:
                first_reason = first_reason or str(error)
        bucket = micro_batch.bucket
        raise UserError(
            f"data.table: {first_reason}; no substitute in bucket {bucket.resolution} x {bucket.frames} "
            f"({bucket.height}x{bucket.width}) can be read either: repair the files or take their rows out"
        )

    def _candidates(self, sample_id: int, micro_batch: MicroBatch) -> Iterator[int]:
        """The sample itself, then up to MAX_TRIES distinct others of its bucket."""
        yield sample_id
        members = self._plan.members(micro_batch)
        tried = {sample_id}
        for attempt in range(MAX_TRIES):
            if len(tried) >= len(members):
                return
            position = integer(sample_id, len(members), self._seed, micro_batch.epoch, "substitute", attempt)
            while int(members[position]) in tried:
                position = (position + 1) % len(members)
            tried.add(int(members[position]))
            yield int(members[position])

    def _read(self, sample_id: int, micro_batch: MicroBatch) -> np.ndarray:
        """(T, H, W, 3) uint8: the sample's window, scaled to cover the bucket's size and cropped."""
        bucket = micro_batch.bucket
        height, width = bucket.height, bucket.width
        interval = int(frame_interval(self._table.fps[sample_id : sample_id + 1])[0])
        key = {"seed": self._seed, "epoch": micro_batch.epoch, "sample_id": sample_id}
        start = window_start(int(self._table.num_frames[sample_id]), bucket.frames, interval, **key)
        frames = self._cache.get(
            (sample_id, start, bucket.frames, height, width),
            lambda: read_frames(
                self._table.path(sample_id),
                start,
                bucket.frames,
                interval,
                resize=lambda h, w: cover_size(h, w, height, width),
                threads=self._cfg.decode_threads,
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
        return with_suffix(caption, fps, float(self._table.motion_score[sample_id]))


class _FrameCache:
    """The most recently used windows, up to a number of bytes; what is read twice is the same either way."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._windows: OrderedDict[Hashable, np.ndarray] = OrderedDict()

    def get(self, key: Hashable, read: Callable[[], np.ndarray]) -> np.ndarray:
        if key in self._windows:
            self._windows.move_to_end(key)
            return self._windows[key]
        window = read()
        if window.nbytes <= self._limit:
            self._windows[key] = window
            self._held += window.nbytes
            while self._held > self._limit:
                self._held -= self._windows.popitem(last=False)[1].nbytes
        return window
