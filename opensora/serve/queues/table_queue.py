"""The queue on any database that has its tables: every call is one transaction."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from opensora.serve.jobs import (
    CANCELLED,
    FINISHED,
    WORKER_LOST,
    Job,
    JobError,
    NewJob,
    Order,
    QueueFull,
    SameKeyOtherRequest,
    State,
)
from opensora.serve.queues import statements
from opensora.serve.queues.rows import error_text, job_of, plain, values_of
from opensora.serve.queues.turns import Head, before

Rows = list[tuple[Any, ...]]
Say = Callable[..., Rows]  # a statement and its values by name, as ``say(GET, id=id, owner=owner)``

RETRY_S = 10.0  # where nothing is known of how long a job takes
MAX_RETRY_S = 600.0
FORGET_S = 86400.0  # a worker that was not heard of for so long is not kept in the table
MAX_NAME = 200  # characters of an id; what is longer is none of ours


class Database(Protocol):
    """What a database does for the queue."""

    skip_locked: str  # what follows the row that is to be claimed

    def read(self, statement: str, **values: Any) -> Rows:
        """
        Raises:
            QueueUnavailable.
        """
        ...

    def change(self, *, alone: bool = False) -> AbstractContextManager[Say]:
        """A transaction; on the disk when the block ends, undone after an error in it. ``alone``: of all that are so,
        one at a time, as those that claim or add are: turns and limits are then kept.

        Raises:
            QueueUnavailable.
        """
        ...

    def close(self) -> None: ...


class TableQueue:
    """``JobQueue`` (opensora/serve/jobs.py says what each call does)."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # of the web process

    def add(self, job: NewJob, now: float, *, most: int, most_of_owner: int) -> Job:
        values = values_of(job)
        with self._database.change(alone=True) as say:
            if job.idempotency is not None:
                known = say(statements.OF_BEFORE, owner=job.owner, idempotency=values["idempotency"])
                if known:
                    return _same(job_of(known[0]), job)
            ((waiting, of_owner),) = say(statements.WAITING, owner=job.owner)
            if waiting >= most or of_owner >= most_of_owner:
                whose, number, of = ("yours", of_owner, most_of_owner) if waiting < most else ("all", waiting, most)
                ends = [end for (end,) in say(statements.LAST_ENDS)]
                raise QueueFull(f"{number} jobs ({whose}) wait, of at most {of}", _retry_s(ends))
            return job_of(say(statements.ADD, now=now, **values)[0])

    def get(self, id: str, owner: str | None) -> Job | None:
        return _first(self._database.read(statements.GET, id=id, owner=owner) if _possible(id) else [])

    def page(self, owner: str, *, limit: int, after: str | None, order: Order) -> tuple[list[Job], bool]:
        begin: tuple[float, str] = (-1e300, "") if order == "asc" else (1e300, "")
        if after is not None:
            last = self.get(after, owner)
            if last is None:
                raise KeyError(after)
            begin = last.created_at, last.id
        rows = self._database.read(
            statements.PAGE[order], owner=owner, created_at=begin[0], id=begin[1], most=limit + 1
        )
        return [job_of(row) for row in rows[:limit]], len(rows) > limit

    def position(self, job: Job) -> int | None:
        return before([Head(*row) for row in self._database.read(statements.HEADS, id=job.id)], job.id)

    def request_cancel(self, id: str, owner: str, now: float) -> Job | None:
        error = error_text(JobError(code=CANCELLED, message="cancelled before it began"))
        if not _possible(id):
            return None
        with self._database.change() as say:
            rows = say(statements.CANCEL, id=id, owner=owner, now=now, error=error)
            return _first(rows or say(statements.GET, id=id, owner=owner))

    def remove(self, id: str, owner: str | None) -> Job | None:
        if not _possible(id):
            return None
        with self._database.change() as say:
            return _first(say(statements.REMOVE, id=id, owner=owner))

    def expired(self, now: float) -> list[Job]:
        return [job_of(row) for row in self._database.read(statements.EXPIRED, now=now)]

    def oldest_finished(self, limit: int) -> list[Job]:
        return [job_of(row) for row in self._database.read(statements.OLDEST, most=limit)]

    def counts(self) -> dict[tuple[str, State], int]:
        return {(model, state): number for model, state, number in self._database.read(statements.COUNTS)}

    # of workers

    def claim(self, worker: str, models: Sequence[str], now: float, *, lease_s: float, attempts: int) -> Job | None:
        if not models:
            return None
        names = {f"model{index}": model for index, model in enumerate(models)}
        listed = ", ".join(f":{name}" for name in names)
        with self._database.change(alone=True) as say:
            say(statements.END_CANCELLED.format(models=listed), now=now, error=error_text(_stopped()), **names)
            lost = error_text(_lost(attempts))
            say(statements.END_LOST.format(models=listed), now=now, attempts=attempts, error=lost, **names)
            taken = statements.CLAIM.format(models=listed, skip_locked=self._database.skip_locked)
            rows = say(taken, worker=worker, now=now, until=now + lease_s, **names)
            return _in_turn(say, rows)

    def claim_like(self, worker: str, job: Job, now: float, *, lease_s: float, most: int) -> list[Job]:
        taken = statements.CLAIM_LIKE.format(skip_locked=self._database.skip_locked)
        batch_key = values_of(job)["batch_key"]
        found: list[Job] = []
        with self._database.change(alone=True) as say:
            while len(found) < most:
                rows = say(taken, worker=worker, until=now + lease_s, model=job.model, batch_key=batch_key)
                like = _in_turn(say, rows)
                if like is None:
                    break
                found.append(like)
        return found

    def renew(self, job: Job, now: float, *, lease_s: float) -> bool:
        return self._held(statements.RENEW, job, until=now + lease_s)

    def cancel_requested(self, jobs: Sequence[Job]) -> set[str]:
        if not jobs:
            return set()
        names = {f"id{index}": job.id for index, job in enumerate(jobs)}
        statement = statements.STANDING.format(ids=", ".join(f":{name}" for name in names))
        standing = set(self._database.read(statement, **names))
        return {job.id for job in jobs if (job.id, job.worker, job.attempt) not in standing}

    def report(self, job: Job, now: float, *, step: int, progress: int, batch: int) -> bool:
        return self._held(statements.REPORT, job, now=now, step=step, progress=progress, batch=batch)

    def finish(
        self,
        job: Job,
        now: float,
        state: State,
        *,
        result: Mapping[str, Any] | None = None,
        error: JobError | None = None,
    ) -> bool:
        assert state in FINISHED, state
        told = None if result is None else plain(result)
        return self._held(statements.FINISH, job, now=now, state=state, result=told, error=error_text(error))

    def put_back(self, job: Job, now: float) -> bool:
        return self._held(statements.PUT_BACK, job, now=now, uncounted=1, error=error_text(_stopped()))

    def recover(
        self,
        finished: Callable[[Job], Mapping[str, Any] | None],
        now: float,
        *,
        attempts: int,
        worker: str | None = None,
    ) -> list[Job]:
        running = [job_of(row) for row in self._database.read(statements.RUNNING, worker=worker)]
        results = {job.id: finished(job) for job in running}  # looks for files: in no transaction
        return [after for job in running if (after := self._recover(job, results[job.id], now, attempts)) is not None]

    def _recover(self, job: Job, result: Mapping[str, Any] | None, now: float, attempts: int) -> Job | None:
        """None: its lease was lost meanwhile, so that its worker is not dead or another one has it."""
        mine = {"id": job.id, "worker": job.worker, "attempt": job.attempt, "now": now}
        with self._database.change() as say:
            if result is not None:
                rows = say(statements.FINISH, state="completed", result=plain(result), error=None, **mine)
            else:
                lost = error_text(_lost(attempts))
                rows = say(statements.END_MINE, attempts=attempts, error=lost, **mine)
                rows = rows or say(statements.PUT_BACK, uncounted=0, error=error_text(_stopped()), **mine)
            return _first(say(statements.GET, id=job.id, owner=None)) if rows else None

    # what workers tell the web process

    def publish(self, model: str, info: Mapping[str, Any], now: float) -> None:
        with self._database.change() as say:
            say(statements.TELL["models"], name=model, info=plain(info), now=now)

    def published(self) -> dict[str, Mapping[str, Any]]:
        return _told(self._database.read(statements.TOLD["models"], since=-1e300))

    def beat(self, worker: str, told: Mapping[str, Any], now: float) -> None:
        with self._database.change() as say:
            say(statements.TELL["workers"], name=worker, info=plain(told), now=now)
            say(statements.FORGET, before=now - FORGET_S)

    def workers(self, now: float, within_s: float) -> dict[str, Mapping[str, Any]]:
        return _told(self._database.read(statements.TOLD["workers"], since=now - within_s))

    def close(self) -> None:
        self._database.close()

    def _held(self, statement: str, job: Job, **values: Any) -> bool:
        """Change a job where its lease is not lost; whether it was so."""
        with self._database.change() as say:
            return bool(say(statement, id=job.id, worker=job.worker, attempt=job.attempt, **values))


def _in_turn(say: Say, rows: Rows) -> Job | None:
    """The job that was claimed; its owner's turn is over."""
    job = _first(rows)
    if job is not None:
        say(statements.TURN, owner=job.owner)
    return job


def _first(rows: Rows) -> Job | None:
    return job_of(rows[0]) if rows else None


def _same(before: Job, job: NewJob) -> Job:
    if before.digest != job.digest:
        raise SameKeyOtherRequest(f"its Idempotency-Key came before with another request, that of {before.id}")
    return before


def _possible(id: str) -> bool:
    """Whether it can be a job's: not every database takes every text."""
    return len(id) <= MAX_NAME and id.isascii() and id.isprintable()


def _retry_s(ends: Sequence[float]) -> float:
    """How long a place in the queue takes to become free, by the ends of the last jobs, the last one first."""
    if len(ends) < 2:
        return RETRY_S
    return min(max((ends[0] - ends[-1]) / (len(ends) - 1), 1.0), MAX_RETRY_S)


def _lost(attempts: int) -> JobError:
    return JobError(code=WORKER_LOST, message=f"its worker was lost in each of {attempts} attempts")


def _stopped() -> JobError:
    return JobError(code=CANCELLED, message="cancelled while it ran")


def _told(rows: Rows) -> dict[str, Mapping[str, Any]]:
    return {name: json.loads(info) for name, info in rows}
