"""What the routes of one web process share. Nothing that matters is in memory: another process may go on at once."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from opensora.serve.config import ServeConfig
from opensora.serve.jobs import LIVES_S, Job, JobQueue
from opensora.serve.model_info import ModelInfo
from opensora.serve.store import Store
from opensora.serve.web.auth import Keys, Origins
from opensora.serve.web.body import Budget
from opensora.serve.web.metrics import Requests
from opensora.serve.web.pictures import Pictures

THREADS, READERS = 8, 4  # that wait for the queue and the disk; that read and write references
BODIES = 8  # of the largest size, that are held at once
T = TypeVar("T")


class Service:
    """Configuration, queue, files and threads of the web process."""

    def __init__(self, cfg: ServeConfig, queue: JobQueue, store: Store) -> None:
        self.cfg, self.queue, self.store = cfg, queue, store
        self.keys = Keys(None if cfg.keys is None else Path(cfg.keys))
        self.origins = Origins(cfg)
        self.requests = Requests()
        self.pictures = Pictures(store, cfg.quota.image_pixels)
        self.body_bytes = int(cfg.quota.body_mib * 2**20)
        self.budget = Budget(BODIES * self.body_bytes)
        self.default = next(iter(cfg.models))
        self.stopping = False  # streams of events end, and clients come back to the next process
        self.streams = 0  # of events, that are open
        self._threads = ThreadPoolExecutor(THREADS, "queue")
        self._readers = ThreadPoolExecutor(READERS, "references")

    async def work(self, call: Callable[[], T]) -> T:
        """``call()`` of the queue or the disk, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def work_long(self, call: Callable[[], T]) -> T:
        """``call()`` that may read pictures, in a thread of those that may be busy for long."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, call)

    def models(self) -> dict[str, ModelInfo]:
        """What can be asked for: models of the configuration that a worker has described, the default first."""
        told = self.queue.published()
        return {name: ModelInfo.read(told[name]) for name in self.cfg.models if name in told}

    def workers(self) -> dict[str, Any]:
        """What living workers said last, by worker."""
        return dict(self.queue.workers(time.time(), LIVES_S))

    def ready_models(self) -> set[str]:
        """Models that a worker is ready to sample."""
        return {name for told in self.workers().values() if told.get("ready") for name in told.get("models", ())}

    def job(self, id: str, owner: str | None) -> Job | None:
        """None: there is none, it is another owner's, or is being removed."""
        job = self.queue.get(id, owner)
        return None if job is None or self.store.is_marked_removed(id) else job

    def close(self) -> None:
        for pool in (self._threads, self._readers):
            pool.shutdown(cancel_futures=True)
        self.pictures.close()
        self.queue.close()
