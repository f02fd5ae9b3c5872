"""Batches of one rank in plan order, decoded by processes ahead of time.

Threads of this process put batches together, each with a decoding process that it alone talks to: what hangs or dies
while reading a clip is known by name, and is replaced without the others noticing.
"""

import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from math import prod
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from opensora.datasets.config import DataConfig
from opensora.datasets.decode import api
from opensora.datasets.decode.process import DecoderProcess, ReadFrames
from opensora.datasets.loading.reader import Batch, BatchReader, FeatureReader, PackedBatch, ReadTask
from opensora.datasets.plan.batch_plan import BatchPlan, MicroBatch, PackedSequence
from opensora.datasets.plan.dynamic_sp import SequenceSharing
from opensora.datasets.table.manifest import ClipTable
from opensora.utils.errors import UserError

_LOOK_S = 1.0  # between two looks at whether anything is read at all
AnyBatch = Batch | PackedBatch


class LoadTask(NamedTuple):
    """What one worker reads: a micro-batch, or all parts of a pack."""

    jobs: tuple[ReadTask, ...]
    is_pack: bool

    def run(self, reader: BatchReader, pixels: list[Tensor], read: ReadFrames) -> AnyBatch:
        parts = tuple(reader.load(job, room, read) for job, room in zip(self.jobs, pixels, strict=True))
        return PackedBatch(parts) if self.is_pack else parts[0]

    def empty_pixels(self) -> list[Tensor]:
        pinned = torch.cuda.is_available()
        return [torch.empty(shape, dtype=torch.uint8, pin_memory=pinned) for shape in self._shapes()]

    def pixel_bytes(self) -> int:
        return sum(map(prod, self._shapes()))

    def _shapes(self) -> list[tuple[int, ...]]:
        """(B, 3, T, H, W) of every part."""
        parts = [(len(job.micro_batch.sample_ids), job.micro_batch.bucket) for job in self.jobs]
        return [(samples, 3, bucket.frames, bucket.height, bucket.width) for samples, bucket in parts]


def build_loader(
    table: ClipTable,
    plan: BatchPlan,
    cfg: DataConfig,
    *,
    start_step: int,
    stop_step: int,
    dp_rank: int,
    dp_degree: int,
    seed: int,
    sharing: SequenceSharing | None = None,
) -> Generator[AnyBatch, None, None]:
    """The batches of ``plan.assign(step, dp_rank, dp_degree, sharing)`` for step in [start_step, stop_step), in order.

    What they hold depends on nothing else: not on the number of workers, nor on where a run was resumed. Closing the
    iterator ends the workers.

    Raises:
        UserError: a decoder that is not installed, or features that are not there; later, an unreadable clip with no
            readable substitute in its bucket, or nothing read for ``worker_timeout_s``.
    """
    # Asks the plan step by step, in this thread only; a run of any length costs nothing up front.
    micro_batches = (m for step in range(start_step, stop_step) for m in plan.assign(step, dp_rank, dp_degree, sharing))
    if cfg.features:
        return _stored(FeatureReader(table, cfg), micro_batches, cfg)
    return read_batches(table, plan, cfg, micro_batches, seed)


def read_batches(
    table: ClipTable,
    plan: BatchPlan,
    cfg: DataConfig,
    micro_batches: Iterator[MicroBatch | PackedSequence],
    seed: int,
    *,
    substitutes: bool = True,
) -> Generator[AnyBatch, None, None]:
    """These micro-batches of the plan, from their files; see ``build_loader``. ``substitutes``: of ``BatchReader``."""
    api.require(cfg.decoder)
    reader = BatchReader(table, cfg, seed, substitutes=substitutes)
    loads = (
        LoadTask(tuple(ReadTask(m, plan.members(m)) for m in batch.parts), isinstance(batch, PackedSequence))
        for batch in micro_batches
    )
    return _ahead(reader, loads, cfg) if cfg.workers else _here(reader, loads)


def _stored(
    reader: FeatureReader, micro_batches: Iterator[MicroBatch | PackedSequence], cfg: DataConfig
) -> Generator[AnyBatch, None, None]:
    """One thread reads ahead: a store waits for the disk and does not compute."""

    def load(micro_batch: MicroBatch | PackedSequence) -> AnyBatch:
        parts = [reader.load(part) for part in micro_batch.parts]
        return PackedBatch(tuple(parts)) if isinstance(micro_batch, PackedSequence) else parts[0]

    if not cfg.workers:
        yield from map(load, micro_batches)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="features") as thread:
        ahead: deque[Future[AnyBatch]] = deque()
        for micro_batch in micro_batches:
            ahead.append(thread.submit(load, micro_batch))
            if len(ahead) > cfg.prefetch:
                yield ahead.popleft().result()
        for future in ahead:
            yield future.result()


def _here(reader: BatchReader, loads: Iterator[LoadTask]) -> Generator[AnyBatch, None, None]:
    for load in loads:
        yield load.run(reader, load.empty_pixels(), api.read_frames)


def _ahead(reader: BatchReader, loads: Iterator[LoadTask], cfg: DataConfig) -> Generator[AnyBatch, None, None]:
    """Up to ``workers * prefetch`` batches are under way or ready, and no more than ``prefetch_mib`` of them."""
    processes = [DecoderProcess() for _ in range(cfg.workers)]
    idle: SimpleQueue[DecoderProcess] = SimpleQueue()
    for process in processes:
        idle.put(process)

    def run(load: LoadTask, pixels: list[Tensor]) -> AnyBatch:
        process = idle.get()
        try:
            return load.run(reader, pixels, process)
        finally:
            idle.put(process)

    threads = ThreadPoolExecutor(cfg.workers, thread_name_prefix="decode")
    ahead: deque[tuple[Future[AnyBatch], int]] = deque()
    held = 0
    following = next(loads, None)
    try:
        while ahead or following:
            while following and len(ahead) < cfg.workers * cfg.prefetch:
                size = following.pixel_bytes()
                if ahead and held + size > cfg.prefetch_mib * 2**20:
                    break
                pixels = following.empty_pixels()  # here, as page-locked memory belongs to this device
                ahead.append((threads.submit(run, following, pixels), size))
                held += size
                following = next(loads, None)
            future, size = ahead.popleft()
            yield _wait_for(future, processes, cfg.worker_timeout_s)
            held -= size
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.close()


def _wait_for(future: "Future[AnyBatch]", processes: list[DecoderProcess], limit_s: float) -> AnyBatch:
    """The batch, however long it takes as long as clips are read."""
    while True:
        try:
            return future.result(timeout=min(_LOOK_S, limit_s))
        except NotYet:
            if time.monotonic() - max(process.since for process in processes) > limit_s:
                files = ", ".join(process.reading for process in processes if process.reading)
                raise UserError(
                    f"data.worker_timeout_s={limit_s:g}: nothing was read in this time; at work: {files or 'nothing'}"
                ) from None
