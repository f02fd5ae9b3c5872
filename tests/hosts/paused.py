"""Training that stops in a phase until a test has done something: ``python paused.py SCRIPT ARGS...``.

PAUSE_IN: the phase (data, forward, update, save, ...), PAUSE_AT: the step, PAUSE_FOLDER: where every rank makes a file
``rank-N`` when it is there, and which it leaves when there is a file ``go``.
"""

import os
import runpy
import sys
import time
from pathlib import Path

from opensora.train.run import Run

LIMIT_S = 120.0
_enter = Run.enter
_paused: list[str] = []


def enter(run: Run, name: str) -> None:
    """The phase begins; the first time that it is the one asked for, it waits at once."""
    _enter(run, name)
    if "PAUSE_IN" not in os.environ or _paused:
        return
    if name == os.environ["PAUSE_IN"] and run.step >= int(os.environ["PAUSE_AT"]):
        _paused.append(name)
        folder, limit = Path(os.environ["PAUSE_FOLDER"]), time.monotonic() + LIMIT_S
        (folder / f"rank-{run.runtime.rank}").touch()
        while not (folder / "go").exists() and time.monotonic() < limit:
            time.sleep(0.02)


Run.enter = enter  # type: ignore
if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
