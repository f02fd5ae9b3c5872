"""However a process ends, those beside it end as well, also when somebody has stopped them."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from acceleration.checkpoint import async_writer
from acceleration.checkpoint.async_writer import BackgroundWriter
from acceleration.diagnostics import watchdog
from acceleration.diagnostics.watchdog import Watchdog
from tests.dist.harness import DistributedFailure, run_distributed
from tests.faults.conftest import Tally
from tests.faults.runs import alive
from tests.patience import patience

pytestmark = pytest.mark.timeout(600)
WITHIN_S = 30.0  # much more than it takes; a stopped process that is not ended stays for ever


def one_more_child(make: Callable[[], object]) -> int:
    """The process that ``make`` starts."""
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    before = set(children.read_text().split())
    make()
    (pid,) = set(children.read_text().split()) - before
    return int(pid)


def writer(folder: Path, *, busy: bool) -> tuple[object, int]:
    """The process that writes checkpoints, stopped with nothing to do or with a file to write."""
    writing = BackgroundWriter()
    pid = one_more_child(lambda: writing.start(folder / "first", {"x": torch.zeros(10)}))
    writing.result()
    os.kill(pid, signal.SIGSTOP)
    if busy:
        writing.start(folder / "second", {"x": torch.zeros(10)})
    return writing, pid


def beside(folder: Path) -> tuple[object, int]:
    """The process that watches, stopped when it watches."""
    watching: list[Watchdog] = []
    pid = one_more_child(lambda: watching.append(Watchdog(folder / "hang", 0, 1, 1000.0)))
    while b"watchdog.py" not in Path(f"/proc/{pid}/cmdline").read_bytes() or "S" not in state(pid):
        time.sleep(0.05)
    time.sleep(0.5)  # it has asked to be told of the end of this process
    os.kill(pid, signal.SIGSTOP)
    return watching[0], pid


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


STOPPED = {
    "idle writer": lambda folder: writer(folder, busy=False),
    "busy writer": lambda folder: writer(folder, busy=True),
    "watchdog": beside,
}


def ends(kind: str, how: str, folder: Path) -> None:
    """Start and stop a process beside this one, then end."""
    async_writer.CLOSE_S = watchdog.CLOSE_S = 1.0
    one, pid = STOPPED[kind](folder)
    while state(pid) != "T":
        time.sleep(0.01)
    (folder / "pid").write_text(str(pid))
    if how == "closes":
        one.close()  # type: ignore[attr-defined]
    elif how == "hangs":
        os._exit(watchdog.HUNG)
    elif how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "fails":
        raise RuntimeError("a mistake")


@pytest.mark.parametrize("how", ["closes", "hangs", "is killed", "fails"])
@pytest.mark.parametrize("kind", STOPPED)
def test_a_stopped_process_does_not_stay(kind: str, how: str, tmp_path: Path, tally: Tally) -> None:
    try:
        run_distributed(ends, 1, kind, how, tmp_path, timeout=60, init=False)
    except DistributedFailure:
        assert how != "closes"
    pid, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + patience(WITHIN_S)
    while alive(pid):
        assert time.monotonic() < deadline, state(pid)
        time.sleep(0.02)
    tally("a stopped writer or watchdog ends with its rank, however that ends", 1, 1)
