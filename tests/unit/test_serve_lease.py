"""The thread that keeps leases, with a clock and a queue that are the test's."""

from typing import Any

import pytest

from opensora.serve.jobs import Job, QueueUnavailable
from opensora.serve.worker.lease import BEAT_S, HUNG, Lease


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Queue:
    """Leases of all jobs but those in ``gone`` can be renewed."""

    def __init__(self) -> None:
        self.gone: set[str] = set()
        self.renewed: list[str] = []
        self.beats: list[dict[str, Any]] = []

    def renew(self, job: Job, now: float, *, lease_s: float) -> bool:
        self.renewed.append(job.id)
        return job.id not in self.gone

    def close(self) -> None:
        pass

    def beat(self, worker: str, told: Any, now: float) -> None:
        self.beats.append(dict(told))


def job(id: str) -> Job:
    return Job(
        id=id, owner="", model="m", prompt="", request={}, steps=1, batch_key="", state="running", created_at=0.0
    )


@pytest.fixture
def made() -> tuple[Lease, Queue, Clock, list[int]]:
    clock, left = Clock(), list[int]()
    lease = Lease(lambda: None, "worker", 60.0, 100.0, clock=clock, leave=left.append)  # type: ignore[arg-type, return-value]
    return lease, Queue(), clock, left


def test_leases_are_renewed_in_time_and_lost_ones_are_told(made: Any) -> None:
    lease, queue, clock, _ = made
    lease.hold([job("a"), job("b")])
    clock.now += 14.9
    lease.look(queue)
    assert queue.renewed == []
    clock.now += 0.2
    queue.gone = {"b"}
    lease.look(queue)
    assert queue.renewed == ["a", "b"] and lease.lost() == {"b"}
    lease.let_go(job("a"))
    clock.now += 20
    lease.look(queue)
    assert queue.renewed == ["a", "b", "b"]
    lease.hold([job("c")])
    assert lease.lost() == set()


def test_a_group_that_stands_still_loses_its_leases_and_leaves(made: Any) -> None:
    lease, queue, clock, left = made
    lease.hold([job("a")])
    for _ in range(6):
        clock.now += 50
        lease.moved()
        lease.look(queue)
    assert left == [] and len(queue.renewed) == 6
    clock.now += 101
    lease.look(queue)
    assert left == [HUNG] and len(queue.renewed) == 6
    lease.hold([])
    clock.now += 1000  # nothing is worked on: nothing need move
    lease.look(queue)
    assert left == [HUNG]


def test_beats_come_every_few_seconds_and_at_once_when_there_is_news(made: Any) -> None:
    lease, queue, clock, _ = made
    lease.say({"ready": False})
    lease.look(queue)
    lease.look(queue)
    clock.now += BEAT_S
    lease.look(queue)
    lease.say({"ready": True})
    lease.look(queue)
    assert [beat["ready"] for beat in queue.beats] == [False, False, True]


def test_a_queue_that_does_not_answer_is_asked_again() -> None:
    asked = [0]

    def open_queue() -> Any:
        asked[0] += 1
        if asked[0] < 3:
            raise QueueUnavailable("not now")
        lease._ended.set()
        return Queue()

    lease = Lease(open_queue, "worker", 60.0, 100.0)
    lease.start()
    lease._thread.join(timeout=60)
    assert asked == [3] and not lease._thread.is_alive()


def test_the_last_word_of_a_group_is_that_it_is_not_ready() -> None:
    """Or a service that is started again at once would be ready before its models are loaded."""
    queue = Queue()
    lease = Lease(lambda: queue, "worker", 60.0, 100.0)  # type: ignore[arg-type, return-value]
    lease.say({"ready": True, "models": ["m"]})
    lease.start()
    lease.end()
    assert queue.beats[-1] == {"ready": False, "models": ["m"]}
