"""Training with faults: ``python faulty.py SCRIPT ARGS...`` runs the script with what the environment asks for.

FAULTY_SLEEP_S: seconds that every step takes more. FAULTY_CRASH_AT: the step at which rank 1 always fails.
FAULTY_KILL_AT: the step at which rank 1 is killed, in the first attempt under torchrun.
FAULTY_HOOKS: a folder in which ``step-N`` is made when rank 0 begins step N, for a test to wait for.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

from opensora.train.run import Run

_lr_at = Run.lr_at


def lr_at(run: Run, step: int) -> float:
    """Called once at the start of a step."""
    time.sleep(float(os.environ.get("FAULTY_SLEEP_S", 0)))
    if "FAULTY_HOOKS" in os.environ and run.runtime.is_main:
        Path(os.environ["FAULTY_HOOKS"], f"step-{step}").touch()
    if step == int(os.environ.get("FAULTY_CRASH_AT", -1)) and run.runtime.rank == 1:
        raise RuntimeError(f"fails at step {step}, always")
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if step == int(os.environ.get("FAULTY_KILL_AT", -1)) and run.runtime.rank == 1 and first:
        os.kill(os.getpid(), signal.SIGKILL)
    return _lr_at(run, step)


Run.lr_at = lr_at  # type: ignore[method-assign]
if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
