"""Batches of one rank in plan order, decoded by processes ahead of time.

Threads of this process put batches together, each with a decoding process that it alone talks to: what hangs or dies
while reading a clip is known by name, and is replaced without the others noticing.
"""

import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from queue import SimpleQueue

import torch
from torch import Tensor

from opensora.datasets import decode
from opensora.datasets.config import DataConfig
from opensora.datasets.manifest import ClipTable
from opensora.datasets.plan import BatchPlan, MicroBatch
from opensora.datasets.reader import DecoderProcess
from opensora.datasets.share import Sharing
from opensora.datasets.video import Batch, BatchReader, FeatureReader, Job
from opensora.utils.errors import UserError

_LOOK_S = 1.0  # between two looks at whether anything is read at all


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
    sharing: Sharing | None = None,
) -> Generator[Batch, None, None]:
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
    table: ClipTable, plan: BatchPlan, cfg: DataConfig, micro_batches: Iterator[MicroBatch], seed: int
) -> Generator[Batch, None, None]:
    """These micro-batches of the plan, from their files; see ``build_loader``."""
    decode.require(cfg.decoder)
    reader = BatchReader(table, cfg, seed)
    jobs = (Job(micro_batch, plan.members(micro_batch)) for micro_batch in micro_batches)
    return _ahead(reader, jobs, cfg) if cfg.workers else _here(reader, jobs)


def _stored(
    reader: FeatureReader, micro_batches: Iterator[MicroBatch], cfg: DataConfig
) -> Generator[Batch, None, None]:
    """One thread reads ahead: a store waits for the disk and does not compute."""
    if not cfg.workers:
        yield from map(reader.load, micro_batches)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="features") as thread:
        ahead: deque[Future[Batch]] = deque()
        for micro_batch in micro_batches:
            ahead.append(thread.submit(reader.load, micro_batch))
            if len(ahead) > cfg.prefetch:
                yield ahead.popleft().result()
        for future in ahead:
            yield future.result()


def _here(reader: BatchReader, jobs: Iterator[Job]) -> Generator[Batch, None, None]:
    for job in jobs:
        yield reader.load(job, _empty_pixels(job.micro_batch), decode.read_frames)


def _ahead(reader: BatchReader, jobs: Iterator[Job], cfg: DataConfig) -> Generator[Batch, None, None]:
    """Up to ``workers * prefetch`` batches are under way or ready, and no more than ``prefetch_mib`` of them."""
    processes = [DecoderProcess() for _ in range(cfg.workers)]
    idle: SimpleQueue[DecoderProcess] = SimpleQueue()
    for process in processes:
        idle.put(process)

    def load(job: Job, pixels: Tensor) -> Batch:
        process = idle.get()
        try:
            return reader.load(job, pixels, process)
        finally:
            idle.put(process)

    threads = ThreadPoolExecutor(cfg.workers, thread_name_prefix="decode")
    ahead: deque[tuple[Future[Batch], int]] = deque()
    held = 0
    following = next(jobs, None)
    try:
        while ahead or following:
            while following and len(ahead) < cfg.workers * cfg.prefetch:
                size = _pixel_bytes(following.micro_batch)
                if ahead and held + size > cfg.prefetch_mib * 2**20:
                    break
                pixels = _empty_pixels(following.micro_batch)  # here, as page-locked memory belongs to this device
                ahead.append((threads.submit(load, following, pixels), size))
                held += size
                following = next(jobs, None)
            future, size = ahead.popleft()
            yield _wait_for(future, processes, cfg.worker_timeout_s)
            held -= size
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.close()


def _wait_for(future: "Future[Batch]", processes: list[DecoderProcess], limit_s: float) -> Batch:
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


def _shape(micro_batch: MicroBatch) -> tuple[int, int, int, int, int]:
    bucket = micro_batch.bucket
    return len(micro_batch.sample_ids), 3, bucket.frames, bucket.height, bucket.width


def _pixel_bytes(micro_batch: MicroBatch) -> int:
    return torch.Size(_shape(micro_batch)).numel()


def _empty_pixels(micro_batch: MicroBatch) -> Tensor:
    return torch.empty(_shape(micro_batch), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
