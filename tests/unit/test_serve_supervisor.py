"""The supervisor of a service, with children that are a line of Python each."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from opensora.serve import supervisor
from opensora.serve.address import address_of, free_port, listen
from opensora.serve.config import ServeConfig, WorkersConfig
from opensora.serve.supervisor import Child, Supervisor, children_of, serve
from opensora.utils.errors import UserError
from tests.conftest import ROOT
from tests.faults.runs import alive
from tests.patience import patience

pytestmark = pytest.mark.timeout(900)
WAIT_S = 60.0  # for what takes a moment on a machine with nothing else to do
SLEEPS = "import time; time.sleep(600)"
IGNORES = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('{}', 'w').close(); time.sleep(600)"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(supervisor, "LOOK_S", 0.01)


def child(name: str, code: str) -> Child:
    return Child(name, [sys.executable, "-c", code])


def when(condition: object, act: object) -> None:
    """``act()`` in a thread as soon as ``condition()`` holds, if it does."""

    def wait() -> None:
        until = time.monotonic() + patience(WAIT_S)
        while not (holds := condition()) and time.monotonic() < until:  # type: ignore[operator]
            time.sleep(0.02)
        if holds:
            act()  # type: ignore[operator]

    threading.Thread(target=wait, daemon=True).start()


@pytest.fixture(autouse=True)
def late() -> Iterator[None]:
    """A signal that comes when the supervisor has left already does not end the tests."""
    before = signal.signal(signal.SIGINT, lambda *of: None)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_ends_all_children(capfd: pytest.CaptureFixture[str]) -> None:
    children = [child("one", SLEEPS), child("two", SLEEPS)]
    when(lambda: all(one.process for one in children), interrupt)
    assert Supervisor(children, None, 30.0).run() == 0
    assert [one.code for one in children] == [-signal.SIGTERM] * 2
    assert "stopping: what runs may end within 30 s" in capfd.readouterr().err


def test_a_second_ctrl_c_kills_what_stays(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stays = child("stubborn", IGNORES.format(tmp_path / "there"))
    when((tmp_path / "there").exists, lambda: (interrupt(), time.sleep(0.5), interrupt()))
    assert Supervisor([stays], None, 600.0).run() == 0
    assert stays.code == -signal.SIGKILL and "killed: stubborn" in capfd.readouterr().err


def test_the_end_of_the_grace_kills_what_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MARGIN_S", 0.2)
    stays = child("stubborn", IGNORES.format(tmp_path / "there"))
    when((tmp_path / "there").exists, interrupt)
    assert Supervisor([stays], None, 0.1).run() == 0
    assert stays.code == -signal.SIGKILL


def test_a_child_that_fails_is_started_again_but_not_for_ever(capfd: pytest.CaptureFixture[str]) -> None:
    fails = child("group", "raise SystemExit(7)")
    assert Supervisor([fails, child("web", SLEEPS)], None, 5.0).run() == 1
    said = capfd.readouterr().err
    assert fails.starts == supervisor.MOST_FAILURES + 1 and said.count("exit code 7; it starts again in") == 5
    assert "error: the group has ended 6 times in a row" in said


def test_a_child_that_has_lived_long_begins_a_new_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "SETTLED_S", 0.0)
    fails = child("group", "raise SystemExit(7)")
    when(lambda: fails.starts > 2 * supervisor.MOST_FAILURES, interrupt)
    assert Supervisor([fails], None, 5.0).run() == 0 and fails.failures <= 1


def test_a_child_that_refuses_its_configuration_ends_the_service() -> None:
    web = child("web", SLEEPS)
    assert Supervisor([child("group", "raise SystemExit(2)"), web], None, 5.0).run() == 2
    assert web.code == -signal.SIGTERM


def test_children_end_with_the_supervisor(tmp_path: Path) -> None:
    """However it goes."""
    tells = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    code = (
        "import sys; from opensora.serve.supervisor import Child, Supervisor\n"
        f"Supervisor([Child('one', [sys.executable, '-c', '{tells}'])], None, 5.0).run()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert alive(pid)
    process.kill()
    process.wait()
    until = time.monotonic() + patience(WAIT_S)
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(pid)


class Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Nothing."""


def test_the_address_is_said_when_the_service_is_ready(capfd: pytest.CaptureFixture[str]) -> None:
    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = address_of("127.0.0.1", server.server_port)
        made = Supervisor([child("web", SLEEPS)], address, 5.0)
        when(lambda: made._told, interrupt)
        assert made.run() == 0
        server.shutdown()
    assert f"ready: {address}" in capfd.readouterr().err


def test_children_of_a_configuration() -> None:
    cfg = ServeConfig(workers=WorkersConfig(processes=3, grace_s=20))
    web, group = children_of(cfg, ["serve.yaml", "weights=x"], 8123)
    assert web.command[1:] == ["-m", "opensora.serve.web", "serve.yaml", "weights=x", "port=8123"]
    assert group.command[1:] == ["-m", "opensora.serve.worker.start", "3", "serve.yaml", "weights=x"]
    first, second = group.environment(0), group.environment(1)
    name, _, number = first[supervisor.GROUP].rpartition("-")
    assert number == "0" and second[supervisor.GROUP] == f"{name}-1"
    assert int(first["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > cfg.workers.grace_s
    alone = children_of(ServeConfig(workers=WorkersConfig(processes=0)), ["serve.yaml"], 1)
    assert [one.name for one in alone] == ["web process"]
    assert address_of("0.0.0.0", free_port("127.0.0.1")).startswith("http://127.0.0.1:")


@pytest.mark.parametrize("host", ["192.0.2.1", "nosuch.invalid"])
def test_an_address_that_is_none_of_this_host_is_refused_before_a_child_is_started(host: str) -> None:
    for port in (0, 18431):
        with pytest.raises(UserError, match=f"host={host} port={port}: .*; take another"):
            serve(ServeConfig(host=host, keys="keys.txt", port=port), ["no.yaml"])


def test_a_port_where_another_service_answers_is_refused_before_a_child_is_started() -> None:
    with listen("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port={port}: Address already in use"):
            serve(ServeConfig(port=port), ["no.yaml"])
