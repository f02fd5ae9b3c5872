"""Requests to stop, from the first line of a program on. Standard library only: torch takes seconds to import.

A signal sets a flag that the run reads at its own pace. SIGTERM or SIGINT once more means at once: a thread that the
interpreter tells of signals ends the process, wherever it is, with 128 plus the signal's number. SIGUSR2 is a warning
that a batch script repeats until it is heeded, and says no more the second time.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

IMPATIENT = (signal.SIGTERM, signal.SIGINT)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)  # SLURM and torchrun, a terminal, SLURM's early warning
REPEAT_S = 1.0  # the same signal within this time came by two ways: from a terminal, and passed on by a launcher
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Asked:
    """What this process was asked. Make one per process, in its main thread."""

    def __init__(self) -> None:
        """Replaces what the signals did, which is to end the process."""
        self.name: str | None = None  # of the first signal
        self.lost: Callable[[], str] = lambda: "nothing was trained yet"  # by leaving at once; may be replaced
        self._saving = False
        self._first: dict[int, float] = {}
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True).start()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """While a checkpoint is written a second signal waits for it; a third does not."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def release(self) -> None:
        """Signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writing)

    def _remember(self, number: int, frame: object) -> None:
        self.name = self.name or signal.Signals(number).name

    def _listen(self, reading: int) -> None:
        while numbers := os.read(reading, 64):
            for number in numbers:
                if number in IMPATIENT:
                    self._count(number, time.monotonic())
        os.close(reading)

    def _count(self, number: int, now: float) -> None:
        if now - self._first.setdefault(number, now) < REPEAT_S:
            return
        name = signal.Signals(number).name
        if self._saving:
            self._saving = False
            _say(f"{name} again: leaving when the checkpoint is written; once more leaves now")
            return
        _say(f"{name} again: leaving at once, {self.lost()}")
        os._exit(128 + number)


def _say(text: str) -> None:
    """On rank 0. Not through the logger, whose lock the main thread may hold."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        os.write(sys.stderr.fileno(), f"{text}\n".encode())


_asked: Asked | None = None


def remember() -> Asked:
    """Signals are remembered from here on; the same object for every call."""
    global _asked
    if _asked is None:
        if "TORCHELASTIC_RUN_ID" in os.environ:  # of others the parent may be a shell that the run is to outlive
            end_with_parent(signal.SIGTERM)
        _asked = Asked()
    return _asked


def forget() -> None:
    """Signals do again what they did before ``remember``."""
    global _asked
    if _asked is not None:
        _asked.release()
    _asked = None


def end_with_parent(number: int) -> None:
    """This process gets the signal when the one that started it is gone, however it went (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
