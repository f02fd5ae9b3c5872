"""A web process of the service, as it is started, for tests; with a worker that is none."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from opensora.config.load import load_config
from opensora.serve.config import ServeConfig
from opensora.serve.queues import open_queue
from opensora.serve.store import Store
from tests.conftest import ROOT
from tests.faults.runs import descendants
from tests.patience import patience
from tests.stand_in_worker import StandIn

START_S, STOP_S, WAIT_S = 60.0, 60.0, 60.0
LONG_S = 400.0  # for what takes seconds of a model on a machine with nothing else to do
CONFIG = "models: {toy: {}}\nquota: {free_gib: 0.0}\n"
T = TypeVar("T")


class ServiceProcess:
    """Runs until ``stop``; ``with`` does that.

    Attributes:
        url: where it listens.
        out: its folder.
    """

    def __init__(self, folder: Path, *overrides: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "serve.yaml"
        config.write_text(CONFIG)
        self.out = folder / "out"
        words = [str(config), f"out={self.out}", "port=0", *overrides]
        self._command = [sys.executable, "-m", "opensora.serve.web", *words]
        store = Store(self.out)
        self._worker = StandIn(open_queue(load_config(ServeConfig, config, words[1:]), store), store)
        self._start()

    def _start(self) -> None:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(self._command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        said = wait_for(lambda: re.search(r"web: (http://\S+)\n", self.log()), "the address", START_S, self.is_alive)
        self.url = said[1]
        self.port = int(self.url.rpartition(":")[2])

    def restart(self, number: int = signal.SIGTERM) -> None:
        """The web process alone, on the same folder; it has another port."""
        self.process.send_signal(number)
        self.process.wait(patience(STOP_S))
        self._start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def log(self) -> str:
        return "".join(self.lines)

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit code."""
        if self.is_alive():
            self.process.send_signal(number)
        try:
            return self.process.wait(STOP_S)
        finally:
            self.process.kill()
            self._reader.join(STOP_S)
            self._worker.stop()

    def __enter__(self) -> "ServiceProcess":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()


def wait_for(
    look: Callable[[], T | None], what: str, limit_s: float = WAIT_S, goes_on: Callable[[], bool] = lambda: True
) -> T:
    """What ``look`` finds, once it does."""
    end = time.monotonic() + patience(limit_s)
    while not (found := look()):
        assert time.monotonic() < end and goes_on(), f"no {what} within {limit_s:g} s"
        time.sleep(0.02)
    return found


class WholeService:
    """``python -m opensora.cli.serve`` and a client of it."""

    def __init__(self, config: Path, log: Path, *more: str) -> None:
        self.log = log
        words = [str(config), "port=0", "workers.processes=2", *more]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "opensora.cli.serve", *words], cwd=ROOT, stderr=log.open("wb"), stdout=log.open("ab")
        )
        self.wait(lambda: "ready: http" in log.read_text())
        self.address = log.read_text().partition("ready: http")[2].split()[0]

    def wait(self, condition: Callable[[], Any]) -> Any:
        until = time.monotonic() + patience(LONG_S)
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
        with urllib.request.urlopen(request, timeout=patience(60)) as answer:
            return json.load(answer)

    def is_ready(self) -> bool:
        try:
            return bool(self.ask("/readyz"))
        except urllib.error.HTTPError as error:
            assert error.code == 503
            return False

    def rank(self, number: int) -> int | None:
        """Process id of a process of the group, as long as it lives."""
        for pid in descendants(self.process.pid):
            with contextlib.suppress(OSError):
                if f"\0RANK={number}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes() + b"\0":
                    return pid
        return None
