"""Batches of one rank in plan order, decoded by worker processes ahead of time."""

import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from opensora.datasets.config import DataConfig
from opensora.datasets.manifest import ClipTable
from opensora.datasets.plan import BatchPlan, MicroBatch
from opensora.datasets.video import Batch, VideoDataset
from opensora.utils.errors import UserError

_IGNORED_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")


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
) -> Generator[Batch, None, None]:
    """The batches of ``plan.assign(step, dp_rank, dp_degree)`` for step in [start_step, stop_step), in that order.

    What they hold depends on nothing else: not on the number of workers, nor on where a run was resumed. Closing the
    iterator ends the workers.

    Raises:
        UserError: an unreadable clip with no readable substitute in its bucket.
    """
    dataset = VideoDataset(table, plan, cfg, seed)
    sampler = _PlanSampler(plan, range(start_step, stop_step), dp_rank, dp_degree)
    workers: dict[str, Any] = {}
    if cfg.workers > 0:
        workers = {
            "num_workers": cfg.workers,
            "prefetch_factor": cfg.prefetch,
            "timeout": cfg.worker_timeout_s,
            "persistent_workers": True,
            "worker_init_fn": _start_worker,
        }
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the loader draws a seed nobody reads: not from the global generator
        **workers,
    )
    return _batches(loader)


class _PlanSampler(Sampler[MicroBatch]):
    """Asks the plan step by step; a run of any length costs nothing up front."""

    def __init__(self, plan: BatchPlan, steps: range, dp_rank: int, dp_degree: int) -> None:
        self._plan = plan
        self._steps = steps
        self._rank = dp_rank
        self._degree = dp_degree

    def __iter__(self) -> Iterator[MicroBatch]:
        for step in self._steps:
            yield from self._plan.assign(step, self._rank, self._degree)


def _start_worker(worker_id: int) -> None:
    """The training process decides when workers end: a signal to the whole group must not take them away before the
    checkpoint is written. One thread each: the processes are the parallelism."""
    torch.set_num_threads(1)
    for name in _IGNORED_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Workers start with these signals blocked, so that one that comes before ``_start_worker`` does not end them; the
    training process gets it right afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [getattr(signal, name) for name in _IGNORED_SIGNALS])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _batches(loader: "DataLoader[Batch | UserError]") -> Generator[Batch, None, None]:
    with _signals_held():
        iterator = iter(loader)
    try:
        for item in iterator:
            if isinstance(item, UserError):
                raise item
            yield item
    finally:
        _end_workers(iterator)


def _end_workers(iterator: Any) -> None:
    """Ask the workers to end, then kill: they ignore SIGTERM, and one that hangs in a decoder would block the exit."""
    processes = list(getattr(iterator, "_workers", ()))
    if not processes:
        return
    iterator._shutdown_workers()
    for process in processes:
        if process.is_alive():
            process.kill()
