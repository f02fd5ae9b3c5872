"""A decoder in a process of its own, which can be killed when it hangs and started again when it dies."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from opensora.datasets.decode.api import MediaInfo
from opensora.datasets.decode.common import WHITE, Colour, DecodeError, Resize
from opensora.datasets.decode.worker import IGNORED_SIGNALS, SharedFrames

START_S = 120.0  # an interpreter that has to come over a busy network
PATIENCE = 1.2  # of a sample's time limit: its process notices most delays itself, and need not be killed then
PATIENCE_S = 2.0

_ROOT = Path(__file__).resolve().parents[3]


class ReadFrames(Protocol):
    """``opensora.datasets.decode.api.read_frames``, here or in another process."""

    def __call__(
        self,
        path: str,
        start: int,
        count: int,
        interval: int = 1,
        *,
        span: int | None = None,
        resize: Resize | None,
        threads: int,
        decoder: str,
        timeout_s: float,
        background: Colour = WHITE,
    ) -> np.ndarray:
        """The frames; they need to last only until the next call."""


class DecoderLost(DecodeError):
    """The process that read this file hung or died. Another one is there for the next."""


class ReaderClosed(Exception):
    """``DecoderProcess.close`` was called meanwhile."""


class DecoderProcess:
    """Reads windows in a process of its own, one at a time; it ends with the process that made it."""

    def __init__(self) -> None:
        self.reading = ""  # the file at work, for messages
        self.since = time.monotonic()  # it began, or the last one ended
        self._closed = False
        self._started = False  # it has said so
        self._guard = threading.Lock()  # between starting again and closing
        self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def __call__(
        self,
        path: str,
        start: int,
        count: int,
        interval: int = 1,
        *,
        span: int | None = None,
        resize: Resize | None,
        threads: int,
        decoder: str,
        timeout_s: float,
        background: Colour = WHITE,
    ) -> np.ndarray:
        """See ``read_frames``; the array is overwritten by the next call.

        Raises:
            DecodeError: as there.
            DecoderLost: the process hung or died.
            ReaderClosed: it was closed.
            RuntimeError: a mistake of ours, with the traceback of the process.
        """
        request = {"path": path, "start": start, "count": count, "interval": interval, "span": span}
        request |= {"resize": resize, "threads": threads, "decoder": decoder, "timeout_s": timeout_s}
        request["background"] = background
        return self._shared.array(self._answer(request))

    def probe(self, path: str, *, timeout_s: float) -> MediaInfo:
        """See ``opensora.datasets.decode.api.probe``.

        Raises:
            DecodeError, DecoderLost, ReaderClosed, RuntimeError: as for frames.
        """
        facts: MediaInfo = self._answer({"path": path, "timeout_s": timeout_s, "probe": True})
        return facts

    def close(self) -> None:
        """End the process, also where it hangs. May be called from any thread."""
        with self._guard:
            self._closed = True
            self._process.kill()
        self._process.wait()

    def _answer(self, request: dict[str, Any]) -> Any:
        path = request["path"]
        self.reading, self.since = path, time.monotonic()
        try:
            kind, value = self._ask(request, request["timeout_s"] * PATIENCE + PATIENCE_S)
        finally:
            self.reading, self.since = "", time.monotonic()
        if kind == "unreadable":
            raise DecodeError(path, value)
        if kind == "mistake":
            raise RuntimeError(f"{path}: the decoding process failed:\n{value}")
        return value

    def _ask(self, request: dict[str, Any], limit_s: float) -> Any:
        try:
            if not self._started:
                if not self._connection.poll(START_S):
                    raise RuntimeError(f"a decoding process did not start within {START_S:g} s")
                self._connection.recv()
                self._started, self.since = True, time.monotonic()
            self._connection.send(request)
            if self._connection.poll(limit_s):
                return self._connection.recv()
            reason = f"the decoding process (pid {self.pid}) hung for {limit_s:.0f} s and was killed"
        except (EOFError, OSError):
            if not self._started and not self._closed:
                code = self._process.wait()
                raise RuntimeError(f"a decoding process could not start (exit code {code}), see above") from None
            reason = f"the decoding process (pid {self.pid}) {_death(self._process)}"
        self._start_again()
        raise DecoderLost(request["path"], reason)

    def _start_again(self) -> None:
        with self._guard:
            self._process.kill()
            self._process.wait()
            self._connection.close()
            self._memory.close()
            if self._closed:
                raise ReaderClosed
            self._start()

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        # Not shared memory by name: nothing is left behind, and no small /dev/shm can overflow.
        self._memory = os.fdopen(os.memfd_create("frames"), "r+b") if hasattr(os, "memfd_create") else _scratch_file()
        self._shared = SharedFrames(self._memory.fileno())
        fds = (theirs.fileno(), self._memory.fileno())
        path = os.pathsep.join([str(_ROOT), *(entry for entry in sys.path if entry)])
        with _signals_held():
            self._process = subprocess.Popen(
                [sys.executable, "-m", "opensora.datasets.decode.worker", *map(str, fds)],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path},
            )
        theirs.close()  # only the process holds it now, so its death is an end of file here
        self._started = False


def _scratch_file() -> Any:
    return tempfile.TemporaryFile()


def _death(process: "subprocess.Popen[bytes]") -> str:
    code = process.wait()
    if code >= 0:
        return f"ended with exit code {code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


@contextmanager
def _signals_held() -> Iterator[None]:
    """A process starts with these signals blocked, and so never gets them; this thread has them right afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [getattr(signal, name) for name in IGNORED_SIGNALS])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
