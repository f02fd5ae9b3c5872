"""A worker: a process in which stages run, one source at a time, and which may die of what it reads.

Whoever started it sees that it died, or ends it when a source takes too long, and starts another. It never loads torch
unless a stage does, limits its own memory, and ends with the process that started it, however that went.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
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
from opensora.utils.signal_handler import NAMES, SIGNALS, end_with_parent

START_S = 300.0  # an interpreter that comes over a busy network, on a machine with other work
_GRACE_S = 5.0  # beyond its time limit: most stages notice it themselves
_ROOT = Path(__file__).resolve().parents[1]
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
    """The end that asks. One thread at a time; ``close`` from any."""

    def __init__(self, stages: Mapping[str, Stage], limits: SourceLimits) -> None:
        self._setup = pickle.dumps((dict(stages), limits))
        self._limits = limits
        self._closed = False
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
        try:
            if self._process is None:
                self._start()
            self._connection.send((stage, unit))
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
        raise UserError(value)

    def close(self) -> None:
        """End the process, also where it hangs."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
            process.wait()

    def _lost(self, reason: str, *, too_slow: bool = False) -> Exception:
        process, self._process = self._process, None
        if process is not None:
            if too_slow:
                process.kill()
            code = process.wait()
            reason = reason or _death(code)
            self._connection.close()
        return WorkerClosed() if self._closed else WorkerLost(reason or "did not start", too_slow=too_slow)

    def _start(self) -> None:
        if self._closed:
            raise WorkerClosed
        self._connection, theirs = Pipe()
        path = os.pathsep.join([str(_ROOT), *(entry for entry in sys.path if entry)])
        with _signals_held():
            self._process = subprocess.Popen(
                [sys.executable, "-m", "data_pipeline.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | _THREADS | {"PYTHONPATH": path},
            )
        theirs.close()  # only the process holds it now, so that its death is an end of file here
        self._connection.send_bytes(self._setup)
        if not self._connection.poll(START_S):
            raise RuntimeError(f"a worker process did not start within {START_S:g} s")
        try:
            self._connection.recv()
        except (EOFError, OSError):
            if self._closed:
                raise WorkerClosed from None
            code = self._process.wait()
            raise RuntimeError(f"a worker process could not start ({_death(code)}), see above") from None


def _death(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"its process was killed by {signal.Signals(-code).name}{hint}"


@contextlib.contextmanager
def _signals_held() -> Any:
    """The process starts with these signals blocked: a terminal sends them to all of a command, and whoever started a
    worker ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def main(argv: list[str]) -> None:
    """The process. ``argv``: the file descriptor of the connection."""
    for name in NAMES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
    connection = Connection(int(argv[0]))
    stages, limits = pickle.loads(connection.recv_bytes())
    _limit_memory(limits.memory_mib)
    connection.send(None)
    while True:
        try:
            stage, unit = connection.recv()
            connection.send(_answer(stages[stage], unit, limits))
        except (EOFError, OSError):
            return


def _answer(stage: Stage, unit: Unit, limits: SourceLimits) -> tuple[str, Any]:
    from opensora.datasets.decode.common import DecodeError

    try:
        return "rows", to_bytes(to_table(stage.run(unit), stage.columns))
    except DecodeError as error:
        return "failed", ("unreadable", error.cause)
    except SourceError as error:
        return "failed", (error.kind, str(error))
    except MemoryError:
        return "failed", ("memory", f"it asks for more than limits.memory_mib={limits.memory_mib} MiB of memory")
    except UserError as error:
        return "stop", str(error)
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


if __name__ == "__main__":
    main(sys.argv[1:])
