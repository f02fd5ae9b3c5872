"""A queue of the service in memory: a double for tests of what uses one, and what the real ones are compared with."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from opensora.serve.jobs import FINISHED, Job, JobError, NewJob, Order, QueueFull, SameKeyOtherRequest, State


class MemoryQueue:
    """``opensora.serve.jobs.JobQueue``, by a lock and a dict."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._jobs: dict[str, Job] = {}
        self._published: dict[str, Mapping[str, Any]] = {}
        self._beats: dict[str, tuple[float, Mapping[str, Any]]] = {}

    def add(self, job: NewJob, now: float, *, most: int, most_of_owner: int) -> Job:
        with self._lock:
            for known in self._jobs.values():
                if job.idempotency and (known.owner, known.idempotency) == (job.owner, job.idempotency):
                    if known.digest != job.digest:
                        raise SameKeyOtherRequest("this Idempotency-Key came with another request")
                    return known
            waiting = [known.owner for known in self._jobs.values() if known.state == "queued"]
            if len(waiting) >= most or waiting.count(job.owner) >= most_of_owner:
                raise QueueFull("as many jobs wait as may", 7.0)
            added = Job(
                **{name: getattr(job, name) for name in NewJob.__dataclass_fields__}, state="queued", created_at=now
            )
            self._jobs[job.id] = added
            return added

    def get(self, id: str, owner: str | None) -> Job | None:
        job = self._jobs.get(id)
        return job if job and owner in (None, job.owner) else None

    def page(self, owner: str, *, limit: int, after: str | None, order: Order) -> tuple[list[Job], bool]:
        with self._lock:
            mine = [job for job in self._jobs.values() if job.owner == owner]
        mine.sort(key=lambda job: (job.created_at, job.id), reverse=order == "desc")
        ids = [job.id for job in mine]
        if after is not None and after not in ids:
            raise KeyError(after)
        rest = mine[ids.index(after) + 1 :] if after else mine
        return rest[:limit], len(rest) > limit

    def position(self, job: Job) -> int | None:
        with self._lock:
            waiting = [one for one in self._jobs.values() if one.state == "queued"]
        waiting.sort(key=lambda one: (-one.priority, one.created_at, one.id))
        ids = [one.id for one in waiting]
        return ids.index(job.id) if job.id in ids else None

    def request_cancel(self, id: str, owner: str, now: float) -> Job | None:
        with self._lock:
            job = self.get(id, owner)
            if job and job.state == "queued":
                return self._put(replace(job, state="cancelled", completed_at=now))
            if job and job.state == "running":
                return self._put(replace(job, cancel_requested=True))
            return job

    def remove(self, id: str, owner: str | None) -> Job | None:
        with self._lock:
            job = self.get(id, owner)
            return self._jobs.pop(id) if job and job.state in FINISHED else None

    def expired(self, now: float) -> list[Job]:
        with self._lock:
            return [j for j in self._jobs.values() if j.state in FINISHED and j.expires_at and j.expires_at <= now]

    def oldest_finished(self, limit: int) -> list[Job]:
        with self._lock:
            ended = [job for job in self._jobs.values() if job.state in FINISHED]
        return sorted(ended, key=lambda job: job.completed_at or 0.0)[:limit]

    def counts(self) -> dict[tuple[str, State], int]:
        counts: dict[tuple[str, State], int] = {}
        with self._lock:
            for job in self._jobs.values():
                counts[job.model, job.state] = counts.get((job.model, job.state), 0) + 1
        return counts

    def claim(self, worker: str, models: Sequence[str], now: float, *, lease_s: float, attempts: int) -> Job | None:
        with self._lock:
            waiting = [job for job in self._jobs.values() if job.state == "queued" and job.model in models]
            if not waiting:
                return None
            job = min(waiting, key=lambda one: (-one.priority, one.created_at, one.id))
            taken = {"worker": worker, "attempt": job.attempt + 1, "lease_until": now + lease_s}
            return self._put(replace(job, state="running", started_at=None, progress=0, step=0, **taken))

    def claim_like(self, worker: str, job: Job, now: float, *, lease_s: float, most: int) -> list[Job]:
        return []

    def renew(self, job: Job, now: float, *, lease_s: float) -> bool:
        return self._change(job, lease_until=now + lease_s)

    def cancel_requested(self, jobs: Sequence[Job]) -> set[str]:
        known = {job.id: self._jobs.get(job.id) for job in jobs}
        return {id for id, job in known.items() if job is None or job.cancel_requested or job.state != "running"}

    def report(self, job: Job, now: float, *, step: int, progress: int, batch: int) -> bool:
        started = self._jobs[job.id].started_at if job.id in self._jobs else None
        return self._change(job, step=step, progress=progress, batch=batch, started_at=started or now)

    def finish(
        self,
        job: Job,
        now: float,
        state: State,
        *,
        result: Mapping[str, Any] | None = None,
        error: JobError | None = None,
    ) -> bool:
        return self._change(job, state=state, completed_at=now, result=result or {}, error=error)

    def put_back(self, job: Job, now: float) -> bool:
        return self._change(job, state="queued", attempt=job.attempt - 1, started_at=None)

    def publish(self, model: str, info: Mapping[str, Any], now: float) -> None:
        self._published[model] = info

    def published(self) -> dict[str, Mapping[str, Any]]:
        return dict(self._published)

    def beat(self, worker: str, told: Mapping[str, Any], now: float) -> None:
        self._beats[worker] = (now, told)

    def workers(self, now: float, within_s: float) -> dict[str, Mapping[str, Any]]:
        return {name: told for name, (at, told) in self._beats.items() if now - at <= within_s}

    def close(self) -> None:
        pass

    def _put(self, job: Job) -> Job:
        self._jobs[job.id] = job
        return job

    def _change(self, job: Job, **changes: Any) -> bool:
        """Of a job that the caller still has."""
        with self._lock:
            known = self._jobs.get(job.id)
            if not known or known.state != "running" or (known.worker, known.attempt) != (job.worker, job.attempt):
                return False
            self._put(replace(known, **changes))
            return True
