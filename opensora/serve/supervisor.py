"""Web process and worker group as children of one command: started, started again after a failure, ended together.

Standard library only: this process lives as long as the service, and has nothing to do with torch. Children are in
sessions of their own, so that a terminal's Ctrl-C reaches this process alone, and get a signal when it is gone, however
it went.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from opensora.serve.address import address_of, free_port
from opensora.serve.config import ServeConfig
from opensora.utils.signal_handler import end_with_parent

LOOK_S = 0.2
ASK_S = 2.0  # between two questions whether the service is ready
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # before a child is started again; twice as long each time
MOST_FAILURES = 5  # in a row; one that has lived for ``SETTLED_S`` begins a new row
SETTLED_S = 300.0
MARGIN_S = 10.0  # beyond ``workers.grace_s``: for the queue, for processes to end
REFUSED = 2  # exit code of a child that its configuration keeps from starting
GROUP = "OPENSORA_SERVE_GROUP"  # names a group and its number, so that the next one takes over its jobs at once
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@dataclass
class Child:
    """A process that is to live as long as the service."""

    name: str
    command: Sequence[str]
    environment: Callable[[int], dict[str, str]] = lambda number: {}  # of start ``number``, from 0
    process: "subprocess.Popen[bytes] | None" = None
    starts: int = 0
    failures: int = 0  # in a row
    began: float = 0.0  # by time.monotonic
    again_at: float = field(default=0.0)

    def start(self) -> None:
        env = os.environ | self.environment(self.starts)
        self.starts, self.began = self.starts + 1, time.monotonic()
        self.process = subprocess.Popen(
            self.command, env=env, start_new_session=True, preexec_fn=lambda: end_with_parent(signal.SIGTERM)
        )

    @property
    def code(self) -> int | None:
        """None: it runs."""
        return None if self.process is None else self.process.poll()

    def ask(self, number: int) -> None:
        if self.process is not None and self.code is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """With all that it has started, as far as that is known; the number of one that has ended is nobody's, or
        another process's."""
        if self.process is None or self.code is not None:
            return
        for pid in [*descendants(self.process.pid), self.process.pid]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


class Supervisor:
    """The children of a service."""

    def __init__(self, children: Sequence[Child], address: str | None, grace_s: float) -> None:
        """
        Args:
            address: where the web process answers, which is said when the service is ready; None: there is none.
            grace_s: for children to end when they are asked to.
        """
        self.children, self.address, self.grace_s = list(children), address, grace_s
        self._asked = 0  # times that this process was asked to stop
        self._told, self._ask_at = address is None, 0.0

    def run(self) -> int:
        """Until it is asked to stop, or a child cannot be kept alive. Returns the exit code: 0 after a signal."""
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            for child in self.children:
                child.start()
            code = self._watch()
            self._end()
            return code
        finally:
            for child in self.children:
                child.kill()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: object) -> None:
        self._asked += 1

    def _watch(self) -> int:
        while not self._asked:
            for child in self.children:
                if (code := self._look(child)) is not None:
                    return code
            self._tell_address()
            time.sleep(LOOK_S)
        return 0

    def _tell_address(self) -> None:
        """Once, when the service is ready."""
        if self._told or time.monotonic() < self._ask_at:
            return
        self._ask_at = time.monotonic() + ASK_S
        if ready(self.address):
            self._told = True
            say(f"ready: {self.address}")

    def _look(self, child: Child) -> int | None:
        """Start a child again when its time has come. Returns an exit code if that is beyond hope."""
        now = time.monotonic()
        if child.again_at:
            if now >= child.again_at:
                child.again_at = 0.0
                child.start()
            return None
        if (code := child.code) is None:
            return None
        if code == REFUSED:  # it has said why
            return REFUSED
        child.failures = 1 if now - child.began >= SETTLED_S else child.failures + 1
        if child.failures > MOST_FAILURES:
            say(f"error: the {child.name} has ended {child.failures} times in a row, see above; the service stops")
            return 1
        wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (child.failures - 1))
        say(f"the {child.name} has ended, exit code {code}; it starts again in {wait_s:g} s")
        child.again_at = now + wait_s
        return None

    def _end(self) -> None:
        """Ask all children, and wait for them; a second signal, or the end of the grace, kills them."""
        asked = self._asked
        alive = [child for child in self.children if child.code is None]
        if asked:
            say(f"stopping: what runs may end within {self.grace_s:g} s; once more kills it")
        for child in alive:
            child.ask(signal.SIGTERM)
        until = time.monotonic() + self.grace_s + MARGIN_S
        while any(child.code is None for child in alive) and time.monotonic() < until and self._asked == asked:
            time.sleep(LOOK_S)
        if left := [child.name for child in alive if child.code is None]:
            say(f"killed: {', '.join(left)}")


def children_of(cfg: ServeConfig, words: Sequence[str], port: int) -> list[Child]:
    """Web process and group of a configuration.

    Args:
        words: file and overrides, as they were typed.
    """
    base = secrets.token_hex(8)

    def environment(number: int) -> dict[str, str]:
        threads = max(1, (os.cpu_count() or 1) // cfg.workers.processes)
        return {
            GROUP: f"{base}-{number}",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(cfg.workers.grace_s + MARGIN_S / 2)),
        }

    web = Child("web process", [sys.executable, "-m", "opensora.serve.web", *words, f"port={port}"])
    start = [sys.executable, "-m", "opensora.serve.worker.start", str(cfg.workers.processes), *words]
    return [web, Child("worker group", start, environment)] if cfg.workers.processes else [web]


def ready(address: str | None) -> bool:
    """Whether the web process answers, and a group is ready for jobs."""
    try:
        with urllib.request.urlopen(f"{address}/readyz", timeout=2.0) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False


def descendants(pid: int) -> list[int]:
    """All processes that a process has started, and they; on Linux."""
    found = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                for child in file.read().split():
                    found += [int(child), *descendants(int(child))]
    return found


def say(text: str) -> None:
    """One line; a terminal or a pipe that is gone is no reason to stop."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def serve(cfg: ServeConfig, words: Sequence[str]) -> int:
    """Returns the exit code.

    Raises:
        UserError: the address is none of this host, or in use: another service that answers there is not this one.
    """
    port = free_port(cfg.host, cfg.port)
    return Supervisor(children_of(cfg, words, port), address_of(cfg.host, port), cfg.workers.grace_s).run()
