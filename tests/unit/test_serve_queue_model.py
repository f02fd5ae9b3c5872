"""Random calls on a queue against a model of it in memory: lists, and the order of claims tried out on a copy."""

import copy
import os
import random
from typing import Any

import pytest

from opensora.serve.jobs import Job, JobError, JobQueue, NewJob, QueueFull
from tests.queue_place import QueuePlace, new_job

CALLS = int(os.environ.get("OPENSORA_QUEUE_CALLS", "250"))
SEEDS = range(int(os.environ.get("OPENSORA_QUEUE_SEEDS", "2")))
LEASE, ATTEMPTS, MOST, MOST_OF_OWNER = 10.0, 3, 14, 6
OWNERS, WORKERS, MODELS = "abc", ("w0", "w1", "w2"), ("demo", "large")


class Model:
    """What the queue should be."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.claims: list[str] = []  # owners, in the order of their claims

    def add(self, asked: NewJob, now: float) -> bool:
        waits = [job["asked"].owner for job in self.jobs.values() if job["state"] == "queued"]
        if len(waits) >= MOST or waits.count(asked.owner) >= MOST_OF_OWNER:
            return False
        self.jobs[asked.id] = {
            **{"asked": asked, "state": "queued", "at": now, "attempt": 0, "lost": 0, "worker": None, "lease": 0.0},
            **{"cancel": False, "progress": 0, "started": None, "ended": None, "code": None},
        }
        return True

    def next(self, wanted: Any) -> str | None:
        def key(id: str) -> tuple[Any, ...]:
            job = self.jobs[id]
            owner = job["asked"].owner
            since = len(self.claims) - 1 - self.claims[::-1].index(owner) if owner in self.claims else -1
            return -job["asked"].priority, since, job["at"], id

        return min((id for id, job in self.jobs.items() if wanted(job)), key=key, default=None)

    def take(self, id: str, worker: str, now: float) -> None:
        job = self.jobs[id]
        job |= {"state": "running", "worker": worker, "attempt": job["attempt"] + 1, "lost": job["lost"] + 1}
        job |= {"lease": now + LEASE, "progress": 0, "started": None}
        self.claims.append(job["asked"].owner)

    def claim(self, worker: str, models: Any, now: float) -> str | None:
        def may(job: dict[str, Any]) -> bool:
            over = job["state"] == "running" and job["lease"] < now
            return job["asked"].model in models and (job["state"] == "queued" or over)

        for job in self.jobs.values():
            if may(job) and job["cancel"]:
                self.end(job, "cancelled", now, "cancelled")
            elif may(job) and job["lost"] >= ATTEMPTS:
                self.end(job, "failed", now, "worker_lost")
        found = self.next(may)
        if found is not None:
            self.take(found, worker, now)
        return found

    def claim_like(self, worker: str, like: NewJob, now: float, most: int) -> list[str]:
        found: list[str] = []
        while len(found) < most:
            id = self.next(
                lambda job: (
                    (job["state"], job["asked"].model, job["asked"].batch_key) == ("queued", like.model, like.batch_key)
                )
            )
            if id is None:
                break
            self.take(id, worker, now)
            found.append(id)
        return found

    def position(self, id: str) -> int | None:
        """By claiming everything that waits, in a copy."""
        tried = copy.deepcopy(self)
        for place in range(len(self.jobs) + 1):
            first = tried.next(lambda job: job["state"] == "queued")
            if first is None:
                return None
            if first == id:
                return place
            tried.take(first, "w", 0.0)
        return None

    def mine(self, held: Job) -> dict[str, Any] | None:
        job = self.jobs.get(held.id)
        alive = job and (job["state"], job["worker"], job["attempt"]) == ("running", held.worker, held.attempt)
        return job if alive else None

    def end(self, job: dict[str, Any], state: str, now: float, code: str | None) -> None:
        job |= {"state": state, "ended": now, "code": code}

    def put_back(self, job: dict[str, Any], now: float, uncounted: int) -> None:
        job |= {"worker": None, "lost": job["lost"] - uncounted, "progress": 0, "started": None}
        if job["cancel"]:
            self.end(job, "cancelled", now, "cancelled")
        else:
            job["state"] = "queued"


class Run:
    """One history: what was called, on the queue and on the model."""

    def __init__(self, place: QueuePlace, seed: int) -> None:
        self.draw, self.place, self.model, self.now = random.Random(seed), place, Model(), 1000.0
        self.queue: JobQueue = place()
        self.held: list[Job] = []  # every claim ever made; most have lost their lease

    def step(self) -> None:
        self.now += self.draw.choice((0.0, 0.5, 1.0, 4.0))
        names = ["add"] * 6 + ["claim"] * 4 + ["like", "report", "renew", "finish", "finish", "put_back", "cancel"]
        getattr(self, self.draw.choice([*names, "remove", "recover", "restart"]))()

    def add(self) -> None:
        draw = self.draw
        asked = new_job(
            id=f"video_{draw.getrandbits(128):032x}",
            **{"owner": draw.choice(OWNERS), "model": draw.choice(MODELS), "priority": draw.choice((0, 0, 0, 1))},
            **{"batch_key": draw.choice("xy"), "expires_at": draw.choice((None, self.now + 20))},
        )
        try:
            self.queue.add(asked, self.now, most=MOST, most_of_owner=MOST_OF_OWNER)
            done = True
        except QueueFull:
            done = False
        assert self.model.add(asked, self.now) == done

    def claim(self) -> None:
        worker, models = self.draw.choice(WORKERS), self.draw.choice((MODELS, MODELS[:1]))
        job = self.queue.claim(worker, models, self.now, lease_s=LEASE, attempts=ATTEMPTS)
        assert self.model.claim(worker, models, self.now) == (job and job.id)
        self.held += [job] if job else []

    def like(self) -> None:
        if self.held:
            like, worker, most = self.draw.choice(self.held), self.draw.choice(WORKERS), self.draw.randint(0, 3)
            jobs = self.queue.claim_like(worker, like, self.now, lease_s=LEASE, most=most)
            assert self.model.claim_like(worker, like, self.now, most) == [job.id for job in jobs]
            self.held += jobs

    def some(self) -> tuple[Job | None, dict[str, Any] | None]:
        """A claim, as often one of the last as any."""
        held = self.draw.choice((self.held[-4:], self.held)) if self.held else []
        job = self.draw.choice(held) if held else None
        return job, self.model.mine(job) if job else None

    def report(self) -> None:
        job, mine = self.some()
        if job:
            progress = self.draw.randint(0, 98)
            assert self.queue.report(job, self.now, step=1, progress=progress, batch=1) == (mine is not None)
            if mine is not None:
                mine["progress"] = max(progress, mine["progress"])
                mine["started"] = self.now if mine["started"] is None else mine["started"]

    def renew(self) -> None:
        job, mine = self.some()
        if job:
            assert self.queue.renew(job, self.now, lease_s=LEASE) == (mine is not None)
            if mine is not None:
                mine["lease"] = self.now + LEASE

    def finish(self) -> None:
        job, mine = self.some()
        if job:
            good = self.draw.random() < 0.7
            error = None if good else JobError(code="sampling_failed", message="x")
            state: Any = "completed" if good else "failed"
            assert self.queue.finish(job, self.now, state, error=error) == (mine is not None)
            if mine is not None:
                self.model.end(mine, state, self.now, error and error.code)
                mine["progress"] = 100 if good else mine["progress"]

    def put_back(self) -> None:
        job, mine = self.some()
        if job:
            assert self.queue.put_back(job, self.now) == (mine is not None)
            if mine is not None:
                self.model.put_back(mine, self.now, uncounted=1)

    def cancel(self) -> None:
        if self.model.jobs:
            id = self.draw.choice(list(self.model.jobs))
            job, owner = self.model.jobs[id], self.draw.choice(OWNERS)
            answer = self.queue.request_cancel(id, owner, self.now)
            assert (answer is None) == (owner != job["asked"].owner)
            if answer is not None and job["state"] in ("queued", "running"):
                job["cancel"] = True
                if job["state"] == "queued" or job["lease"] < self.now:
                    self.model.end(job, "cancelled", self.now, "cancelled")

    def remove(self) -> None:
        if self.model.jobs:
            id = self.draw.choice(list(self.model.jobs))
            ended = self.model.jobs[id]["ended"] is not None
            assert (self.queue.remove(id, None) is not None) == ended
            if ended:
                del self.model.jobs[id]

    def recover(self) -> None:
        worker = self.draw.choice(WORKERS)
        self.queue.recover(
            lambda job: {} if int(job.id[-1], 16) % 4 == 0 else None, self.now, attempts=ATTEMPTS, worker=worker
        )
        for id, job in self.model.jobs.items():
            if (job["state"], job["worker"]) == ("running", worker):
                if int(id[-1], 16) % 4 == 0:
                    self.model.end(job, "completed", self.now, None)
                    job["progress"] = 100
                elif job["lost"] >= ATTEMPTS and not job["cancel"]:
                    self.model.end(job, "failed", self.now, "worker_lost")
                else:
                    self.model.put_back(job, self.now, uncounted=0)

    def restart(self) -> None:
        self.queue.close()
        self.queue = self.place()

    def compare(self) -> None:
        """Everything that can be seen."""
        jobs = self.model.jobs
        for owner in OWNERS:
            mine = sorted((job["at"], id) for id, job in jobs.items() if job["asked"].owner == owner)
            seen, more = self.queue.page(owner, limit=1000, after=None, order="asc")
            assert [job.id for job in seen] == [id for _, id in mine] and not more
            for job in seen:
                self.compare_one(job, jobs[job.id])
        over = {id for id, job in jobs.items() if job["ended"] and (job["asked"].expires_at or 1e9) <= self.now}
        assert {job.id for job in self.queue.expired(self.now)} == over
        states = [(job["asked"].model, job["state"]) for job in jobs.values()]
        assert self.queue.counts() == {one: states.count(one) for one in states}
        lost = {job.id for job in self.held if (mine := self.model.mine(job)) is None or mine["cancel"]}
        assert self.queue.cancel_requested(self.held) == lost

    def compare_one(self, job: Job, expected: dict[str, Any]) -> None:
        found = (job.state, job.attempt, job.progress, job.completed_at, job.error and job.error.code)
        assert found == tuple(expected[name] for name in ("state", "attempt", "progress", "ended", "code"))
        assert job.cancel_requested == expected["cancel"] and job.request == expected["asked"].request
        if job.state in ("queued", "running"):
            assert (job.worker, job.started_at) == (expected["worker"], expected["started"])
            assert self.queue.position(job) == self.model.position(job.id)


@pytest.mark.parametrize("seed", SEEDS)
def test_any_history_is_that_of_the_model(make_queue: QueuePlace, seed: int) -> None:
    run = Run(make_queue, seed)
    for index in range(CALLS):
        run.step()
        if index % 10 == 0:
            run.compare()
    run.compare()
    ended = [job["state"] for job in run.model.jobs.values() if job["ended"]]
    assert len(run.held) > CALLS / 10 and len(set(ended)) >= 2, "the draws reach what is to be tried"
