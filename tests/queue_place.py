"""Where a test's queue lies, and jobs for it."""

import uuid
from pathlib import Path
from typing import Any

from opensora.serve.config import ServeConfig
from opensora.serve.jobs import Job, JobQueue, NewJob
from opensora.serve.queues import open_queue
from opensora.serve.store import Store
from tests.postgres_server import Server

MANY = 10_000


class QueuePlace:
    """One database; every call opens it once more."""

    def __init__(self, out: Path, server: Server | None) -> None:
        self.out, self.server, self.url = out, server, ""
        if server is not None:
            self.url = server.database(f"queue_{uuid.uuid4().hex[:12]}")
        self._open: list[JobQueue] = []

    def __call__(self) -> JobQueue:
        queue = open_queue(ServeConfig(queue=self.url), Store(self.out))
        self._open.append(queue)
        return queue

    def __enter__(self) -> "QueuePlace":
        return self

    def __exit__(self, *error: object) -> None:
        for queue in self._open:
            queue.close()


def new_job(**other: Any) -> NewJob:
    told: dict[str, Any] = {
        "id": f"video_{uuid.uuid4().hex}",
        "owner": "",
        "model": "demo",
        "prompt": "a red square",
        "request": {"sampling": {"seed": 2**62 + 1, "width": 64, "height": 64, "num_frames": 9}, "neg": ""},
        "steps": 10,
        "batch_key": "like",
    }
    return NewJob(**told | other)


def added(queue: JobQueue, now: float, **other: Any) -> Job:
    return queue.add(new_job(**other), now, most=MANY, most_of_owner=MANY)


def claimed(queue: JobQueue, now: float, worker: str = "w", attempts: int = 3, lease_s: float = 60.0) -> Job:
    job = queue.claim(worker, ["demo"], now, lease_s=lease_s, attempts=attempts)
    assert job is not None, "a job waits, and none is claimed"
    return job
