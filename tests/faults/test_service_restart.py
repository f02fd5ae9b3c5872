"""The whole service as one command: a worker process is killed, Ctrl-C, and nothing stays behind."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Tally
from tests.faults.runs import alive, descendants
from tests.patience import patience
from tests.service_process import WholeService
from tests.serving import asked, configured

pytest.importorskip("fastapi")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LIMIT_S = 400.0  # for what takes seconds on a machine with nothing else to do


@pytest.fixture
def service(tmp_path: Path) -> Iterator[WholeService]:
    made = WholeService(configured(tmp_path, lease_s=600), tmp_path / "log")
    yield made
    made.process.kill()
    made.process.wait()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_costs_an_attempt_and_no_job(service: WholeService, victim: int, tally: Tally) -> None:
    """The group starts again by itself, and makes the job although its lease has long to go."""
    asked_for = {"prompt": "a red circle", "num_steps": 120, "seed": 1}
    first = service.ask("/v1/videos", asked_for)["id"]
    second = service.ask("/v1/videos", {"prompt": "a blue square", "num_steps": 2})["id"]
    service.wait(lambda: service.ask(f"/v1/videos/{first}")["status"] == "in_progress")
    pid = service.rank(victim)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    service.wait(lambda: not service.is_ready())  # while the next group loads its models
    for id in (first, second):
        found = service.wait(lambda id=id: (one := service.ask(f"/v1/videos/{id}"))["status"] == "completed" and one)
        assert found["x"]["attempt"] == (2 if id == first else 1)
    assert "the worker group has ended" in service.log.read_text()
    tally("service: SIGKILL of a rank under the supervisor", 1, 1)


def test_ctrl_c_ends_all_of_it(service: WholeService, tally: Tally) -> None:
    """While a job runs that would take hours: nothing is left of the service, and the exit code is 0."""
    service.ask("/v1/videos", {"prompt": asked(1).prompt, "num_steps": 10_000})
    service.wait(lambda: service.ask("/v1/videos")["data"][0]["status"] == "in_progress")
    started = descendants(service.process.pid)
    assert len(started) >= 4
    os.kill(service.process.pid, signal.SIGINT)
    time.sleep(1.0)
    os.kill(service.process.pid, signal.SIGINT)
    assert service.process.wait(timeout=patience(LIMIT_S)) == 0
    until = time.monotonic() + patience(LIMIT_S)
    while any(alive(pid) for pid in started) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [pid for pid in started if alive(pid)]
    tally("service: Ctrl-C leaves no process", 1, 1)
