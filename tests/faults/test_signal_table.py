"""Every signal to everything that can receive one: exit code, time, state on disk, what is left behind.

The default run has a few; ``-m slow`` has all, three times each. The table is printed with -s, and kept up to
date in a file while the tests run:

    OPENSORA_SIGNAL_TABLE=table.md python -m pytest -m "slow or not slow" -s tests/faults/test_signal_table.py
"""

import json
import os
import pty
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from acceleration.checkpoint.atomic_dir import read_manifest
from tests.conftest import ROOT
from tests.faults.conftest import Tally
from tests.faults.runs import descendants
from tests.faults.test_launch import SRUN, stub
from tests.patience import patience

SILENT_S = 60.0  # without a word, and without a tick of computing by any of its processes: then a command hangs
DEAF_STEPS = 200  # made after a signal: then nobody has heard it
LOOK_S = 2.0  # between two looks at that
SLOW_STEP_S = 8.0  # in which a second signal comes
TIMES = int(os.environ.get("OPENSORA_SIGNAL_TIMES", 3))
# To the whole of it, so that the reader ends with the signal, and nobody reads what the run says.
PIPELINE = ["bash", "-c", 'trap : TERM INT HUP QUIT USR1 USR2; "$@" 2>&1 | cat >&2; exit ${PIPESTATUS[0]}', "-"]
ROW = "signal x receiver: exit code, state and leftovers as promised"
MARK = "OPENSORA_TEST_COMMAND"  # in the environment of everything that a command starts
THE_END = "the end of the command"
SIGNALS = {
    "TERM": [signal.SIGTERM],
    "INT": [signal.SIGINT],
    "HUP": [signal.SIGHUP],
    "QUIT": [signal.SIGQUIT],
    "USR1": [signal.SIGUSR1],
    "USR2": [signal.SIGUSR2],
    "TERM, TERM": [signal.SIGTERM, signal.SIGTERM],
    "INT, INT": [signal.SIGINT, signal.SIGINT],
}
LEAVES = ("TERM, TERM", "INT, INT")  # at once
RECEIVERS = (
    "torchrun.sh",
    "one rank",
    "batch script",
    "one process",
    "a terminal",
    "a pipeline",
    "its process group",
    "torchrun",
)
KEYS = {signal.SIGINT: b"\x03", signal.SIGQUIT: b"\x1c"}  # what a terminal makes these of
TABLE: dict[tuple[str, str], list["Ending"]] = defaultdict(list)  # by signal and receiver


@dataclass(frozen=True)
class Ending:
    """What became of a run after a signal."""

    code: int
    seconds: float  # from the (last) signal to the end of the command
    saved: int  # step of the newest checkpoint that is whole
    reached: int  # newest step that the run wrote about
    said: str
    logs: str  # of the ranks, under SLURM
    again: bool  # the job was queued again
    processes: tuple[str, ...]  # command lines of those that were left
    files: tuple[str, ...]  # left in the folder for temporary files, or half-written in the run's


class Command:
    """A training command in a session of its own, whose processes and temporary files can all be found."""

    def __init__(self, receiver: str, config: Path, folder: Path, overrides: list[str], sleep_s: float = 0.0) -> None:
        self.receiver, self.run, self.tmp = receiver, folder / "run", folder / "tmp"
        self.tmp.mkdir(parents=True)
        self.mark = uuid.uuid4().hex
        self.sent: list[int] = []
        self.said = folder / "said"
        script = [str(ROOT / "tests/faults/faulty.py"), str(ROOT / "scripts/diffusion/train.py")]
        environment = os.environ | {"TMPDIR": str(self.tmp), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHON": sys.executable, "FAULTY_SLEEP_S": str(sleep_s), MARK: self.mark}
        arguments, terminal = [str(config), f"output={folder}", "train.steps=100000", *overrides], None
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        words = {
            "one process": [sys.executable, *script],
            "torchrun": [*torchrun, *script],
            "batch script": ["bash", str(ROOT / "launch/slurm.sbatch"), script[1]],
        }.get(receiver, ["bash", str(ROOT / "launch/torchrun.sh"), "2", *script])
        if receiver == "batch script":
            environment |= batch(folder, self.run)
        if receiver == "a pipeline":
            words = [*PIPELINE, *words]
        if receiver == "a terminal":
            self.keyboard, terminal = pty.openpty()
            words = ["setsid", "--ctty", "--wait", *words]  # which makes it the terminal of the command
            threading.Thread(target=drain, args=(self.keyboard, self.said), daemon=True).start()
        with self.said.open("ab") as said:
            self.process = subprocess.Popen(
                ["env", "--default-signal", *words, *arguments],  # tests run under nohup too, which ignores SIGHUP
                stdin=terminal or subprocess.DEVNULL,
                stdout=terminal or subprocess.DEVNULL,
                stderr=terminal or said,
                env=environment,
                start_new_session=receiver != "a terminal",
            )
        if terminal is not None:
            os.close(terminal)

    def wait_for_training(self, steps: int = 2) -> None:
        """Until the run has a checkpoint and made some steps more."""
        self._wait(lambda: list(self.run.glob("checkpoints/step-*")), "a first checkpoint")
        begun = self.reached()
        self._wait(lambda: self.reached() >= begun + steps, "more steps")

    def reached(self) -> int:
        """Newest step in the records."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max((record["step"] for line in lines if (record := parsed(line)) and "loss" in record), default=0)

    def send(self, number: int) -> None:
        """To this command's receiver, as it comes to it in life."""
        pid = self.process.pid
        self.sent.append(number)
        if self.receiver == "one rank":
            os.kill(self.ranks()[1], number)
        elif self.receiver in ("its process group", "a pipeline") or (self.receiver, number) == (
            "batch script",
            signal.SIGTERM,
        ):
            os.killpg(pid, number)  # SLURM ends all of a job, and sends everything else to the script alone
        elif self.receiver == "a terminal" and number in KEYS:
            os.write(self.keyboard, KEYS[signal.Signals(number)])
        elif self.receiver == "a terminal" and number == signal.SIGHUP:
            os.close(self.keyboard)
        elif self.receiver == "a terminal":
            os.killpg(os.tcgetpgrp(self.keyboard), number)
        else:
            os.kill(pid, number)

    def ranks(self) -> list[int]:
        """The training processes, in the order in which they were started."""
        found = [pid for pid in descendants(self.process.pid) if is_rank(pid)]
        return sorted(found, key=lambda pid: int(environment_of(pid).get("RANK", 0)))

    def ending(self, since: float) -> Ending:
        """Wait for the end of the command, then look around."""
        last = self.reached() + DEAF_STEPS
        self._wait(lambda: self.process.poll() is not None or self.reached() > last, THE_END)
        assert self.process.poll() is not None, f"the run goes on as if there had been no signal: {self.text()[-2000:]}"
        seconds = time.monotonic() - since
        for _ in range(100):  # what is ending needs a moment on a busy machine
            if not (left := marked(self.mark)):
                break
            time.sleep(0.1)
        whole = [path for path in self.run.glob("checkpoints/step-*") if read_manifest(path)]
        code = self.process.returncode
        attempts = list(self.run.glob("jobs/*/attempts.jsonl"))
        if attempts:  # the script itself is ended by SLURM when it has queued the job again
            code = json.loads(attempts[0].read_text())["code"]
        return Ending(
            code=code if code >= 0 else 128 - code,
            seconds=seconds,
            saved=max((int(path.name[len("step-") :]) for path in whole), default=0),
            reached=self.reached(),
            said=self.text(),
            logs="".join(path.read_text(errors="replace") for path in self.run.glob("jobs/*/logs/*.log")),
            again=(self.run.parent / "scontrol").exists() and "requeue" in (self.run.parent / "scontrol").read_text(),
            processes=tuple(left),
            files=tuple(str(path) for path in (*self.tmp.iterdir(), *self.run.glob("checkpoints/.tmp-*"))),
        )

    def close(self) -> None:
        """Nothing of the command is left."""
        for pid in marked(self.mark, pids=True):
            os.kill(int(pid), signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def _progress(self) -> tuple[int, int]:
        files = (self.said, self.run / "metrics.jsonl")
        return cpu_ticks(self.mark), sum(path.stat().st_size for path in files if path.exists())

    def _wait(self, until: Callable[[], object], what: str) -> None:
        """As long as the command gets on: a busy machine is no failure, a command that stands still is."""
        seen, deadline, looked = self._progress(), time.monotonic() + patience(SILENT_S), time.monotonic()
        while not until():
            ended = self.process.poll() is not None
            assert not ended or what == THE_END, f"{what}: {self.process.returncode}, {self.text()}"
            time.sleep(0.05)
            if time.monotonic() - looked > LOOK_S:
                looked, now = time.monotonic(), self._progress()
                if now != seen:
                    seen, deadline = now, looked + patience(SILENT_S)
                assert looked < deadline, f"no sign of {what}: {self.text()}"

    def text(self) -> str:
        """What the command said."""
        return self.said.read_text(errors="replace") if self.said.exists() else ""


def batch(folder: Path, run: Path) -> dict[str, str]:
    """What the batch script wants: an srun that starts two tasks, and an scontrol that writes down what it is told."""
    (folder / "bin").mkdir()
    stub(folder / "bin/srun", SRUN.format(python=sys.executable))
    stub(folder / "bin/scontrol", f'#!/bin/sh\necho "$*" >> {folder}/scontrol\n[ "$1" != requeue ] || kill -9 $PPID\n')
    number = uuid.uuid4().int % 10**9  # two jobs of one number would meet
    slurm = {"SLURM_JOB_ID": str(number), "SLURM_JOB_NODELIST": "127.0.0.1", "HOST_PYTHON": sys.executable}
    slurm |= {"CODE": str(ROOT), "RUN": str(run), "ENTRY": "tests/faults/faulty.py"}
    return slurm | {"PATH": f"{folder}/bin:{os.environ['PATH']}"}


def drain(keyboard: int, path: Path) -> None:
    """A terminal's reader; until it is closed."""
    with path.open("ab") as file:
        while True:
            try:
                text = os.read(keyboard, 4096)
            except OSError:
                return
            if not text:
                return
            file.write(text)
            file.flush()


def parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # being written
        return None
    return record if isinstance(record, dict) else None


def environment_of(pid: int) -> dict[str, str]:
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(entry.partition("=")[::2] for entry in raw.split("\0") if entry)


def is_rank(pid: int) -> bool:
    try:
        return b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes() and "RANK" in environment_of(pid)
    except OSError:
        return False


def marked(mark: str, *, pids: bool = False) -> list[str]:
    """Living processes that have inherited the mark, wherever they are."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and environment_of(int(entry.name)).get(MARK) == mark:
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if state != "Z":
                found.append(entry.name if pids else f"{entry.name} ({state}) {line}")
    return found


def cpu_ticks(mark: str) -> int:
    """What all processes of a command have computed so far, in ticks of the system's clock."""
    total = 0
    for pid in marked(mark, pids=True):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """The table, at the end of the module."""
    yield
    if TABLE:
        print("\n" + rows())


def rows() -> str:
    lines = ["| signal | to | exit code | seconds | state on disk | left |", "|---|---|---|---|---|---|"]
    for (name, receiver), endings in sorted(TABLE.items(), key=lambda item: RECEIVERS.index(item[0][1])):
        codes = ", ".join(str(code) for code in sorted({ending.code for ending in endings}))
        times = [ending.seconds for ending in endings]
        saved = sum(ending.saved == ending.reached for ending in endings)
        processes, files = (sum(len(getattr(e, what)) for e in endings) for what in ("processes", "files"))
        lines.append(
            f"| {name} | {receiver} | {codes} ({len(endings)} of {len(endings)}) "
            f"| {statistics.median(times):.1f}, at most {max(times):.1f} "
            f"| of the last step: {saved} of {len(endings)} | {processes} processes, {files} files |"
        )
    return "\n".join(lines)


def stop(receiver: str, name: str, config: Path, folder: Path) -> Ending:
    """One run that gets the signal while it trains; a second one in the same long step."""
    twice = len(SIGNALS[name]) > 1
    overrides = [f"train.checkpoint_every={1 if twice else 2}", "train.checkpoint_keep=2"]
    if twice:  # to leave at once would leave what is being written half-written, for the next attempt to remove
        overrides.append("train.checkpoint_async=false")
    command = Command(receiver, config, folder, overrides, SLOW_STEP_S if twice else 0.0)
    try:
        command.wait_for_training(0 if twice else 2)
        for number in SIGNALS[name]:
            time.sleep(1.5 if number in command.sent else 0.0)
            command.send(number)
            sent = time.monotonic()
        ending = command.ending(sent)
    finally:
        command.close()
    TABLE[name, receiver].append(ending)
    if "OPENSORA_SIGNAL_TABLE" in os.environ:
        Path(os.environ["OPENSORA_SIGNAL_TABLE"]).write_text(rows() + "\n")
    return ending


def check(receiver: str, name: str, ending: Ending) -> None:
    """What docs/launching.md promises."""
    number = SIGNALS[name][0]
    assert not ending.processes and ending.saved, ending
    if receiver == "torchrun":  # torch's own: it ends with 1, or dies of what it does not handle; its ranks save
        assert ending.code == (128 + number if number in (signal.SIGUSR1, signal.SIGUSR2) else 1)
        # Of a second Ctrl-C its ranks hear nothing: they have their time to save.
        assert ("leaving at once" in ending.said) == (name == "TERM, TERM"), ending
        assert name == "TERM, TERM" or ending.saved == ending.reached, ending
        return
    assert not ending.files, ending
    assert ending.again == (receiver == "batch script" and name in ("USR1", "USR2")), ending
    if name in LEAVES and (receiver, number) != ("batch script", signal.SIGINT):  # which it passes on as SIGUSR2
        # Of one rank the launcher says it, and of a pipeline nobody is left to read it.
        said = {"one rank": "rank 1 failed first", "a pipeline": ""}.get(receiver, "again: leaving at once")
        assert ending.code == 128 + number and said in ending.said, ending
        return
    assert ending.code == 75 and ending.saved == ending.reached, ending
    if receiver != "a pipeline" and (receiver, number) != ("a terminal", signal.SIGHUP):  # where nobody could read it
        said = "\n".join(re.findall("stopped by .*", ending.said)) or logs(ending)
        assert f"step {ending.saved} of 100000 is saved in" in said and "the same command goes on" in said, ending
        assert said.count("\n") == 0 and "Traceback" not in ending.said, ending


def logs(ending: Ending) -> str:
    """What rank 0 said under SLURM, where every rank has a file."""
    return "\n".join(re.findall("stopped by .*", ending.logs))


QUICK = [("one process", "HUP"), ("torchrun.sh", "USR2"), ("a pipeline", "INT")]
EVERY = [(receiver, name) for receiver in RECEIVERS for name in SIGNALS]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("receiver", "name"), QUICK)
def test_a_signal_ends_in_a_saved_state(receiver: str, name: str, config: Path, tmp_path: Path, tally: Tally) -> None:
    check(receiver, name, stop(receiver, name, config, tmp_path))
    tally(ROW, 1, 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("receiver", "name"), EVERY)
def test_every_signal_to_every_receiver(receiver: str, name: str, config: Path, tmp_path: Path, tally: Tally) -> None:
    with ThreadPoolExecutor(TIMES) as pool:  # at the same time, which loads the machine
        endings = pool.map(lambda i: stop(receiver, name, config, tmp_path / f"{i}"), range(TIMES))
    for ending in endings:
        check(receiver, name, ending)
        tally(ROW, 1, 1)
