"""Disks that are full, broken, small or read-only: the run goes on a few saves long, and what it had stays good."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import pytest
import torch

from acceleration.checkpoint import CheckpointManager, SaveError, contents
from tests.dist.harness import run_distributed
from tests.faults import saving
from tests.faults.conftest import Tally
from tests.faults.saving import Where, every_call, newest_good, state

pytestmark = pytest.mark.timeout(280)
traced = pytest.mark.skipif(bool(saving.why_not_here()), reason=saving.why_not_here() or "-")

SAID = {"ENOSPC": "disk full", "EDQUOT": "disk full", "EIO": "disk error"}
# (errno, processes, in the background, where, rank)
Case = tuple[str, int, bool, Where, int]
CASES: list[Case] = [
    ("ENOSPC", 1, False, "training", 0),
    ("ENOSPC", 1, True, "training", 0),
    ("ENOSPC", 1, True, "writing", 0),
    ("ENOSPC", 2, False, "training", 1),
    ("EIO", 1, False, "training", 0),
    ("EIO", 1, True, "writing", 0),
]
SLOW: list[Case] = [
    *(("EDQUOT", *rest) for _, *rest in CASES[:4]),
    *(("EIO", 2, *rest) for rest in ((False, "training", 0), (False, "training", 1), (True, "writing", 1))),
    *(("ENOSPC", 2, *rest) for rest in ((False, "training", 0), (True, "training", 0), (True, "writing", 1))),
]


@traced
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_a_call_that_fails_costs_at_most_one_checkpoint(case: Case, tmp_path: Path, tally: Tally) -> None:
    name, world, in_background, where, rank = case
    number = 0
    for fault, outcome, _ in every_call(
        tmp_path, f"error={name}", world=world, in_background=in_background, where=where, rank=rank
    ):
        assert outcome.newest in ((1, 3), (2, 3)), (fault, outcome)
        if outcome.newest[0] == 1:  # no false success, and the cause is said
            line = outcome.said[1]
            answer = where == "writing" and fault.call == "write" and "writes checkpoints died" in line  # not to a disk
            assert answer or line.startswith(f"step 2: NOT SAVED, {SAID[name]}"), (fault, outcome)
        number += 1
    assert number >= 1
    tally(f"{name} at a file call, {'in the background' if in_background else 'at once'}, {where}", number, number)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB with 40 inodes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m,nr_inodes=40", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs leave to mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


TENSOR = {"model": {"weight": torch.arange(1 << 16, dtype=torch.float64)}}


def fill(disk: Path, how: str) -> None:
    """Leave a disk on which the next save fails."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    size = TENSOR["model"]["weight"].nbytes
    if how == "bytes":  # found before anything is written
        (disk / "filler").write_bytes(bytes(free - size // 2))
    elif how == "bytes, found while writing":
        (disk / "filler").write_bytes(bytes(free - size))  # the tensors fit, their names do not
    elif how == "inodes":
        with pytest.raises(OSError, match="No space"):
            for number in range(1000):
                (disk / f"filler-{number}").touch()
        (disk / "filler-0").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


def save_on_a_small_disk(disk: Path, how: str, in_background: bool) -> tuple[list[str], str]:
    """A good save, then four on a disk that refuses."""
    said: list[str] = []
    manager = CheckpointManager(disk / "checkpoints", keep=1, in_background=in_background, report=said.append)
    manager.save(1, TENSOR, {})
    manager.wait()
    fill(disk, how)
    ended = ""
    try:
        for step in (2, 3, 4, 5):
            manager.save(step, TENSOR, {})
            manager.wait()
    except SaveError as error:
        ended = str(error)
    manager.close()
    return said, ended


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("bytes", "disk full: "),
        ("bytes, found while writing", "disk full (No space left on device)"),
        ("inodes", "disk full (No space left on device)"),
        ("read-only", "disk error (Read-only file system)"),
    ],
)
def test_a_real_disk_that_refuses(small_disk: Path, how: str, cause: str, in_background: bool, tally: Tally) -> None:
    said, ended = run_distributed(save_on_a_small_disk, 1, small_disk, how, in_background)[0]
    assert [f"NOT SAVED, {cause}" in line for line in said] == [False, True, True, True]
    assert "the run goes on, 2 more may fail" in said[1]
    assert ended.startswith(f"3 checkpoints in a row could not be saved: {cause}")
    left = [path.name for path in (small_disk / "checkpoints").iterdir()]
    assert left == ["step-00000001"]
    found = contents(small_disk / "checkpoints/step-00000001")["model.weight"]
    assert torch.equal(found, TENSOR["model"]["weight"])
    tally("a real file system without space, inodes, or leave to write", 1, 1)


def slow_disk(folder: Path) -> tuple[list[str], bool]:
    """A save that is still being written when the next two are due; and whether training was let go meanwhile."""
    said: list[str] = []
    manager = CheckpointManager(folder, keep=0, in_background=True, report=said.append)
    manager.save(1, state(1, 0, 1), {})
    manager.wait()
    assert manager._writer is not None and manager._writer._process is not None
    writer = manager._writer._process.pid
    os.kill(writer, signal.SIGSTOP)
    manager.save(2, state(2, 0, 1), {})
    for _ in range(100):
        manager.poll()
    waited = len(said) > 1
    Timer(0.5, os.kill, (writer, signal.SIGCONT)).start()
    manager.save(3, state(3, 0, 1), {})  # waits for step 2, which is committed first
    assert said[1:] == [f"step 2: saved {folder}/step-00000002"]
    manager.wait()
    manager.close()
    return said, waited


def test_a_save_still_running_when_the_next_is_due_is_finished_first(tmp_path: Path, tally: Tally) -> None:
    said, waited = run_distributed(slow_disk, 1, tmp_path)[0]
    assert not waited
    assert [line.split(":")[0] for line in said] == ["step 1", "step 2", "step 3"]
    assert newest_good(tmp_path) == 3  # and each before it holds its own step
    tally("a disk slower than the interval between saves", 1, 1)
