"""What a queue promises, on SQLite and on PostgreSQL."""

import threading
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from opensora.serve.config import ServeConfig
from opensora.serve.jobs import Job, JobError, JobQueue, NewJob, QueueFull, QueueUnavailable, SameKeyOtherRequest
from opensora.serve.queues import open_queue, sqlite
from opensora.serve.store import Store
from opensora.utils.errors import UserError
from tests.queue_place import MANY, QueuePlace, added, claimed, new_job

LEASE = 60.0


def names(jobs: list[Job]) -> list[str]:
    return [job.id for job in jobs]


def test_a_job_is_what_was_asked_for(make_queue: QueuePlace) -> None:
    """Every field, from another process's view, with text that a column would not take."""
    asked = new_job(
        owner="k" * 64,
        prompt='nul \0, a lone surrogate \ud800, a quote \' and %(percent)s, "naïve 漢字" :id',
        request={"sampling": {"seed": 2**63 - 1, "guidance": 0.1 + 0.2}, "neg": None, "lora": {"name": "x"}},
        references=("video_" + 32 * "a" + "-0.png",),
        priority=-3,
        expires_at=1e9 + 0.123456789,
        remixed_from="video_" + 32 * "b",
        idempotency="key \0 \udfff",
        digest="d",
    )
    make_queue().add(asked, 1e9 + 0.1, most=1, most_of_owner=1)
    found = make_queue().get(asked.id, asked.owner)
    assert found is not None and asdict(found) | asdict(asked) == asdict(found)
    assert (found.state, found.created_at, found.attempt, found.progress) == ("queued", 1e9 + 0.1, 0, 0)
    assert {field.name for field in fields(NewJob)} <= asdict(found).keys() and found.error is None


def test_others_do_not_see_it(make_queue: QueuePlace) -> None:
    queue = make_queue()
    job = added(queue, 1.0, owner="a")
    assert queue.get(job.id, "b") is None and queue.get(job.id, None) == queue.get(job.id, "a") == job
    assert queue.page("b", limit=5, after=None, order="asc") == ([], False)
    assert queue.request_cancel(job.id, "b", 2.0) is None and queue.get(job.id, "a") == job
    queue.request_cancel(job.id, "a", 2.0)
    assert queue.remove(job.id, "b") is None and queue.remove(job.id, "a") is not None
    assert queue.get(job.id, "a") is None and queue.remove(job.id, None) is None
    for strange in ("", "\0", "\ud800", "x" * 5000, "' OR 1=1 --", "é"):
        assert queue.get(strange, None) is None and queue.request_cancel(strange, "a", 1.0) is None
        assert queue.remove(strange, None) is None
        with pytest.raises(KeyError):
            queue.page("a", limit=5, after=strange, order="asc")


def test_limits(make_queue: QueuePlace) -> None:
    queue = make_queue()
    for owner in "aab":
        queue.add(new_job(owner=owner), 1.0, most=4, most_of_owner=2)
    with pytest.raises(QueueFull, match=r"2 jobs \(yours\) wait, of at most 2") as full:
        queue.add(new_job(owner="a"), 1.0, most=4, most_of_owner=2)
    assert full.value.retry_after_s == 10
    queue.add(new_job(owner="b"), 1.0, most=4, most_of_owner=2)
    with pytest.raises(QueueFull, match=r"4 jobs \(all\) wait, of at most 4"):
        queue.add(new_job(owner="c"), 1.0, most=4, most_of_owner=2)
    for now in (100.0, 130.0):
        assert queue.finish(claimed(queue, now), now, "completed")
    queue.add(new_job(owner="c"), 200.0, most=4, most_of_owner=2)
    queue.add(new_job(owner="c"), 200.0, most=4, most_of_owner=2)
    with pytest.raises(QueueFull) as full:
        queue.add(new_job(owner="c"), 200.0, most=4, most_of_owner=2)
    assert full.value.retry_after_s == 30  # jobs end every 30 s


def test_limits_hold_for_many_at_once(make_queue: QueuePlace) -> None:
    refused: list[Exception] = []

    def add(queue: JobQueue) -> None:
        for _ in range(5):
            try:
                queue.add(new_job(owner="a"), 1.0, most=MANY, most_of_owner=7)
            except QueueFull as error:
                refused.append(error)

    queues = [make_queue() for _ in range(2)]
    together([lambda queue=queue: add(queue) for queue in (*queues, *queues)])
    assert len(refused) == 13 and queues[0].counts() == {("demo", "queued"): 7}


def together(calls: list[Any]) -> None:
    failed: list[BaseException] = []

    def guarded(call: Any) -> None:
        try:
            call()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_one_idempotency_key_is_one_job(make_queue: QueuePlace) -> None:
    queue = make_queue()
    first = added(queue, 1.0, owner="a", idempotency="once", digest="1")
    again = queue.add(new_job(owner="a", idempotency="once", digest="1"), 2.0, most=1, most_of_owner=1)
    assert again == first, "and no limit is asked"
    with pytest.raises(SameKeyOtherRequest, match=first.id):
        added(queue, 2.0, owner="a", idempotency="once", digest="2")
    assert added(queue, 2.0, owner="b", idempotency="once", digest="2").id != first.id
    queue.request_cancel(first.id, "a", 3.0)
    assert queue.remove(first.id, "a") is not None
    assert added(queue, 4.0, owner="a", idempotency="once", digest="2").id != first.id


def test_one_idempotency_key_at_once(make_queue: QueuePlace) -> None:
    found: list[str] = []
    queues = [make_queue() for _ in range(4)]

    def add(queue: JobQueue) -> None:
        found.append(added(queue, 1.0, idempotency="once", digest="1").id)

    together([lambda queue=queue: add(queue) for queue in queues])
    assert len(found) == 4 and len(set(found)) == 1


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages(make_queue: QueuePlace, order: Any) -> None:
    """Jobs of one moment too; each once, though others come in between and the last one seen may go."""
    queue = make_queue()
    jobs = [added(queue, float(index // 4), owner="a") for index in range(17)]
    added(queue, 1.0, owner="b")
    expected = names(sorted(jobs, key=lambda job: (job.created_at, job.id), reverse=order == "desc"))
    for limit in (1, 5, 17, 100):
        found: list[str] = []
        more = True
        while more:
            page, more = queue.page("a", limit=limit, after=found[-1] if found else None, order=order)
            found += names(page)
        assert found == expected
    assert queue.page("a", limit=0, after=None, order=order) == ([], True)
    assert queue.page("a", limit=5, after=expected[-1], order=order) == ([], False)


def test_order_of_claims(make_queue: QueuePlace) -> None:
    """Priority, then owners in turn, then age."""
    queue = make_queue()
    asked = [("a", 0, 1), ("a", 0, 2), ("a", 0, 3), ("b", 0, 4), ("b", 0, 5), ("c", 1, 9), ("a", 1, 10), ("c", 0, 6)]
    ids = {(owner, at): added(queue, float(at), owner=owner, priority=first).id for owner, first, at in asked}
    wanted = [ids[one] for one in [("c", 9), ("a", 10), ("b", 4), ("c", 6), ("a", 1), ("b", 5), ("a", 2), ("a", 3)]]
    places = {id: queue.position(job) for id in wanted if (job := queue.get(id, None))}
    assert places == {id: place for place, id in enumerate(wanted)}
    assert [claimed(queue, 20.0).id for _ in wanted] == wanted
    assert queue.claim("w", ["demo"], 20.0, lease_s=LEASE, attempts=3) is None


def test_who_deletes_jobs_does_not_come_sooner(make_queue: QueuePlace) -> None:
    queue = make_queue()
    first, _ = added(queue, 1.0, owner="a"), added(queue, 2.0, owner="a")
    other = added(queue, 3.0, owner="b")
    assert queue.finish(claimed(queue, 4.0), 5.0, "completed") and queue.remove(first.id, "a")
    assert claimed(queue, 6.0).id == other.id


def test_models(make_queue: QueuePlace) -> None:
    queue = make_queue()
    added(queue, 1.0, model="large")
    small = added(queue, 2.0, model="small")
    job = queue.claim("w", ["small", "other"], 3.0, lease_s=LEASE, attempts=3)
    assert job is not None and job.id == small.id
    assert queue.claim("w", ["small", "other"], 3.0, lease_s=LEASE, attempts=3) is None
    assert queue.claim("w", [], 3.0, lease_s=LEASE, attempts=3) is None
    assert queue.counts() == {("large", "queued"): 1, ("small", "running"): 1}


def test_a_life(make_queue: QueuePlace) -> None:
    """Claimed, shown as begun with the first report, progress that never falls, finished."""
    queue, web = make_queue(), make_queue()
    added(queue, 1.0, expires_at=100.0)
    job = claimed(queue, 2.0)
    assert (job.state, job.worker, job.attempt, job.lease_until, job.started_at) == ("running", "w", 1, 62.0, None)
    assert web.position(job) is None
    for now, step, progress, shown in ((3.0, 0, 2, 2), (4.0, 5, 46, 46), (5.0, 6, 30, 46)):
        assert queue.report(job, now, step=step, progress=progress, batch=2)
        seen = web.get(job.id, "")
        assert seen is not None
        assert (seen.step, seen.progress, seen.batch, seen.started_at) == (step, shown, 2, 3.0)
    assert queue.renew(job, 50.0, lease_s=LEASE) and queue.claim("v", ["demo"], 100.0, lease_s=1, attempts=3) is None
    assert web.expired(200.0) == [] and web.remove(job.id, "") is None, "it runs"
    result = {"file": f"{job.id}.mp4", "frames": 9, "fps": 24.0}
    assert queue.finish(job, 60.0, "completed", result=result)
    seen = web.get(job.id, "")
    assert seen is not None and (seen.state, seen.completed_at, seen.progress) == ("completed", 60.0, 100)
    assert seen.result == result and seen.error is None
    assert web.expired(99.9) == [] and names(web.expired(100.0)) == [job.id]
    assert not queue.finish(job, 61.0, "failed", error=JobError(code="x", message="")), "it is finished"
    assert web.get(job.id, "") == seen


def test_who_lost_the_lease_changes_nothing(make_queue: QueuePlace) -> None:
    """Not even where the same worker has the job again."""
    queue = make_queue()
    added(queue, 1.0)
    for worker, return_ in (("v", "lease"), ("w", "lease"), ("w", "put back")):
        old = claimed(queue, 1000.0, attempts=9)
        if return_ == "put back":
            assert queue.put_back(old, 1001.0)
        new = claimed(queue, 2000.0, worker, attempts=9)
        assert new.id == old.id and new.attempt == old.attempt + 1
        assert not queue.renew(old, 2001.0, lease_s=LEASE) and not queue.put_back(old, 2001.0)
        assert not queue.report(old, 2001.0, step=1, progress=50, batch=1)
        assert not queue.finish(old, 2001.0, "completed", result={})
        assert queue.cancel_requested([old]) == {old.id} and queue.cancel_requested([new]) == set()
        assert queue.get(new.id, None) == new
        assert queue.put_back(new, 2002.0)


def test_a_lease_ends(make_queue: QueuePlace) -> None:
    queue = make_queue()
    added(queue, 1.0)
    first = claimed(queue, 100.0)
    assert queue.report(first, 101.0, step=5, progress=50, batch=1)
    assert queue.claim("v", ["demo"], 160.0, lease_s=LEASE, attempts=3) is None, "it is over after that moment"
    second = claimed(queue, 160.5, "v")
    assert (second.id, second.attempt, second.progress, second.step, second.started_at) == (first.id, 2, 0, 0, None)


def test_attempts(make_queue: QueuePlace) -> None:
    """Counted where a worker was lost, and not where it put the job back."""
    queue = make_queue()
    lost, other = added(queue, 1.0), added(queue, 2.0)
    for _ in range(5):
        assert queue.put_back(claimed(queue, 3.0, attempts=2), 3.0)
    assert claimed(queue, 100.0, attempts=2).id == lost.id
    assert claimed(queue, 200.0, attempts=2).id == lost.id
    assert claimed(queue, 300.0, attempts=2).id == other.id
    seen = queue.get(lost.id, "")
    assert seen is not None and (seen.state, seen.completed_at) == ("failed", 300.0)
    assert seen.error == JobError(code="worker_lost", message="its worker was lost in each of 2 attempts")


def test_cancel(make_queue: QueuePlace) -> None:
    queue = make_queue()
    running, waiting = added(queue, 1.0), added(queue, 2.0)
    held = claimed(queue, 3.0)
    done = queue.request_cancel(waiting.id, "", 4.0)
    assert done is not None and (done.state, done.completed_at) == ("cancelled", 4.0)
    assert done.error is not None and done.error.code == "cancelled"
    assert queue.request_cancel(waiting.id, "", 5.0) == done, "once more changes nothing"
    asked = queue.request_cancel(running.id, "", 6.0)
    assert asked is not None and (asked.state, asked.cancel_requested) == ("running", True)
    assert queue.cancel_requested([held]) == {running.id} and queue.cancel_requested([]) == set()
    assert queue.finish(held, 7.0, "cancelled", error=done.error)
    assert queue.claim("w", ["demo"], 900.0, lease_s=LEASE, attempts=3) is None


@pytest.mark.parametrize("how", ["put back", "lease ends", "asked later"])
def test_a_cancelled_job_does_not_run_again(make_queue: QueuePlace, how: str) -> None:
    queue = make_queue()
    added(queue, 1.0)
    job = claimed(queue, 2.0)
    if how != "asked later":
        queue.request_cancel(job.id, "", 3.0)
    if how == "put back":
        assert queue.put_back(job, 4.0)
    elif how == "asked later":  # its worker is gone
        queue.request_cancel(job.id, "", 500.0)
    if how != "lease ends":
        assert queue.counts() == {("demo", "cancelled"): 1}
    assert queue.claim("w", ["demo"], 600.0, lease_s=LEASE, attempts=3) is None
    seen = queue.get(job.id, "")
    assert seen is not None and seen.state == "cancelled" and seen.error is not None and seen.error.code == "cancelled"
    assert not queue.finish(job, 601.0, "completed", result={})


def test_a_batch(make_queue: QueuePlace) -> None:
    """Like jobs of all owners, in their turns; not what another one has, nor one of another model."""
    queue = make_queue()
    jobs = [added(queue, float(index), owner=owner) for index, owner in enumerate("aaabbc")]
    for other in ({"model": "large"}, {"batch_key": "other"}):
        added(queue, 0.5, **other)
    first = queue.claim("w", ["demo"], 10.0, lease_s=LEASE, attempts=3)
    assert first is not None and first.id == jobs[0].id
    like = queue.claim_like("w", first, 10.0, lease_s=LEASE, most=3)
    assert names(like) == [jobs[3].id, jobs[5].id, jobs[1].id]
    assert all((job.state, job.worker, job.lease_until) == ("running", "w", 70.0) for job in like)
    assert names(queue.claim_like("v", first, 10.0, lease_s=LEASE, most=9)) == [jobs[4].id, jobs[2].id]
    assert queue.claim_like("v", first, 10.0, lease_s=LEASE, most=9) == []


def test_recovery(make_queue: QueuePlace) -> None:
    """What a dead worker left: completed where its file is finished, and else it waits, or not."""
    queue = make_queue()
    jobs = [added(queue, float(index)) for index in range(5)]
    for _ in jobs[:4]:
        claimed(queue, 10.0, "dead")
    claimed(queue, 10.0, "alive")
    queue.request_cancel(jobs[1].id, "", 11.0)
    after = queue.recover(
        lambda job: {"file": "x.mp4"} if job.id == jobs[0].id else None, 12.0, attempts=3, worker="dead"
    )
    assert [job.state for job in after] == ["completed", "cancelled", "queued", "queued"]
    assert after[0].result == {"file": "x.mp4"} and after[0].completed_at == 12.0
    assert queue.counts()["demo", "running"] == 1
    for expected in ("queued", "failed"):
        assert claimed(queue, 20.0, "dead").id == jobs[2].id
        claimed(queue, 20.0, "dead")
        assert {job.state for job in queue.recover(lambda job: None, 21.0, attempts=3)} >= {expected}


def test_what_workers_tell(make_queue: QueuePlace) -> None:
    queue, web = make_queue(), make_queue()
    queue.publish("demo", {"name": "demo", "sizes": [[64, 64]]}, 1.0)
    queue.publish("demo", {"name": "demo", "sizes": [[32, 32]]}, 2.0)
    assert web.published() == {"demo": {"name": "demo", "sizes": [[32, 32]]}}
    queue.beat("w", {"ready": False}, 10.0)
    queue.beat("w", {"ready": True, "seconds_per_step": 0.25}, 20.0)
    queue.beat("v", {"ready": True}, 12.0)
    assert web.workers(30.0, 10.0) == {"w": {"ready": True, "seconds_per_step": 0.25}}
    assert web.workers(30.0, 60.0).keys() == {"w", "v"}
    queue.beat("v", {"ready": True}, 20.0 + 86401)
    assert web.workers(1e6, 1e6).keys() == {"v"}


def test_the_oldest_go_first(make_queue: QueuePlace) -> None:
    queue = make_queue()
    jobs = [added(queue, 1.0 + index) for index in range(4)]
    for job, end in ((jobs[2], 10.0), (jobs[0], 11.0), (jobs[3], 12.0)):
        queue.request_cancel(job.id, "", end)
    assert names(queue.oldest_finished(2)) == [jobs[2].id, jobs[0].id]
    assert names(queue.oldest_finished(9)) == [jobs[2].id, jobs[0].id, jobs[3].id]


def test_two_workers_never_have_the_same(make_queue: QueuePlace) -> None:
    queues = [make_queue() for _ in range(4)]
    ids = [added(queues[0], float(index), owner=str(index % 3)).id for index in range(40)]
    found: list[str] = []

    def work(queue: JobQueue) -> None:
        while (job := queue.claim("w", ["demo"], 100.0, lease_s=LEASE, attempts=3)) is not None:
            found.append(job.id)
            found.extend(names(queue.claim_like("w", job, 100.0, lease_s=LEASE, most=2)))

    together([lambda queue=queue: work(queue) for queue in queues])
    assert sorted(found) == sorted(ids)


def test_an_error_within_a_change_leaves_no_part_of_it(make_queue: QueuePlace) -> None:
    queue = make_queue()
    added(queue, 1.0)
    with mock.patch("opensora.serve.queues.statements.TURN", "no statement"), pytest.raises(Exception, match=r"no\b"):
        claimed(queue, 2.0)
    assert queue.counts() == {("demo", "queued"): 1} and claimed(queue, 3.0).attempt == 1


def test_every_change_is_synced(tmp_path: Path) -> None:
    """2 is FULL: at every end of a transaction, and not only when the log is copied."""
    queue: Any = open_queue(ServeConfig(), Store(tmp_path))
    connection = queue._database._writing
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    queue.close()


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "fuse.sshfs"])
def test_a_network_file_system_is_refused(tmp_path: Path, kind: str) -> None:
    with (
        mock.patch.object(sqlite, "file_system", lambda path: kind),
        pytest.raises(UserError, match=rf"out=.* is on {kind}, where SQLite can lose jobs; .*queue=postgresql"),
    ):
        open_queue(ServeConfig(), Store(tmp_path))
    assert not (tmp_path / "queue.sqlite").exists()


def test_a_later_version_is_refused(make_queue: QueuePlace) -> None:
    make_queue().close()
    if make_queue.url:
        import psycopg

        with psycopg.connect(make_queue.url) as connection:
            connection.execute("UPDATE opensora_serve.about SET version = 2")
    else:
        import sqlite3

        connection = sqlite3.connect(make_queue.out / "queue.sqlite")
        connection.execute("PRAGMA user_version = 2")
        connection.close()
    with pytest.raises(UserError, match=r"of version 2, which a later release has .*update it"):
        make_queue()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://host/x", "queue=mysql://host/x: must be empty"),
        ("postgresql://me:secret@127.0.0.1:1/jobs", "queue=postgresql://127.0.0.1:1/jobs: .*refused"),
    ],
)
def test_a_queue_that_cannot_be(tmp_path: Path, url: str, said: str) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(UserError, match=said) as error:
        open_queue(ServeConfig(queue=url), Store(tmp_path))
    assert "secret" not in str(error.value)


def test_a_lost_server(make_queue: QueuePlace) -> None:
    """Said as such while it is away; found again without a new start."""
    if make_queue.server is None:
        pytest.skip("SQLite has no server")
    queue = make_queue()
    job = added(queue, 1.0)
    make_queue.server.stop()
    try:
        for call in (lambda: queue.get(job.id, None), lambda: added(queue, 2.0)):
            with pytest.raises(QueueUnavailable):
                call()
    finally:
        make_queue.server.start()
    assert replace(claimed(queue, 3.0), state="queued").id == job.id
    make_queue.server.stop()
    make_queue.server.start()
    assert queue.counts() == {("demo", "running"): 1}, "a restart between two calls is not noticed"
