"""torchrun for launch/torchrun.sh: exit codes are kept, some are final, and it says one line instead of pages.

Launchers of several machines meet by launch/member.py: that is the rendezvous which torch's agent sees here, and it
decides when processes are stopped and started.

What torch does with a signal is to end the processes after 30 seconds, saved or not, and to end with a traceback. Here
it is passed on to the processes, which save and leave with 75, and the launcher waits for them and ends as they do.
"""

import contextlib
import hashlib
import logging
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
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
        self._limit_s = self.patience_s = float(os.environ.get(LIMIT, LIMIT_S))
        self.farewell: Callable[[int], None] = lambda number: None  # what others hear when this launcher leaves alone

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
            self.farewell(self.number)
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
        os.write(2, f"{text}\n".encode(errors="replace"))


STOP = Stop()
ROOT = Path(__file__).resolve().parent.parent
SHOWN = 300  # characters of a command
if __name__ == "__main__":
    STOP.listen()  # before torch is imported, which takes long enough to be interrupted in
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.elastic.agent.server import api as server_api  # noqa: E402
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402
from torch.distributed.elastic.rendezvous import (  # noqa: E402
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.api import RendezvousError  # noqa: E402
from torch.distributed.launcher import api  # noqa: E402
from torch.distributed.run import main, parse_args  # noqa: E402

from acceleration.distributed.addresses import parse_endpoint  # noqa: E402
from launch.coordinator import Limits  # noqa: E402
from launch.member import Member, Place  # noqa: E402
from launch.rendezvous import FINAL, About, Order, RunEnded, State, host_name, python_version  # noqa: E402
from opensora.utils.files.code_digest import code_digest  # noqa: E402

QUIET = ("", ".agent.server.api", ".multiprocessing.api", ".multiprocessing.errors")
BACKEND = "machines"  # name of this rendezvous in torch's registry
NO_NAME = "opensora"  # of a run without --id
GRACE_S = 15  # for processes to end after a failure: their peers are gone, and they can agree on nothing
AGREED_S = 5.0  # for processes to leave by themselves when those of another machine have, having agreed to


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


class Machines(RendezvousHandler):
    """The rendezvous of several machines, as torch's agent sees it. Ranks meet at rank 0: launchers share no store."""

    def __init__(self, member: Member, run: str) -> None:
        self.member, self._run = member, run
        self.place: Place | None = None

    def get_backend(self) -> str:
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """Raises: RunEnded."""
        place = self.place = self.member.meet()
        rank_0 = RendezvousStoreInfo(place.address, place.port)
        return RendezvousInfo(dist.HashStore(), place.group_rank, place.group_size, rank_0)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nobody is kept from coming back."""

    def num_nodes_waiting(self) -> int:
        return 0  # the coordinator says when somebody is taken in

    def get_run_id(self) -> str:
        return self._run

    def shutdown(self) -> bool:
        self.member.close()
        return True


class MachineAgent(Agent):
    """The processes of one of several machines: started, watched and stopped as the coordinator says."""

    def _assign_worker_ranks(
        self, store: object, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        handler: Any = spec.rdzv_handler
        place: Place = handler.place
        self._remaining_restarts = spec.max_restarts - place.failures
        ranks = [(i, place.first_rank + i, place.world_size) for i in range(spec.local_world_size)]
        return [Worker(local, rank, role_rank=rank, world_size=n, role_world_size=n) for local, rank, n in ranks]

    def _invoke_run(self, role: str = "default") -> RunResult:
        """Round after round, until the coordinator ends the run.

        Raises:
            RunEnded: it did not end well.
        """
        group = self._worker_group
        handler: Any = group.spec.rdzv_handler
        while True:
            self._initialize_workers(group)
            order = self._watch(group, handler.member)
            self._end_processes(order, handler.member)
            group.state = WorkerState.STOPPED
            if order.is_ == "end" and order.code == 0:
                group.state = WorkerState.SUCCEEDED
                return RunResult(WorkerState.SUCCEEDED, {one.global_rank: None for one in group.workers})
            if order.is_ == "end":
                raise RunEnded(order.text, order.code)
            if order.text:
                say(order.text)

    def _watch(self, group: WorkerGroup, member: Member) -> Order:
        """Tells what becomes of the processes, until there is something to do."""
        told = False
        while True:
            time.sleep(group.spec.monitor_interval)
            order = member.order()
            if order is not None:
                return order
            state = None if told else self._state(group, member.round)
            if state is not None:
                member.tell(state)
                told = True

    def _state(self, group: WorkerGroup, number: int) -> State | None:
        """Of processes that have failed, or have all finished; None: they run."""
        codes = {rank: process.poll() for rank, process in self._processes().items()}
        if STOP.number and None in codes.values():  # each of them leaves or is killed
            return None
        failed = [rank for rank, code in codes.items() if code]
        if failed:
            rank = failed[0]
            code = STOP.code([codes[one] or 0 for one in failed])
            return State("failed", number, group.workers[rank].global_rank, code, STOP.number)
        return State("finished", number) if None not in codes.values() else None

    def _processes(self) -> "dict[int, subprocess.Popen[Any]]":
        context: Any = self._pcontext
        return {rank: handler.proc for rank, handler in context.subprocess_handlers.items()}

    def _end_processes(self, order: Order, member: Member) -> None:
        """Ask them to save and leave if there is time for that, and wait; kill them if there is none."""
        begun, saves = time.monotonic(), order.gentle or (order.is_ == "end" and order.code == SAVED)
        asked = bool(STOP.number)  # by the signal that this launcher has passed on
        wait_s = STOP.patience_s if saves else GRACE_S
        while self._alive() and time.monotonic() - begun < wait_s:
            agreed = order.is_ == "end" and order.code == SAVED and time.monotonic() - begun < AGREED_S
            if not asked and not agreed:
                asked = True
                self._signal(signal.SIGTERM)
            hurry = member.order() if order.gentle else None
            if hurry is not None and not hurry.gentle:  # with a machine gone they cannot agree to save
                wait_s = min(wait_s, time.monotonic() - begun + GRACE_S)
                order = hurry
            time.sleep(LOOK_S)
        self._signal(signal.SIGKILL)
        context: Any = self._pcontext
        context.close(signal.SIGKILL, GRACE_S)

    def _alive(self) -> bool:
        return any(process.poll() is None for process in self._processes().values())

    def _signal(self, number: int) -> None:
        """To those that live, and to what they have started."""
        for process in self._processes().values():
            if process.poll() is None:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, number)


def machines(member: Callable[[RendezvousParameters], Member], parameters: RendezvousParameters) -> RendezvousHandler:
    """What torch's registry asks for."""
    made = member(parameters)
    STOP.farewell = made.leave
    return Machines(made, parameters.run_id)


def make_member(about: About, parameters: RendezvousParameters) -> Member:
    """By the options that launch/torchrun.sh has read."""
    host, port = parse_endpoint(parameters.endpoint)
    limits = Limits(*(float(parameters.get(name)) for name in ("timeout", "last_call_timeout", "heartbeat_timeout")))
    return Member(host, port, about, limits, say, lambda: STOP.number if STOP.started else 0)


def about(argv: Sequence[str]) -> About:
    """This launcher."""
    given = parse_args(argv)
    least, _, most = given.nnodes.partition(":")
    words = [given.training_script, *given.training_script_args]
    return About(
        member=secrets.token_hex(8),
        host=host_name(),
        processes=int(given.nproc_per_node),
        nodes_min=int(least),
        nodes_max=int(most or least),
        restarts=given.max_restarts,
        run="" if given.rdzv_id == NO_NAME else given.rdzv_id,
        command=shown(words[:1] + [one for one in words[1:] if names_run(one)]),
        settings=shown([one for one in words[1:] if not names_run(one)]),
        torch=str(torch.__version__),
        python=python_version(),
        code=code_digest(),
    )


def names_run(word: str) -> bool:
    """Whether an argument says which run it is: the configuration, and where it is written."""
    return "=" not in word or word.startswith(("name=", "output="))


def shown(words: Sequence[str], root: Path = ROOT) -> str:
    """The same on machines that have the code in different folders; of long ones the beginning and a digest."""
    inside = [str(path.relative_to(root)) if (path := Path(one)).is_relative_to(root) else one for one in words]
    text = " ".join(inside)
    if len(text) <= SHOWN:
        return text
    return f"{text[:SHOWN]}... ({hashlib.sha256(chr(0).join(inside).encode(errors='replace')).hexdigest()[:12]})"


if __name__ == "__main__":
    for name in QUIET:
        logging.getLogger(f"torch.distributed.elastic{name}").setLevel(logging.CRITICAL)
    os.environ["OPENSORA_LAUNCHER_PID"] = str(os.getpid())
    argv = sys.argv[1:]
    several = argv[:1] != ["--standalone"]
    if several:
        server_api._get_fq_hostname = host_name  # torch would ask name servers, which may take long, for events
        rendezvous_handler_registry.register(BACKEND, partial(machines, partial(make_member, about(argv))))
    api.LocalElasticAgent = MachineAgent if several else Agent  # what torchrun makes; it has no option for it
    try:
        main(argv)
    except RunEnded as error:
        if str(error):
            say(str(error))
        sys.exit(error.exit_code)
    except RendezvousError as error:
        say(f"error: {' '.join(str(error).split())}")
        sys.exit(1)
    except ChildFailedError as error:
        first = error.get_first_failure()[1].exitcode
        sys.exit(STOP.code([first, *(failure.exitcode for failure in error.failures.values())]))
