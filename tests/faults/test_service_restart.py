"""The whole service as one command: a worker process is killed, Ctrl-C, and nothing stays behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.faults.conftest import Tally
from tests.faults.runs import alive, descendants
from tests.serving import asked, configured

pytest.importorskip("fastapi")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LIMIT_S = 400.0  # for what takes seconds on a machine with nothing else to do


class Service:
    """``python -m opensora.cli.serve`` and a client of it."""

    def __init__(self, config: Path, log: Path) -> None:
        self.log = log
        words = [str(config), "port=0", "workers.processes=2"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "opensora.cli.serve", *words], cwd=ROOT, stderr=log.open("wb"), stdout=log.open("ab")
        )
        self.wait(lambda: "ready: http" in log.read_text())
        self.address = log.read_text().partition("ready: http")[2].split()[0]

    def wait(self, condition: Callable[[], Any]) -> Any:
        until = time.monotonic() + LIMIT_S
        while time.monotonic() < until:
            if found := condition():
                return found
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)
        raise AssertionError(self.log.read_text())

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http{self.address}{path}", data=data, headers={"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def rank(self, number: int) -> int | None:
        """Process id of a process of the group, as long as it lives."""
        for pid in descendants(self.process.pid):
            with contextlib.suppress(OSError):
                if f"\0RANK={number}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes() + b"\0":
                    return pid
        return None


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(configured(tmp_path, lease_s=600), tmp_path / "log")
    yield made
    made.process.kill()
    made.process.wait()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_costs_an_attempt_and_no_job(service: Service, victim: int, tally: Tally) -> None:
    """The group starts again by itself, and makes the job although its lease has long to go."""
    asked_for = {"prompt": "a red circle", "num_steps": 120, "seed": 1}
    first = service.ask("/v1/videos", asked_for)["id"]
    second = service.ask("/v1/videos", {"prompt": "a blue square", "num_steps": 2})["id"]
    service.wait(lambda: service.ask(f"/v1/videos/{first}")["status"] == "in_progress")
    pid = service.rank(victim)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for id in (first, second):
        found = service.wait(lambda id=id: (one := service.ask(f"/v1/videos/{id}"))["status"] == "completed" and one)
        assert found["x"]["attempt"] == (2 if id == first else 1)
    assert "the worker group has ended" in service.log.read_text()
    tally("service: SIGKILL of a rank under the supervisor", 1, 1)


def test_ctrl_c_ends_all_of_it(service: Service, tally: Tally) -> None:
    """While a job runs that would take hours: nothing is left of the service, and the exit code is 0."""
    service.ask("/v1/videos", {"prompt": asked(1).prompt, "num_steps": 10_000})
    service.wait(lambda: service.ask("/v1/videos")["data"][0]["status"] == "in_progress")
    started = descendants(service.process.pid)
    assert len(started) >= 4
    os.kill(service.process.pid, signal.SIGINT)
    time.sleep(1.0)
    os.kill(service.process.pid, signal.SIGINT)
    assert service.process.wait(timeout=LIMIT_S) == 0
    until = time.monotonic() + LIMIT_S
    while any(alive(pid) for pid in started) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [pid for pid in started if alive(pid)]
    tally("service: Ctrl-C leaves no process", 1, 1)
