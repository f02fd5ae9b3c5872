"""torchrun for launch/torchrun.sh: exit codes are kept, some are final, and it says one line instead of pages.

What torch does with a signal is to end the processes after 30 seconds, saved or not, and to end with a traceback. Here
it is passed on to the processes, which save and leave with 75, and the launcher waits for them and ends as they do.
"""

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
IMPATIENT = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)  # what a person sends again who does not want to wait
SAVED = 75  # exit code of processes whose state is on disk
REPEAT_S = 1.0  # the same signal within this time is one request that came by two ways
LOOK_S = 0.1  # between two looks at the processes
BEGIN_S = 30.0  # for a process that has just been started to listen to signals; torch is not imported before it does
PATIENCE_S = 10.0  # from the third request to the end by SIGKILL
ENDING_S = 10.0  # for this launcher to end after its processes
LIMIT = "OPENSORA_SHUTDOWN_TIMEOUT"  # seconds; set by launch/torchrun.sh
LIMIT_S = 3600.0  # the longest that saving may take: guard.save_s


class Stop:
    """What this launcher was asked, and a thread that passes it on; the main thread is in torch."""

    def __init__(self) -> None:
        self.number = 0  # of the first signal
        self.started = False  # there are processes, or there were
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[Any]] = []
        self._asked: list[float] = []  # when, each request once
        self._last: dict[int, float] = {}
        self._untold: list[tuple[subprocess.Popen[Any], int]] = []  # what has still to be passed on
        self._begun = 0.0  # when the processes were started
        self._over: float | None = None  # since when all processes have ended
        self._limit_s = float(os.environ.get(LIMIT, LIMIT_S))

    def listen(self) -> None:
        """From here on signals are passed on to the processes that will be started. In the main thread."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        for number in SIGNALS:
            # nohup has SIGHUP ignored, so that the run outlives its terminal.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._serve, args=(reading,), name="signals", daemon=True).start()

    def starting(self) -> threading.Lock:
        """To hold while processes are started: a signal that comes meanwhile is passed on when all are."""
        return self._lock

    def watch(self, processes: Sequence["subprocess.Popen[Any]"]) -> None:
        """The processes that were started, in place of earlier ones."""
        self._processes, self.started = list(processes), True
        self._begun, self._over = time.monotonic(), None
        self._untold = [(process, self.number) for process in processes if self.number]

    def _serve(self, reading: int) -> None:
        while True:
            came = select.select([reading], [], [], LOOK_S if self.number else None)[0]
            numbers = os.read(reading, 64) if came else b""
            with self._lock:
                for number in numbers:
                    if number in SIGNALS:
                        self._heard(number, time.monotonic())
                if self.number:
                    self._tell(time.monotonic())
                    self._look(time.monotonic())

    def _heard(self, number: int, now: float) -> None:
        again = number not in self._last or now - self._last[number] >= REPEAT_S
        if self.number and (not again or number not in IMPATIENT):
            return
        self._last[number] = now
        self._asked.append(now)
        self.number = self.number or number
        self._untold += [(process, number) for process in self._processes]

    def _tell(self, now: float) -> None:
        """Pass signals on to the processes that have handlers; to the others when they had time to begin."""
        later = []
        for process, number in self._untold:
            if process.poll() is None and not listens(process.pid, number) and now - self._begun < BEGIN_S:
                later.append((process, number))
            else:
                process.send_signal(number)  # does nothing where the process has ended
        self._untold = later

    def _look(self, now: float) -> None:
        """End what does not end by itself."""
        alive = [process for process in self._processes if process.poll() is None]
        if alive:
            waited = now - self._asked[0]
            if len(self._asked) > 2 and now - self._asked[2] > PATIENCE_S:
                self._kill(alive, f"{len(alive)} processes did not leave when they were asked the third time")
            elif waited > self._limit_s:
                self._kill(alive, f"{len(alive)} processes did not leave within {waited:.0f} s (--shutdown-timeout)")
        elif not self.started:
            say(f"{signal.Signals(self.number).name}: stopped before the first process was started, nothing is lost")
            os._exit(SAVED)
        else:
            self._over = self._over or now
            if now - self._over > ENDING_S:  # the main thread waits for other machines
                os._exit(self.code([process.returncode for process in self._processes]))

    def _kill(self, alive: Sequence["subprocess.Popen[Any]"], why: str) -> None:
        say(f"{why}: killed; what is on disk is the newest checkpoint")
        for process in alive:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)  # they were started in sessions of their own
        self._limit_s, self._asked = float("inf"), self._asked[:1]

    def code(self, codes: Sequence[int]) -> int:
        """The exit code that the codes of failed processes, the first one first, give after a signal."""
        if self.number and SAVED in codes:  # then all have saved, and one was ended while it left
            return SAVED
        first = next((code for code in codes if code), 0)
        return first if first >= 0 else 128 - first


def listens(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal, as far as the system tells."""
    try:
        with open(f"/proc/{pid}/status") as file:
            caught = next(line for line in file if line.startswith("SigCgt:"))
    except (OSError, StopIteration):
        return True
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def say(text: str) -> None:
    """One line; a terminal or a pipe that is gone is no reason to stop."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


STOP = Stop()
if __name__ == "__main__":
    STOP.listen()  # before torch is imported, which takes long enough to be interrupted in

import torch.distributed as dist  # noqa: E402
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402
from torch.distributed.launcher import api  # noqa: E402
from torch.distributed.run import main  # noqa: E402

FINAL = (2, SAVED)  # bad configuration, which would be refused again; stopped on purpose, the state is saved
QUIET = ("", ".agent.server.api", ".multiprocessing.api", ".multiprocessing.errors")
ANSWER_S = 10.0  # of a store that is alive


class Agent(api.LocalElasticAgent):
    """Starts processes again after a failure, but not after one that is final, or after a signal."""

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        with STOP.starting():
            pids: dict[int, Any] = super()._start_workers(worker_group)
            context: Any = self._pcontext
            STOP.watch([handler.proc for handler in context.subprocess_handlers.values()])
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            error = ChildFailedError("training", result.failures)
            rank, failure = error.get_first_failure()
            if failure.exitcode in FINAL or STOP.number:
                raise error
            left, most = self._remaining_restarts, worker_group.spec.max_restarts
            again = f"; starting again ({most - left + 1} of {most})" if left else ""
            say(f"rank {rank} failed first, exit code {failure.exitcode}{again}")
        return result


def check_endpoint(argv: list[str]) -> None:
    """End with one line if a stranger listens where the machines should meet: torch would wait for it without end."""
    if "--rdzv-endpoint" not in argv:
        return
    host, _, port = argv[argv.index("--rdzv-endpoint") + 1].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except OSError:
        return  # nobody is there yet
    limit = timedelta(seconds=ANSWER_S)
    probe = threading.Thread(target=lambda: dist.TCPStore(host, int(port), is_master=False, timeout=limit), daemon=True)
    probe.start()
    probe.join(ANSWER_S)
    if probe.is_alive():
        print(f"error: {host}:{port} is in use by another program; give --rendezvous another port", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # the probe cannot be ended


if __name__ == "__main__":
    for name in QUIET:
        logging.getLogger(f"torch.distributed.elastic{name}").setLevel(logging.CRITICAL)
    api.LocalElasticAgent = Agent  # what torchrun makes; it has no option for it
    os.environ["OPENSORA_LAUNCHER_PID"] = str(os.getpid())
    try:
        check_endpoint(sys.argv)
        main(sys.argv[1:])
    except ChildFailedError as error:
        first = error.get_first_failure()[1].exitcode
        sys.exit(STOP.code([first, *(failure.exitcode for failure in error.failures.values())]))
