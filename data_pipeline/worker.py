"""A worker: a process in which stages run, one source at a time, and which may die of what it reads.

Whoever started it sees that it died, or ends it when a source takes too long, and starts another. It never loads torch
unless a stage does, limits its own memory, and ends with the process that started it, however that went.
"""

import errno
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipeline.limits import SourceLimits
from data_pipeline.rows import from_bytes, to_bytes, to_table
from data_pipeline.stages.base import SourceError, Stage, Unit
from opensora.utils.errors import UserError, one_line
from opensora.utils.signal_handler import SIGNALS, end_with_parent, inherited_by_nobody

START_S = 300.0  # an interpreter that comes over a busy network, on a machine with other work
_STARTS = 10  # in a row that may be killed: by a system short of memory, or who takes them for stray processes
_END_S = 30.0  # for a process that has closed its end; a core dump takes a while
_GRACE_S = 5.0  # beyond its time limit: most stages notice it themselves
_ROOT = Path(__file__).resolve().parents[1]
_OF_OUTPUTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # errors that no source is to blame for
# Not by -m, which would take the code that lies in the folder one is in.
_PROGRAM = "import sys; sys.path.pop(0); from data_pipeline.worker import main; main(sys.argv[1:])"
# A worker is one core; libraries that would start a thread for every core of the machine are told so.
_THREADS = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM", "ORT_NUM_THREADS"), "1"
)


class WorkerLost(Exception):
    """The process died, or was ended as it took too long; another one is there for the next source."""

    def __init__(self, reason: str, *, too_slow: bool = False) -> None:
        super().__init__(reason)
        self.too_slow = too_slow


class WorkerClosed(Exception):
    """``Worker.close`` was called meanwhile."""


class Failed(Exception):
    """The source is to blame: its rows are this error."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Worker:
    """The end that asks. One thread at a time; ``close`` from any.

    The process ends with the *thread* that called first (as Linux has it), so that one must live as long.
    """

    def __init__(self, stages: Mapping[str, Stage], limits: SourceLimits) -> None:
        self._setup = pickle.dumps((dict(stages), limits))
        self._with_models = {name for name, stage in stages.items() if stage.resources.models}
        self._last = ""  # stage that the process has run
        self._limits = limits
        self._closed = threading.Event()
        self._failed_starts = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def run(self, stage: str, unit: Unit) -> pa.Table:
        """The rows of one source, with the stage's columns.

        Raises:
            Failed: the source is to blame.
            WorkerLost: the process died; its next call starts another.
            WorkerClosed: it was closed.
            UserError: not the source's fault: the output cannot be written.
        """
        fresh = self._ask(stage, unit)
        try:
            if self._connection.poll(self._limits.time_s + _GRACE_S):
                kind, value = self._connection.recv()
            else:
                raise self._lost(f"took longer than limits.time_s={self._limits.time_s:g} s", too_slow=True)
        except (EOFError, OSError):
            raise self._lost("") from None
        if kind == "rows":
            return from_bytes(value)
        if kind == "failed":
            raise Failed(*value)
        if kind == "stop":
            raise UserError(value)
        self._lost("", too_slow=True)
        if fresh:
            raise Failed("memory", value)
        return self.run(stage, unit)  # in a process that holds nothing of the sources before

    def _ask(self, stage: str, unit: Unit) -> bool:
        """Returns whether the process is a new one. One that is found dead has died of nothing in the unit."""
        if self._last != stage and self._last in self._with_models and self._process is not None:
            self._lost("", too_slow=True)  # what it holds, and the libraries behind it, are of no more use
        self._last = stage
        for _ in range(_STARTS):
            fresh = self._process is None
            if fresh:
                self._start()
            try:
                self._connection.send((stage, unit))
                return fresh
            except OSError:
                self._lost("", too_slow=True)
        raise RuntimeError(f"{_STARTS} worker processes ended before they were asked anything")

    def close(self) -> None:
        """End the process, also where it hangs."""
        self._closed.set()
        process = self._process
        if process is not None:
            process.kill()
            process.wait()

    def _lost(self, reason: str, *, too_slow: bool = False) -> Exception:
        process, self._process = self._process, None
        if process is not None:
            if too_slow:
                process.kill()
            code = _ended(process)
            reason = reason or _death(code)
            self._connection.close()
        return WorkerClosed() if self._closed.is_set() else WorkerLost(reason or "did not start", too_slow=too_slow)

    def _start(self) -> None:
        if self._closed.is_set():
            raise WorkerClosed
        self._connection, theirs = Pipe()
        try:
            self._process = self._started(theirs.fileno())
        except OSError as error:
            raise UserError(
                f"a worker process cannot be started ({error.strerror}); ask for fewer by engine.workers"
            ) from None
        finally:
            theirs.close()  # only the process holds it now, so that its death is an end of file here
        if self._closed.is_set():  # meanwhile, and did not see it
            self._process.kill()
        self._greet(self._process)

    def _started(self, descriptor: int) -> "subprocess.Popen[bytes]":
        path = os.pathsep.join([str(_ROOT), *(entry for entry in sys.path if entry)])
        with inherited_by_nobody():
            return subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(descriptor)],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                env=os.environ | _THREADS | {"PYTHONPATH": path},
            )

    def _greet(self, process: "subprocess.Popen[bytes]") -> None:
        """Say what there is to do, and wait until it is ready. One that dies meanwhile dies of no source."""
        try:
            self._connection.send_bytes(self._setup)
            if self._connection.poll(START_S):
                self._connection.recv()
                self._failed_starts = 0
                return
            reason = f"did not start within {START_S:g} s"
            process.kill()
        except (EOFError, OSError):
            reason = "could not start"
        self._process = None
        code = _ended(process)
        if self._closed.is_set():
            raise WorkerClosed from None
        self._failed_starts += 1
        if code < 0 and self._failed_starts < _STARTS:
            return self._start()
        if code < 0:
            raise UserError(
                f"a worker process {reason} {_STARTS} times in a row ({_death(code)}); ask for fewer by engine.workers"
            )
        raise RuntimeError(f"a worker process {reason} ({_death(code)}), see above")


def _ended(process: "subprocess.Popen[bytes]") -> int:
    """Its exit code."""
    try:
        return process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _death(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"its process was killed by {signal.Signals(-code).name}{hint}"


def main(argv: list[str]) -> None:
    """The process. ``argv``: the file descriptor of the connection."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
    connection = Connection(int(argv[0]))
    stages, limits = pickle.loads(connection.recv_bytes())
    _limit_memory(limits.memory_mib)
    connection.send(None)
    known: set[str] = set()  # stages that have run: their libraries are imported
    while True:
        try:
            stage, unit = connection.recv()
            answer = _answer(stages[stage], unit, limits)
            gc.collect()  # decoders and encoders hold each other: few objects, and much memory behind them
            if stage not in known:
                known.add(stage)
                gc.freeze()  # else every collection goes through all that was imported, 40 ms a source and stage
            connection.send(answer)
        except (EOFError, OSError):
            return


def _answer(stage: Stage, unit: Unit, limits: SourceLimits) -> tuple[str, Any]:
    from opensora.datasets.decode.common import DecodeError, TooSlow

    try:
        return "rows", to_bytes(to_table(stage.run(unit), stage.columns))
    except TooSlow:
        return "failed", ("timeout", f"took longer than limits.time_s={limits.time_s:g} s")
    except DecodeError as error:
        return "failed", ("unreadable", error.cause)
    except SourceError as error:
        return "failed", (error.kind, str(error))
    except MemoryError:
        return "memory", f"it asks for more than limits.memory_mib={limits.memory_mib} MiB of memory"
    except UserError as error:
        return "stop", str(error)
    except OSError as error:
        if error.errno in _OF_OUTPUTS:
            return "stop", f"{error.filename or stage.name}: cannot be written ({error.strerror})"
        return "failed", ("unreadable", one_line(str(error)))
    except Exception as error:  # whatever a library makes of a damaged file must not end the run
        traceback.print_exc()
        return "failed", ("mistake", f"{type(error).__name__}: {one_line(str(error))}")


def _limit_memory(mib: int) -> None:
    """Of what this process allocates; files that are mapped do not count."""
    if sys.platform == "linux":  # elsewhere the limit is another one, or none
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        limit = mib << 20 if most == resource.RLIM_INFINITY else min(most, mib << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
