"""kill -9 at every file system call of a save: the newest checkpoint is the old one or the new one, bit for bit."""

import os
import time
from pathlib import Path

import pytest

from tests.faults import saving
from tests.faults.conftest import Tally
from tests.faults.saving import NO_FAULT, every_call, run
from tests.patience import patience

pytestmark = [
    pytest.mark.skipif(bool(saving.why_not_here()), reason=saving.why_not_here() or "-"),
    pytest.mark.timeout(600),
]


@pytest.mark.parametrize(
    ("world", "in_background", "rank"),
    [(1, False, 0), (1, True, 0), (2, False, 0), (2, False, 1), (2, True, 0), (2, True, 1)],
)
def test_a_killed_process_leaves_the_old_checkpoint_or_the_new_one(
    world: int, in_background: bool, rank: int, tmp_path: Path, tally: Tally
) -> None:
    newest = []
    for fault, outcome, place in every_call(
        tmp_path, "signal=KILL", world=world, in_background=in_background, rank=rank
    ):
        assert outcome.killed and outcome.newest[0] in (1, 2), (fault, outcome)
        newest.append(outcome.newest[0])
        last = place
    assert len(newest) >= (1 if rank else 20), newest  # in the background another rank only hands its part over
    if not rank:
        assert set(newest) == {1, 2}  # the rename is among the calls
        # Whoever goes on there finds nothing in the way, and leaves nothing behind.
        assert run(last, world, in_background, NO_FAULT).newest == (2, 3)
        assert os.listdir(last / "checkpoints") == ["step-00000003"]
    kind = "in the background" if in_background else "at once"
    tally(f"kill -9 at a file call: saving {kind}, rank {rank} of {world}", len(newest), len(newest))


@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_writer_costs_one_checkpoint(world: int, tmp_path: Path, tally: Tally) -> None:
    number = 0
    for fault, outcome, _ in every_call(
        tmp_path, "signal=KILL", world=world, in_background=True, where="writing", rank=world - 1
    ):
        assert outcome.newest == (1, 3), (fault, outcome)
        assert "NOT SAVED, the process that writes checkpoints died (exit code -9)" in outcome.said[1]
        number += 1
    assert number >= 10
    tally(f"kill -9 of the writer at a file call, rank {world - 1} of {world}", number, number)


def test_no_writer_outlives_its_run(tmp_path: Path) -> None:
    """The process that writes has a session of its own: it must end by itself."""
    fault = saving.Fault(what="signal=KILL", call="rename", number=1)
    assert run(tmp_path / "run", 1, True, fault).killed
    (pid,) = (tmp_path / "run" / "writers").read_text().split()
    deadline = time.monotonic() + patience(10)
    while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)
