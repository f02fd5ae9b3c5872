"""A process that a test of the queue kills: ``python -m tests.queue_process add|work OUT URL NAME``."""

import sys
import time
import uuid

from opensora.serve.config import ServeConfig
from opensora.serve.jobs import JobQueue
from opensora.serve.queues import open_queue
from opensora.serve.store import Store
from tests.queue_place import added

LEASE_S = 2.0


def add(queue: JobQueue, name: str) -> None:
    """Without end; a line per job, once it is promised."""
    while True:
        print(added(queue, time.time(), owner=name).id, flush=True)


def work(queue: JobQueue, name: str) -> None:
    """Until all jobs are finished; a line per job that this process has finished, as it was told."""
    me = f"{name}-{uuid.uuid4().hex[:8]}"
    while any(state in ("queued", "running") for _, state in queue.counts()):
        job = queue.claim(me, ["demo"], time.time(), lease_s=LEASE_S, attempts=1000)
        if job is None:
            time.sleep(0.05)
            continue
        queue.report(job, time.time(), step=1, progress=50, batch=1)
        if queue.finish(job, time.time(), "completed", result={"worker": me, "attempt": job.attempt}):
            print(job.id, me, job.attempt, flush=True)


if __name__ == "__main__":
    what, out, url, name = sys.argv[1:]
    {"add": add, "work": work}[what](open_queue(ServeConfig(queue=url), Store(out)), name)
