"""Rank 0's side of a group: it claims jobs, says where they stand, and writes what became of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from opensora.serve.config import WorkersConfig
from opensora.serve.jobs import CANCELLED, Job, JobError, JobQueue, QueueUnavailable, State
from opensora.serve.worker.lease import Lease
from opensora.serve.worker.peers import Flag
from opensora.utils.console import announce

T = TypeVar("T")
NOTHING_S = 2.0  # longest silence between processes of a group, which end where they wait too long
POLL_S = 0.1  # between two looks for a job
LIKE_S = 0.02  # between two looks for more of a batch
LOOK_S = 1.0  # between two looks whether a job is cancelled, which come with a word on where it stands
TEXT, STEPS, DECODED = 2, 90, 98  # percent when text is read, all steps are done, pixels are there
RETRIES = 5  # of what must be written, while the lease lasts


def plain_job(job: Job) -> dict[str, Any]:
    """For the other processes."""
    return asdict(job)


def read_job(told: Mapping[str, Any]) -> Job:
    error = JobError(**told["error"]) if told["error"] else None
    return Job(**{**told, "references": tuple(told["references"]), "error": error})


class Desk:
    """Jobs of this group, from their claim to their end."""

    def __init__(
        self,
        queue: JobQueue,
        lease: Lease,
        models: Sequence[str],
        cfg: WorkersConfig,
        stopped: Callable[[], float | None],
        most: Callable[[Job], int],
    ) -> None:
        """
        Args:
            stopped: when this process was asked to stop, by ``time.monotonic``; None: it was not.
            most: clips that may be made together with a job.
        """
        self.queue, self.lease = queue, lease
        self._models, self._cfg, self._stopped, self._most = list(models), cfg, stopped, most
        self._looked = 0.0
        self._shown: dict[str, int] = {}  # percent, which never falls within an attempt
        self._ended: set[str] = set()  # of the batch at hand: no word on them is ours any more
        self.began: float | None = None  # of the batch at hand

    def order(self) -> dict[str, Any]:
        """What all processes are to do next; comes within ``NOTHING_S``."""
        until, none = time.monotonic() + NOTHING_S, list[Job]()
        while time.monotonic() < until:
            if self._stopped() is not None:
                return {"do": "stop"}
            if jobs := self._tried(none, self._claim):
                return {"do": "sample", "jobs": [plain_job(job) for job in jobs]}
            time.sleep(POLL_S)
        return {"do": "nothing"}

    def _claim(self) -> list[Job]:
        terms: dict[str, Any] = {"lease_s": self._cfg.lease_s}
        attempts = self._cfg.attempts
        first = self.queue.claim(self.lease.worker, self._models, time.time(), attempts=attempts, **terms)
        if first is None:
            return []
        self._shown, self._ended, self._looked, self.began = {}, set(), 0.0, time.time()
        jobs = [first]
        self.lease.hold(jobs)
        self._gather(jobs, self._most(first), terms)
        self.lease.hold(jobs)
        return jobs

    def _gather(self, jobs: list[Job], most: int, terms: dict[str, Any]) -> None:
        """Others of the first one's kind, which may take a moment while others wait."""
        until, none = time.monotonic() + self._cfg.batch_wait_s, list[Job]()
        while len(jobs) < most:
            terms["most"] = most - len(jobs)
            jobs += self._tried(none, self.queue.claim_like, self.lease.worker, jobs[0], time.time(), **terms)
            if time.monotonic() >= until or not self._others_wait():
                return
            time.sleep(LIKE_S)

    def _others_wait(self) -> bool:
        found = self._tried(dict[tuple[str, State], int](), self.queue.counts)
        return any(count for (_, state), count in found.items() if state == "queued")

    def step(self, jobs: Sequence[Job], done: int, total: int) -> Flag:
        """Between two steps: where the jobs stand is told, and whether anybody wants them is asked, now and then."""
        self.lease.moved()
        now, stopped = time.monotonic(), self._stopped()
        if stopped is not None and now - stopped >= self._cfg.grace_s:
            return Flag.PUT_BACK
        if done and done < total and now - self._looked < LOOK_S:
            return Flag.GO
        self._looked = now
        wanted = self.wanted(jobs)
        self.report(wanted, TEXT + (STEPS - TEXT) * done // total, step=done, batch=len(jobs))
        return Flag.GO if wanted else Flag.CANCELLED

    def wanted(self, jobs: Sequence[Job]) -> list[Job]:
        """Those that nobody has cancelled, and that are still this group's; the others are ended."""
        unwanted = self._tried(set[str](), self.queue.cancel_requested, jobs) | self.lease.lost()
        for job in jobs:
            if job.id in unwanted and job.id not in self._ended:
                self.finish(job, "cancelled", error=JobError(code=CANCELLED, message="the job was cancelled"))
        return [job for job in jobs if job.id not in unwanted and job.id not in self._ended]

    def report(self, jobs: Sequence[Job], progress: int, *, step: int, batch: int) -> None:
        for job in jobs:
            shown = self._shown[job.id] = max(progress, self._shown.get(job.id, 0))
            self._tried(True, self.queue.report, job, time.time(), step=step, progress=shown, batch=batch)

    def finish(
        self, job: Job, state: State, *, result: Mapping[str, Any] | None = None, error: JobError | None = None
    ) -> bool:
        """False: the job was another group's by now, or the queue could not be written."""
        self._ended.add(job.id)
        for turn in range(RETRIES):
            try:
                written = self.queue.finish(job, time.time(), state, result=result, error=error)
                break
            except QueueUnavailable as reason:
                announce(f"{job.id}: its end could not be written ({reason})")
                written = False
                time.sleep(2**turn * POLL_S)
        self.lease.let_go(job)
        announce(
            f"{job.id}: {state}{f', {error.code}' if error else ''}{'' if written else ', which is not ours to say'}"
        )
        return written

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Jobs that another group is to make from their beginning."""
        for job in jobs:
            if job.id not in self._ended:
                self._ended.add(job.id)
                self._tried(False, self.queue.put_back, job, time.time())
                self.lease.let_go(job)
                announce(f"{job.id}: back in the queue, as this group stops")

    def give_up(self, jobs: Sequence[Job]) -> None:
        """A process is lost: the lease ends now, and the attempt counts."""
        for job in jobs:
            if job.id not in self._ended:
                self._tried(False, self.queue.renew, job, time.time(), lease_s=0.0)
                self.lease.let_go(job)

    def _tried(self, otherwise: T, call: Callable[..., T], *args: Any, **told: Any) -> T:
        """A queue that cannot be asked now is asked again later."""
        try:
            return call(*args, **told)
        except QueueUnavailable as reason:
            announce(f"queue: {reason}")
            return otherwise
