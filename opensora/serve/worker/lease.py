"""The thread of rank 0 that keeps the group's leases and says that it lives, whatever the main thread waits for."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opensora.serve.jobs import Job, JobQueue, QueueUnavailable
from opensora.utils.console import announce

TICK_S = 0.5
BEAT_S = 3.0  # between two words to the web process
HUNG = 86  # exit code of a group that stands still


def leave(code: int) -> None:
    """The main thread hangs in an exchange, and cannot be asked."""
    os._exit(code)


class Lease:
    """Renews the leases of the jobs at hand as long as the work on them moves on."""

    def __init__(
        self,
        open_queue: Callable[[], JobQueue],
        worker: str,
        lease_s: float,
        hang_s: float,
        *,
        clock: Callable[[], float] = time.time,
        leave: Callable[[int], None] = leave,
    ) -> None:
        """
        Args:
            open_queue: a connection of the thread's own.
            hang_s: longest that a step, or another part of the work, may take; then leases are kept no longer, and the
                process leaves.
        """
        self.worker, self.told = worker, dict[str, Any]()  # what a beat says, see ``JobQueue.beat``
        self._open, self._clock, self._leave = open_queue, clock, leave
        self._lease_s, self._hang_s = lease_s, hang_s
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._lost: set[str] = set()
        self._moved, self._renewed, self._beaten = clock(), clock(), 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Say that this worker is not ready any more; it is gone from the list when that last word is old."""
        self._ended.set()
        self._thread.join(timeout=10)

    def hold(self, jobs: Sequence[Job]) -> None:
        """These are worked on from now on; they were claimed a moment ago."""
        with self._lock:
            self._jobs, self._lost = {job.id: job for job in jobs}, set()
            self._moved = self._renewed = self._clock()

    def let_go(self, job: Job) -> None:
        """It is finished, or back in the queue."""
        with self._lock:
            self._jobs.pop(job.id, None)
            self._moved = self._clock()

    def moved(self) -> None:
        """A step is done, or another part of the work."""
        self._moved = self._clock()

    def lost(self) -> set[str]:
        """Ids of jobs that are another group's by now."""
        with self._lock:
            return set(self._lost)

    def say(self, told: Mapping[str, Any]) -> None:
        """Goes into the next beat, which comes at once."""
        self.told = {**self.told, **told}
        self._beaten = 0.0

    def _run(self) -> None:
        queue: JobQueue | None = None
        while not self._ended.is_set():
            try:
                queue = queue or self._open()
                self.look(queue)
            except QueueUnavailable as reason:  # leases last for several tries
                announce(f"queue: {reason}")
            self._ended.wait(TICK_S)
        if queue is not None:
            with contextlib.suppress(QueueUnavailable):  # then it counts as ready until its last word is old
                queue.beat(self.worker, {**self.told, "ready": False}, self._clock())
            queue.close()

    def look(self, queue: JobQueue) -> None:
        """What is due now."""
        now = self._clock()
        with self._lock:
            held = list(self._jobs.values())
        if held and now - self._moved > self._hang_s:
            announce(f"nothing has moved for {now - self._moved:.0f} s: this group leaves, and its jobs go to another")
            self._leave(HUNG)
            return
        if held and now - self._renewed >= self._lease_s / 4:
            lost = {job.id for job in held if not queue.renew(job, now, lease_s=self._lease_s)}
            self._renewed = now
            with self._lock:
                self._lost |= lost & set(self._jobs)
        if now - self._beaten >= BEAT_S:
            self._beaten = now
            queue.beat(self.worker, self.told, now)
