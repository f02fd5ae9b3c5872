"""Requests to stop, from the first line of a program on. Standard library only: torch takes seconds to import.

Training (``install``): a signal sets a flag that the run reads at its own pace. SIGTERM, SIGINT or SIGQUIT once more
means at once: a thread that the interpreter tells of signals ends the process, wherever it is, with 128 plus the
signal's number. SIGUSR1 and SIGUSR2 are warnings that a batch script repeats until they are heeded, and a terminal that
closes sends SIGHUP more than once: these say no more the second time.

Sampling and encoding ahead (``leave_when_asked``): the same thread ends the process at the first signal, after the file
that is being written; the main thread may be in an exchange with others, and cannot be asked. A group of workers does
so until its models are loaded (``stay_when_asked``).

Commands of one process (``stopped_in_one_line``): a signal is an exception, so that what was written aside is removed.
Before that, while their modules are imported (``listen_early``), nothing is there to be removed. Raised while an
object is finalized it would be lost: then it is raised once more.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

# SLURM, launchers and service managers, a terminal (Ctrl-C, its end, Ctrl-\), early warnings of batch systems.
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
IMPATIENT = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGQUIT") if hasattr(signal, name))
LAUNCHER = "OPENSORA_LAUNCHER_PID"  # set by launch/elastic.py
AGAIN_S, MOST_TRIES = 0.01, 100  # after which a signal that nobody heard is raised once more, and how often
REPEAT_S = 1.0  # the same signal within this time came by two ways: from a terminal, and passed on by a launcher
_ENDS = (signal.SIG_DFL, signal.default_int_handler)  # what ends a program that says nothing of signals
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class SignalHandler:
    """What this process was asked. Make one per process, in its main thread."""

    def __init__(self, stays: str | None = None, code: int | None = None) -> None:
        """Replaces what the signals did, which is to end the process.

        Args:
            stays: end the process at the first signal, with this text; None: a flag is set, the process ends itself.
            code: exit code of that end; None: 128 plus the signal's number.
        """
        self.name: str | None = None  # of the first signal
        self.lost: Callable[[], str] = lambda: "nothing was trained yet"  # by leaving at once; may be replaced
        self.promise = ""  # said at the first signal; may be replaced
        self._stays, self._code = stays, code
        self._saving = self._leaving = False
        self._first: dict[int, float] = {}
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS if _wanted(number)}
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True).start()

    def stay(self) -> None:
        """From now on a signal sets a flag, where it has ended the process until now."""
        self._stays = None

    @contextmanager
    def saving(self) -> Iterator[None]:
        """While a file is written: a signal that would end the process waits for it, the next one does not."""
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
                if number in self._before:
                    self._heard(number, time.monotonic())
        os.close(reading)

    def _heard(self, number: int, now: float) -> None:
        """A signal came; called in the thread that listens."""
        first = not self._first
        again = now - self._first.setdefault(number, now) >= REPEAT_S
        name = signal.Signals(number).name
        if self._stays is not None:
            if first or again:
                self._leave(128 + number if self._code is None else self._code, f"stopped by {name}: {self._stays}")
        elif first and self.promise:
            _say(f"{name}: {self.promise}" + (f"; {name} again leaves at once" if number in IMPATIENT else ""))
        elif again and number in IMPATIENT:
            self._leave_a_run(number, name)

    def _leave(self, code: int, text: str) -> None:
        """After the file that is being written; at once if this was asked before."""
        if self._saving and not self._leaving:
            self._leaving = True
            threading.Thread(target=self._leave_later, args=(code, text), daemon=True).start()
            return
        _say(text)
        os._exit(code)

    def _leave_later(self, code: int, text: str) -> None:
        while self._saving:
            time.sleep(0.01)
        _say(text)
        os._exit(code)

    def _leave_a_run(self, number: int, name: str) -> None:
        if self._saving:
            self._saving = False
            _say(f"{name} again: leaving when the checkpoint is written; once more leaves now")
            return
        _say(f"{name} again: leaving at once, {self.lost()}")
        os._exit(128 + number)


def _wanted(number: int) -> bool:
    """nohup has SIGHUP ignored, so that the process outlives its terminal; this stays so."""
    return number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN


def _say(text: str) -> None:
    """On rank 0. Not through the logger, whose lock the main thread may hold."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        with contextlib.suppress(OSError, ValueError):  # a terminal or a pipe that is gone must not keep the process
            os.write(sys.stderr.fileno(), f"{text}\n".encode())


_asked: SignalHandler | None = None


def install() -> SignalHandler:
    """Signals are remembered from here on; the same object for every call."""
    global _asked
    if _asked is None:
        _asked = _ask()
    return _asked


def leave_when_asked(stays: str, code: int | None = None) -> SignalHandler:
    """For a command without a state to save: a signal ends the process with one line, which says what ``stays``.

    Files are written inside ``writing()``, so that they are whole.

    Args:
        code: exit code; None: 128 plus the signal's number.
    """
    global _asked
    assert _asked is None
    _asked = _ask(stays, code)
    return _asked


def stay_when_asked() -> None:
    """After ``leave_when_asked``: from here on there is something to be saved. Does nothing where none is heard."""
    if _asked is not None:
        _asked.stay()


@contextmanager
def writing() -> Iterator[None]:
    """While a file is written: a signal that ends this process ends it afterwards. Does nothing where none would."""
    with _asked.saving() if _asked is not None else contextlib.nullcontext():
        yield


class Stopped(KeyboardInterrupt):
    """A signal, where it interrupts what the main thread does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def listen_early() -> None:
    """For the first line of a command of one process: until ``stopped_in_one_line`` begins, a signal ends it at once,
    with one line and 128 plus the signal's number, instead of a traceback from the middle of an import."""
    for number in SIGNALS:
        if signal.getsignal(number) in _ENDS:  # not what nohup has ignored
            signal.signal(number, _end_early)


def _end_early(number: int, frame: object) -> NoReturn:
    _say(f"stopped by {signal.Signals(number).name}: nothing was begun")
    os._exit(128 + number)


@contextmanager
def stopped_in_one_line(stays: str = "") -> Iterator[None]:
    """For a command of one process: a signal ends what is done inside as an exception does, then the program with one
    line and 128 plus the signal's number. Leaves alone what ``install`` or ``leave_when_asked`` set up.

    Args:
        stays: what the line says beyond the signal's name.
    """
    if _asked is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    ends = (*_ENDS, _end_early)
    replaced = {number: signal.signal(number, _raise) for number in SIGNALS if signal.getsignal(number) in ends}
    try:
        with _raised_again_where_nobody_hears():
            yield
    except KeyboardInterrupt as stop:
        number = getattr(stop, "number", signal.SIGINT)
        _say(f"stopped by {signal.Signals(number).name}{stays and f': {stays}'}")
        raise SystemExit(128 + number) from None
    finally:
        for number, handler in replaced.items():
            if signal.getsignal(number) in (_raise, signal.SIG_IGN):
                signal.signal(number, signal.SIG_DFL if handler is _end_early else handler)


def _raise(number: int, frame: object) -> NoReturn:
    for other in SIGNALS:  # the same request by another way must not cut short what is tidied up now
        if signal.getsignal(other) is _raise:
            signal.signal(other, signal.SIG_IGN)
    raise Stopped(number)


@contextmanager
def _raised_again_where_nobody_hears() -> Iterator[None]:
    """A signal may come while Python finalizes an object or calls back from C, as torch does all the time: what
    is raised there is printed, and the program goes on. Here it is raised once more, a little later."""
    before = sys.unraisablehook
    timers: list[threading.Timer] = []

    def hook(caught: "sys.UnraisableHookArgs") -> None:
        if not isinstance(caught.exc_value, Stopped):
            return before(caught)
        number = caught.exc_value.number
        if len(timers) == MOST_TRIES:
            _say(f"stopped by {signal.Signals(number).name}")
            os._exit(128 + number)
        signal.signal(number, _raise)
        timers.append(threading.Timer(AGAIN_S, signal.pthread_kill, (threading.main_thread().ident, number)))
        timers[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()


@contextmanager
def inherited_by_nobody() -> Iterator[None]:
    """Processes that are started inside do not get these signals, which a terminal sends to all of a command; whoever
    started them ends them. This thread has them right afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def uninstall() -> None:
    """Signals do again what they did before ``install``."""
    global _asked
    if _asked is not None:
        _asked.release()
    _asked = None


def end_process(code: int) -> NoReturn:
    """End this process, whose work is done and whose exit code is decided; no signal changes it any more.

    What is buffered is written, and functions of ``atexit`` run. Modules are not taken down, which takes seconds with
    torch; a terminal or a pipe that is gone does not change the exit code either.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _ask(stays: str | None = None, code: int | None = None) -> SignalHandler:
    launched = "TORCHELASTIC_RUN_ID" in os.environ  # of others the parent may be a shell that the run is to outlive
    if launched:
        end_with_parent(signal.SIGTERM)
    asked = SignalHandler(stays, code)
    if launched and _launcher_is_gone():  # before the line above
        os.kill(os.getpid(), signal.SIGTERM)
    return asked


def _launcher_is_gone() -> bool:
    text = os.environ.get(LAUNCHER, "")
    is_number = text.isascii() and text.isdecimal() and len(text) < 10
    launcher = int(text) if is_number else 0  # a value that launch/elastic.py did not write says nothing
    if not launcher or os.getppid() == launcher:
        return False
    try:
        os.kill(launcher, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # the number belongs to somebody else's process by now
        return True
    return os.getppid() == 1  # it has ended, and nobody has asked for its exit code yet


def end_with_parent(number: int) -> None:
    """This process gets the signal when the one that started it is gone, however it went (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
