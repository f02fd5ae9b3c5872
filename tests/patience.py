"""How long to wait for what a machine does sooner or later: seconds of an idle one, made longer where this one is busy.

A limit of a test is there to end what hangs. In seconds it is either too long everywhere or too short on a machine that
does other things too; ``patience(60)`` is what takes a minute on an idle machine, as long as it takes on this one now.
A test that waits so needs a ``timeout`` mark that leaves room for it.
"""

import contextlib
import os
import subprocess
import sys
import time

MOST = 10.0  # times: beyond it a machine does nothing else, and what hangs must end
_REFERENCE_S = 0.3  # a process of Python that imports numpy, on an idle machine
_LASTS_S = 20.0  # a measurement
_PROGRAM = [sys.executable, "-c", "import numpy"]

_measured: tuple[float, float] = (-_LASTS_S, 1.0)  # when, and what was found


def patience(seconds: float) -> float:
    """As many seconds of an idle machine, on this one as it is now: never fewer, at most ``MOST`` times as many."""
    return seconds * slowness()


def slowness() -> float:
    """How many times slower than an idle machine this one is, from 1 to ``MOST``; measured every ``_LASTS_S``."""
    global _measured
    when, found = _measured
    if time.monotonic() - when >= _LASTS_S:
        found = min(MOST, max(1.0, start_s() / _REFERENCE_S, waiting()))
        _measured = time.monotonic(), found
    return found


def start_s() -> float:
    """Seconds until a process of Python has started, has read a library from the disk and has ended."""
    begun = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):  # as long as it may count
        subprocess.run(_PROGRAM, capture_output=True, timeout=MOST * _REFERENCE_S, check=False)
    return time.monotonic() - begun


def waiting() -> float:
    """Processes that want to run, of the last minute, for every core."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:  # no such thing on this system
        return 1.0
