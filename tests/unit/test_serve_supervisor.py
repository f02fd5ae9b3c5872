"""The supervisor of a service, with children that are a line of Python each."""

import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from opensora.serve import supervisor
from opensora.serve.address import address_of, free_port, listen
from opensora.serve.config import ServeConfig, WorkersConfig
from opensora.serve.supervisor import Child, children_of, serve
from opensora.utils.errors import UserError
from tests.conftest import ROOT
from tests.faults.runs import alive
from tests.patience import patience
from tests.supervised import WAIT_S, Supervised

pytestmark = pytest.mark.timeout(900)
IGNORES = "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
FAILS = "raise SystemExit(7)"


def told(file: Path) -> str:
    """Code of a child that says in a file that it has begun."""
    return f"import signal, time; open({str(file)!r}, 'a').write('.'); "


def sleeps(file: Path, before: str = "") -> str:
    return f"import signal; {before}{told(file)}time.sleep(600)"


def test_ctrl_c_ends_all_children(tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "two"]
    run = Supervised({file.name: sleeps(file) for file in files}, grace_s=30.0)
    run.interrupt(lambda: all(file.exists() for file in files))
    result, said = run.result()
    assert result["code"] == 0 and [one["code"] for one in result["children"].values()] == [-signal.SIGTERM] * 2
    assert "stopping: what runs may end within 30 s" in said


def test_a_second_ctrl_c_kills_what_stays(tmp_path: Path) -> None:
    run = Supervised({"stubborn": sleeps(tmp_path / "there", IGNORES)}, grace_s=600.0)
    run.interrupt((tmp_path / "there").exists)
    assert run.process.stderr is not None
    assert "once more kills it" in run.process.stderr.readline()
    run.interrupt(lambda: True)
    result, said = run.result()
    assert result["code"] == 0 and result["children"]["stubborn"]["code"] == -signal.SIGKILL
    assert "killed: stubborn" in said


def test_the_end_of_the_grace_kills_what_stays(tmp_path: Path) -> None:
    run = Supervised({"stubborn": sleeps(tmp_path / "there", IGNORES)}, grace_s=0.1, MARGIN_S=0.2)
    run.interrupt((tmp_path / "there").exists)
    result, _ = run.result()
    assert result["code"] == 0 and result["children"]["stubborn"]["code"] == -signal.SIGKILL


def test_a_child_that_fails_is_started_again_but_not_for_ever(tmp_path: Path) -> None:
    result, said = Supervised({"group": FAILS, "web": sleeps(tmp_path / "there")}).result()
    assert result["code"] == 1 and result["children"]["group"]["starts"] == supervisor.MOST_FAILURES + 1
    assert said.count("exit code 7; it starts again in") == supervisor.MOST_FAILURES
    assert "error: the group has ended 6 times in a row" in said


def test_a_child_that_has_lived_long_begins_a_new_row(tmp_path: Path) -> None:
    file = tmp_path / "starts"
    run = Supervised({"group": told(file) + FAILS}, SETTLED_S=0.0)
    run.interrupt(lambda: file.exists() and len(file.read_text()) > 2 * supervisor.MOST_FAILURES)
    result, _ = run.result()
    assert result["code"] == 0 and result["children"]["group"]["failures"] <= 1


def test_a_child_that_refuses_its_configuration_ends_the_service(tmp_path: Path) -> None:
    result, _ = Supervised({"group": "raise SystemExit(2)", "web": sleeps(tmp_path / "there")}).result()
    assert result["code"] == 2 and result["children"]["web"]["code"] == -signal.SIGTERM


def test_what_has_ended_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be another process's by then."""
    child = Child("ended", [sys.executable, "-c", ""])
    child.start()
    assert child.process is not None and child.process.wait() == 0
    monkeypatch.setattr(supervisor.os, "kill", lambda pid, number: pytest.fail(f"kills {pid}"))
    child.kill()


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


def test_the_address_is_said_when_the_service_is_ready(tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = address_of("127.0.0.1", server.server_port)
        run = Supervised({"web": sleeps(tmp_path / "there")}, address=address)
        assert run.process.stderr is not None and run.process.stderr.readline() == f"ready: {address}\n"
        run.interrupt((tmp_path / "there").exists)
        assert run.result()[0]["code"] == 0
        server.shutdown()


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
