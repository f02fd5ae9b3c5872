"""A group that is asked to stop before it has a job."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.patience import patience

pytestmark = pytest.mark.timeout(900)
LIMIT_S = 120.0
CONFIG = "models: {demo: {sample: configs/sample/shapes.yaml}}\nout: "


def hears(pid: int, number: int) -> bool:
    """Whether a process has its own way with a signal."""
    told = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()
    return bool(told) and bool(int(told[0], 16) >> (number - 1) & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("command", [["opensora.serve.worker"], ["opensora.cli.serve", "--worker-only"]])
def test_it_leaves_at_once_while_it_is_being_loaded(tmp_path: Path, command: list[str]) -> None:
    """Importing and loading take a minute, in which there is nothing to be saved."""
    (tmp_path / "serve.yaml").write_text(f"{CONFIG}{tmp_path / 'out'}\n")
    words = [sys.executable, "-m", command[0], str(tmp_path / "serve.yaml"), *command[1:]]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"RANK": "0"})
    until = time.monotonic() + patience(LIMIT_S)
    while not hears(process.pid, signal.SIGTERM) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=patience(LIMIT_S))
    assert (process.returncode, said) == (0, "stopped by SIGTERM: no job was begun\n")
