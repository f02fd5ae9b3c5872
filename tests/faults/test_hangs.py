"""Processes that stand still: found in time, named with phase and exchange, every stack written, exit code 70."""

import json
import os
import re
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from acceleration.diagnostics.watchdog import LOOK_S, PEERS_S, RankState, Watchdog, verdict, where
from tests.conftest import ROOT
from tests.dist.harness import DistributedFailure, run_distributed
from tests.faults.conftest import Tally
from tests.faults.runs import Fault, alive, descendants, run_with
from tests.patience import patience

HANG_S = 4.0
KINDS = {
    "sleep": (Fault("sleep", step=2, rank=1), "step 2, encode: does not wait for others", "in <lambda>"),
    "lock": (Fault("lock", step=2, rank=1), "step 2, encode: does not wait for others", "in match"),
    "slow load": (Fault("slow load", rank=1), "step 0, load: does not wait for others", "in <lambda>"),
    "mismatch": (Fault("mismatch", step=2, rank=-1), "processes wait in different exchanges", "waits in recv"),
    "stop": (Fault("stop", step=2, rank=1), "step 2, encode: does not wait for others", "T (stopped)"),
}
DEFAULT = ("sleep", "mismatch")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in DEFAULT else pytest.mark.slow) for k in KINDS])
def test_a_hang_is_named_in_time(kind: str, config: Path, tmp_path: Path, tally: Tally) -> None:
    fault, named, detail = KINDS[kind]
    limits = [f"guard.hang_s={HANG_S}", f"guard.start_s={HANG_S if kind == 'slow load' else 60}"]
    started = time.time()
    with pytest.raises(DistributedFailure) as failure:
        run_distributed(run_with, 2, config, [f"output={tmp_path}", *limits], (fault,), timeout=60, init=False)
    (folder,) = (tmp_path / "run/hangs").iterdir()
    report = (folder / "report.txt").read_text()
    assert report.startswith("HANG: no progress for") and named in report and detail in report
    codes = [line.rpartition(" ")[2] for line in str(failure.value).splitlines() if "exit code" in line]
    assert codes[0] == "70" and set(codes) <= {"70", "-9"}  # -9: was stopped, or ended by the harness
    places = {}
    for rank in (0, 1):
        head, _, stacks = (folder / f"rank-{rank:05d}.txt").read_text().partition("\n")
        places[rank] = json.loads(head)
        assert "most recent call first" in stacks or (kind, rank) == ("stop", 1)
    if kind != "mismatch":
        suspects = [line for line in report.splitlines() if line.startswith("suspect")]
        assert len(suspects) == 1 and "suspect: rank 1 " in suspects[0]
        assert places[0]["exchange"] and not places[1]["exchange"]
    late = max(place["since_s"] for place in places.values())
    assert HANG_S <= late <= HANG_S + LOOK_S + PEERS_S + 4
    assert (folder / "report.txt").stat().st_mtime - started < 60
    tally("hang: process, phase and exchange named in time, exit code 70", 1, 1)


def test_who_holds_the_lock_of_the_interpreter_ends_with_70_too(config: Path, tmp_path: Path) -> None:
    with pytest.raises(DistributedFailure, match="exit code 70"):
        overrides = [f"output={tmp_path}", "guard.hang_s=0.5", "guard.start_s=60"]
        run_distributed(run_with, 1, config, overrides, (Fault("lock", step=1),), timeout=60, init=False)


def stands_in_nobodys_way(folder: Path) -> None:
    watchdog = Watchdog(folder, 0, 1, 1000.0)
    watchdog.phase("save", 3, 1000.0)
    folder.mkdir()  # as the process beside another rank does
    time.sleep(60)


def test_a_process_that_may_still_wait_reports_when_another_hangs(tmp_path: Path) -> None:
    with pytest.raises(DistributedFailure, match="exit code 70"):
        run_distributed(stands_in_nobodys_way, 1, tmp_path / "hang", timeout=40, init=False)
    assert "step 3, save: does not wait" in (tmp_path / "hang/report.txt").read_text()


def train_command(path: Path, overrides: list[str]) -> "subprocess.Popen[str]":
    start = ["bash", str(ROOT / "launch/torchrun.sh"), "2", str(ROOT / "scripts/diffusion/train.py"), str(path)]
    return subprocess.Popen([*start, *overrides], stderr=subprocess.PIPE, text=True, start_new_session=True)


def program(pid: int) -> str:
    """Name of the first Python file in a command line."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return next((Path(word).name for word in words if word.endswith(".py")), "")


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("stopped", ["train.py", "writer_process.py", "watchdog.py"])
def test_a_stopped_process_ends_the_command_with_70(stopped: str, config: Path, tmp_path: Path, tally: Tally) -> None:
    """A process that trains, or writes a checkpoint; nothing is left. A watchdog that is stopped harms nobody: the run
    ends as it should, when it is asked to."""
    limits = ["guard.hang_s=5", "guard.save_s=5"]
    process = train_command(config, [f"output={tmp_path}", "train.steps=100000", *limits])
    deadline = time.monotonic() + patience(200)
    while not list((tmp_path / "run/checkpoints").glob("step-*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    family = descendants(process.pid)
    pids = [pid for pid in family if program(pid) == stopped]
    os.kill(pids[1], signal.SIGSTOP)
    if stopped == "watchdog.py":
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=200)
    assert process.returncode == (75 if stopped == "watchdog.py" else 70), said
    if stopped != "watchdog.py":
        assert "HANG: no progress" in said and ("T (stopped)" in said or stopped == "writer_process.py")
    while left := [pid for pid in family if alive(pid)]:
        assert time.monotonic() < deadline + 100, left
        time.sleep(0.1)
    tally("hang: process, phase and exchange named in time, exit code 70", 1, 1)


def test_a_run_that_is_only_slow_is_left_alone(config: Path, tmp_path: Path) -> None:
    """Micro-batches of 0.5 s, of which three take longer than one phase may."""
    faults = (Fault("slow", rank=-1, value=0.5),)
    overrides = [f"output={tmp_path}", "train.steps=3", "guard.hang_s=1.4"]
    assert {outcome.end for outcome in run_distributed(run_with, 1, config, overrides, faults, init=False)} == {
        "finished"
    }
    assert not (tmp_path / "run/hangs").exists()


def test_without_a_watchdog_nothing_watches(config: Path, tmp_path: Path) -> None:
    faults = (Fault("slow", rank=-1, value=0.6),)
    overrides = [f"output={tmp_path}", "train.steps=3", "guard.hang_s=0", "guard.start_s=0.5"]
    assert run_distributed(run_with, 1, config, overrides, faults, init=False)[0].end == "finished"


STACKS = """Thread 0x00007f0000000002 (most recent call first):
  File "/x/threading.py", line 320 in wait

Current thread 0x00007f0000000001 (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 2810 in all_reduce
  File "/x/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/x/acceleration/signals.py", line 28 in agreed
"""


def test_the_exchange_is_read_from_a_stack() -> None:
    assert where(STACKS, 0x7F0000000001)[0] == "all_reduce"
    assert where(STACKS, 0x7F0000000002) == ("", 'File "/x/threading.py", line 320 in wait')
    assert where("", 1) == ("", "stack unknown")


def place(rank: int, exchange: str, step: int = 5, state: str = "S (sleeping)") -> RankState:
    return RankState(
        rank=rank, host=f"n{rank}", pid=100 + rank, step=step, phase="forward", since_s=9.0, late=True,
        exchange=exchange, line="File x", state=state,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("places", "said", "not_said"),
    [
        ([place(0, "all_reduce"), place(1, "")], ["suspect: rank 1 (n1, pid 101), step 5"], "suspect: rank 0"),
        ([place(0, "all_reduce"), place(1, "all_reduce", state="T (stopped)")], ["suspect: rank 1"], "suspect: all"),
        ([place(0, "all_reduce")], ["rank 1: no word", "rank 0: step 5, forward: waits in"], "suspect"),
        ([place(0, "all_reduce"), place(1, "all_gather")], ["suspect: processes wait in different"], "no word"),
        ([place(0, "all_reduce"), place(1, "all_reduce", 4)], ["suspect: processes wait in different"], "no word"),
        ([place(0, "all_reduce"), place(1, "all_reduce")], ["suspect: all wait in the same exchange"], "no word"),
    ],
)
def test_what_to_look_at_first(places: list[RankState], said: list[str], not_said: str) -> None:
    text = verdict(places, 2)
    assert all(part in text for part in said) and not_said not in text


def test_a_host_that_is_silent_or_cut_off_is_named() -> None:
    """All of its ranks in one line; what it has lost is said by its own ranks."""
    names = ["a", "a", "b", "b"]
    here, there = (
        [replace(place(rank, "all_reduce"), host=names[rank]) for rank in ranks] for ranks in ((0, 1), (2, 3))
    )
    assert "rank 2, 3 (b): no word, their host is gone or cut off\n" in verdict(here, 4, names)
    assert "rank 3 (b): no word, its process or its host is gone\n" in verdict([*here, there[0]], 4, names)
    assert "the network between a, b, or a process" in verdict([*here, *there], 4, names)
    cut = [replace(one, network="eth0 has no carrier") for one in there]
    text = verdict([*here, *cut], 4, names)
    assert re.findall(r"suspect: rank (\d).*; its host: eth0 has no carrier\n", text) == ["2", "3"]
    assert text.count("suspect") == 2 and "rank 0, 1: step 5, forward: waits in all_reduce" in text
