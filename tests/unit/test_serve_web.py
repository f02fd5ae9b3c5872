"""Parts of the web process one by one: bodies, ranges of files, keys, figures, and what is cleaned up."""

import asyncio
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opensora.serve.config import QuotaConfig, ServeConfig, ServedModel
from opensora.serve.jobs import Job
from opensora.serve.queues import open_queue
from opensora.serve.refusal import Refused
from opensora.serve.store import Store
from opensora.serve.web import body, videos
from opensora.serve.web.auth import Client, Keys, Origins
from opensora.serve.web.body import Body, Budget, Share, parse, read_body
from opensora.serve.web.cleanup import STRAY_S, clean, remove_marked
from opensora.serve.web.content import CHUNK, open_content
from opensora.serve.web.guard import Guard
from opensora.serve.web.metrics import Requests, text
from opensora.serve.web.service import Service
from opensora.serve.web.video_object import eta_s, number, poll_ms, status
from tests.stand_in_worker import TOY

ANYONE = Client("")
OF_WORKER = {"lease_s": 60.0, "attempts": 3}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    quota = QuotaConfig(keep_hours=1.0, free_gib=0.0)
    cfg = ServeConfig(models={"toy": ServedModel()}, out=str(tmp_path), quota=quota)
    store = Store(cfg.out)
    queue = open_queue(cfg, store)
    queue.publish("toy", TOY.plain(), 0.0)
    made = Service(cfg, queue, store)
    yield made
    made.close()


def created(service: Service) -> Job:
    return videos.create(service, ANYONE, Body(fields={"prompt": "a"}), None)


def running(service: Service) -> Job:
    created(service)
    job = service.queue.claim("w", ["toy"], time.time(), **OF_WORKER)
    assert job is not None
    return job


def finished(service: Service, after_s: float = 0.0) -> Job:
    job = running(service)
    service.store.video(job.id).write_bytes(b"x" * 1000)
    service.queue.finish(job, job.created_at + after_s, "completed", result={"file": f"{job.id}.mp4"})
    done = service.queue.get(job.id, "")
    assert done is not None
    return done


def refusal_of(call: Callable[[], Any]) -> int | None:
    """The status that a call is refused with; None: it is not."""
    try:
        call()
    except Refused as error:
        return error.status
    return None


# Bodies


def read(pieces: list[bytes | float], most: int = 1000, headers: dict[str, str] | None = None) -> bytes:
    """What ``read_body`` makes of pieces; a number is a wait in seconds."""

    async def receive() -> Any:
        while isinstance(piece := pieces.pop(0), float):
            await asyncio.sleep(piece)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    return asyncio.run(read_body(receive, headers or {}, most, Share(Budget(10 * most))))


def test_a_body_is_read_up_to_its_limit() -> None:
    assert read([b"a" * 400, b"b" * 600]) == b"a" * 400 + b"b" * 600
    for pieces, headers in (([b"a" * 400, b"b" * 601], {}), ([b"a"], {"content-length": "1001"})):
        assert refusal_of(partial(read, list(pieces), headers=headers)) == 413


def test_a_body_that_comes_too_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "IDLE_S", 0.05)
    with pytest.raises(Refused) as found:
        read([b"a", 30.0, b"b"])
    assert found.value.status == 408
    monkeypatch.setattr(body, "IDLE_S", 30.0)
    monkeypatch.setattr(body, "START_S", 0.1)
    with pytest.raises(Refused) as found:
        read([part for _ in range(2000) for part in (b"a", 0.01)])
    assert found.value.status == 408


def test_the_budget_of_all_bodies() -> None:
    budget = Budget(100)
    first, second = Share(budget), Share(budget)
    first.take(70)
    with pytest.raises(Refused) as found:
        second.take(31)
    assert found.value.status == 503
    second.take(30)
    first.give_back(), second.give_back(), second.give_back()
    assert budget.held == 0


def form(**parts: bytes) -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    return b"".join(head % (name.encode(), value) for name, value in parts.items()) + b"--x--\r\n"


FORM = "multipart/form-data; boundary=x"


def test_what_a_form_holds() -> None:
    file = b'--x\r\nContent-Disposition: form-data; name="f"; filename="../a"\r\nContent-Type: a/b\r\n\r\n\0\xff\r\n'
    found = parse(FORM, file + form(prompt="ö".encode(), a=b""))
    assert found.files == [("f", b"\0\xff")] and found.pairs == [("prompt", "ö"), ("a", "")]
    assert parse("application/x-www-form-urlencoded", b"a=%C3%B6+b&c=").pairs == [("a", "ö b"), ("c", "")]


def test_the_digest_is_of_what_is_said_and_not_of_how() -> None:
    other = form(prompt=b"a", n=b"1").replace(b"--x", b"--yy")
    one, same = parse(FORM, form(prompt=b"a", n=b"1")), parse(FORM.replace("=x", "=yy"), other)
    assert one.digest() == same.digest() != parse(FORM, form(prompt=b"a", n=b"2")).digest()
    names = [parse("application/json", text).digest() for text in (b'{"a": 1, "b": 2}', b'{"b": 2, "a": 1}')]
    assert names[0] == names[1] != parse("application/json", b'{"a": 1, "b": 3}').digest()


def test_broken_bodies_are_refused_and_nothing_else() -> None:
    """Bytes changed, left out and put in, of good ones: a refusal, or what can be read."""
    draw = random.Random(5)
    good = [("application/json", b'{"prompt": "a", "cache": {"kind": "none"}}'), (FORM, form(prompt=b"a", seed=b"1"))]
    refused = 0
    for _ in range(3000):
        kind, data = draw.choice(good)
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(damaged))
            damaged[place : place + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
        try:
            videos._parts(parse(kind, bytes(damaged)))
        except Refused as error:
            assert error.status in (400, 422)
            refused += 1
    assert 1000 < refused < 3000


# Files


def test_ranges_put_together_are_the_file(tmp_path: Path) -> None:
    data = os.urandom(3 * CHUNK + 7)
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    draw = random.Random(3)
    borders = sorted({0, len(data), *(draw.randrange(len(data)) for _ in range(6))})
    got = b""
    for start, stop in pairwise(borders):
        sent = open_content(path, "video/mp4", {"range": f"bytes={start}-{stop - 1}"})
        assert sent.headers["Content-Length"] == str(stop - start)
        path.rename(tmp_path / "gone")  # open already
        while piece := sent.next():
            assert len(piece) <= CHUNK
            got += piece
        sent.file.close()
        (tmp_path / "gone").rename(path)
    assert got == data


def test_an_empty_file_has_no_ranges(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    assert open_content(tmp_path / "a", "x", {}).status == 200
    with pytest.raises(Refused):
        open_content(tmp_path / "a", "x", {"range": "bytes=0-"})
    with pytest.raises(Refused):
        open_content(tmp_path / "b", "x", {})


# Keys and pages


def test_keys(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# ours\n\nfirst-key-0123456 priority=-3\nother-key-0123456 # of a friend\n")
    keys = Keys(tmp_path / "keys")
    first, other = (keys.client({"authorization": f"bearer {name}-key-0123456"}) for name in ("first", "other"))
    assert (
        first.owner != other.owner
        and len(first.owner) == 64
        and (first.most_priority, other.most_priority) == (-3, 100)
    )
    for value in ("Bearer first-key-012345", "Bearer first-key-01234567", "Basic first-key-0123456", "Bearer # ours"):
        with pytest.raises(Refused):
            keys.client({"authorization": value})


def test_origins() -> None:
    own = Origins(ServeConfig(origins=("https://a.example",)))
    for host in ("127.0.0.1", "127.0.0.1:8000", "LOCALHOST:1", "[::1]:8000", "a.example"):
        own.check("GET", {"host": host})
    for host in ("", "b.example", "127.0.0.1.b.example", "127.0.0.1@b.example", "[::1", "a.example.b"):
        assert refusal_of(partial(own.check, "GET", {"host": host})) == 403
    own.check("POST", {"host": "localhost:8000", "origin": "http://localhost:8000"})
    other = {"host": "localhost:8000", "origin": "http://localhost:8001"}
    assert refusal_of(partial(own.check, "POST", other)) == 403


# Figures and the object


def test_figures_can_be_read_by_prometheus() -> None:
    requests = Requests()
    requests.answered("GET", "/v1/videos", 200, 0.5)
    jobs: Any = {('a"b\\', "queued"): 2}
    lines = text(
        requests, jobs, ["toy"], {"w": {"ready": True, "mfu": 0.25, "memory_bytes": None}}, {"free": 5}
    ).splitlines()
    assert 'opensora_jobs{model="a\\"b\\\\",state="queued"} 2' in lines
    assert 'opensora_jobs{model="toy",state="failed"} 0' in lines and 'opensora_mfu{worker="0"} 0.25' in lines
    assert 'opensora_requests_total{method="GET",route="/v1/videos",status="200"} 1' in lines
    named = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(named) == len(set(named))
    assert all(line.split("{")[0].split()[0] in named for line in lines if not line.startswith("#"))


def test_a_job_is_in_progress_from_its_first_step_on(service: Service) -> None:
    job = running(service)
    assert status(job) == "queued"
    service.queue.report(job, 1.0, step=1, progress=5, batch=1)
    stepped = service.queue.get(job.id, "")
    assert stepped is not None and status(stepped) == "in_progress"
    assert eta_s(stepped, TOY, None, 3.0) == pytest.approx(2.0 * 3 + 0.1, abs=0.06)
    assert status(finished(service)) == "completed"
    assert number(5.375) == "5.375" and number(2.0) == "2" and number(1 / 3) == "0.333"
    assert poll_ms(job, 0.0) == 250 and poll_ms(job, 1e9) == poll_ms(job, None) == 5000 and poll_ms(job, 20) == 2000


# What goes


def test_time_counts_from_the_end_of_a_job(service: Service) -> None:
    job = finished(service, after_s=5000.0)
    clean(service, job.created_at + 8500.0)
    assert service.queue.get(job.id, "")
    clean(service, job.created_at + 8601.0)
    assert service.queue.get(job.id, "") is None and not service.store.video(job.id).exists()


def test_the_oldest_go_beyond_the_quota(service: Service) -> None:
    jobs = [finished(service, after_s=float(k)) for k in range(4)]
    waiting = created(service)
    object.__setattr__(service.cfg.quota, "keep_gib", 2500 / 2**30)
    clean(service, jobs[0].created_at + 10.0)
    assert [service.queue.get(job.id, "") is None for job in (*jobs, waiting)] == [True, True, False, False, False]


def test_a_job_that_was_deleted_goes_when_it_has_ended(service: Service) -> None:
    job = running(service)
    service.store.reference(f"{job.id}-0.png").write_bytes(b"x")
    videos.delete(service, ANYONE, job.id)
    remove_marked(service, 1.0)
    left = service.queue.get(job.id, "")
    assert left is not None and left.cancel_requested and service.job(job.id, "") is None
    service.queue.finish(job, 2.0, "completed", result={"file": f"{job.id}.mp4"})  # it was too late
    service.store.video(job.id).write_bytes(b"x")
    remove_marked(service, 3.0)
    assert service.queue.get(job.id, "") is None and not service.store.video(job.id).exists()
    assert service.store.marked_removed() == []


def test_a_job_is_deleted_also_where_the_process_dies_before_it_cancels(service: Service) -> None:
    runs, waits = running(service), created(service)
    for job in (runs, waits):
        service.store.mark_removed(job.id)
    remove_marked(service, time.time())
    left = service.queue.get(runs.id, "")
    assert left is not None and left.cancel_requested
    service.queue.finish(runs, time.time(), "cancelled")
    remove_marked(service, time.time())
    assert service.queue.counts() == {} and service.store.marked_removed() == []


def test_a_page_passes_over_what_is_being_deleted(service: Service) -> None:
    jobs = [running(service) for _ in range(5)]
    for job in jobs[1:4]:
        videos.delete(service, ANYONE, job.id)
    first = videos.page(service, ANYONE, 1, None, "asc")
    rest = videos.page(service, ANYONE, 1, first["last_id"], "asc")
    assert {first["first_id"], rest["first_id"]} == {jobs[0].id, jobs[4].id} and not rest["has_more"]


def test_references_without_a_job_go_after_a_while(service: Service) -> None:
    job = created(service)
    stray, kept = (service.store.reference(f"{id}-0.png") for id in (f"video_{'0' * 32}", job.id))
    aside = stray.with_suffix(".part")
    for path in (stray, kept, aside):
        path.write_bytes(b"x")
    now = kept.stat().st_mtime
    clean(service, now + STRAY_S - 60)
    assert stray.exists()
    clean(service, now + STRAY_S + 60)
    assert not stray.exists() and not aside.exists() and kept.exists()


def test_a_refused_request_leaves_no_file(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    for data in (b"", b"\x89PNG\r\n\x1a\n", b"GIF89a"):
        with pytest.raises(Refused) as found:
            videos.create(service, ANYONE, Body(pairs=[("prompt", "a")], files=[("input_reference", data)]), None)
        assert found.value.status == 422
    monkeypatch.setattr(service.pictures, "keep", no_room)
    with pytest.raises(Refused) as found:
        videos.create(service, ANYONE, Body(pairs=[("prompt", "a")], files=[("input_reference", b"\x89PNG")]), None)
    assert found.value.status == 507 and json.dumps(found.value.plain())
    assert not list(service.store.references.iterdir()) and service.queue.counts() == {}


# The log


@pytest.mark.parametrize(
    ("path", "status", "told"),
    [("/readyz", 503, False), ("/metrics", 200, False), ("/metrics", 401, True), ("/v1/videos", 200, True)],
)
def test_probes_that_go_well_are_no_lines_of_the_log(
    service: Service, path: str, status: int, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        scope["route"] = SimpleNamespace(path=path)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def nothing(*message: Any) -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    scope = {"type": "http", "http_version": "1.1", "method": "GET", "path": path, "raw_path": path.encode()}
    scope["headers"] = [(b"host", b"127.0.0.1")]
    asyncio.run(Guard(application, service)(scope, nothing, nothing))
    assert (f"GET {path} {status}" in "".join(capsys.readouterr())) is told
