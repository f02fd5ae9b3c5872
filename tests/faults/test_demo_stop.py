"""Ctrl-C and the like in the demo: the command that runs ends in its own way, and the demo says how to go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.conftest import Tally
from tests.faults.runs import alive, descendants
from tests.patience import patience

DEMO = """
import sys
from pathlib import Path
sys.path.insert(0, {launch!r})
sys.argv = ["launch/demo.py", "--out", {out!r}]
import demo
for number in demo.STOPS:
    demo.signal.signal(number, demo.interrupt)
demo.Demo(Path({out!r})).command([sys.executable, "-c", {command!r}])
"""
SERVES = (
    DEMO.rpartition("demo.Demo")[0]
    + """\
made = demo.Demo(Path({out!r}))
made.run = Path("opensora/pretrained/shapes")
sys.exit(made.serve("port=0", "quota.free_gib=0", "workers.processes=1"))
"""
)
# A command that saves when it is asked, or takes no notice the first time.
COMMAND = """
import signal, sys, time
left = [{patience}]
def asked(number, frame):
    left[0] -= 1
    if not left[0]:
        sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, asked)
print("ready", flush=True)
while True:
    time.sleep(0.1)
"""


def start(out: Path, patience: int = 1) -> "subprocess.Popen[str]":
    command = COMMAND.format(patience=patience)
    script = DEMO.format(launch=str(ROOT / "launch"), out=str(out), command=command)
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
@pytest.mark.parametrize("patience", [1, 2])
def test_a_signal_ends_the_command_and_says_how_to_go_on(
    number: signal.Signals, patience: int, tmp_path: Path, tally: Tally
) -> None:
    (tmp_path / "demo/checkpoints/step-00000020").mkdir(parents=True)
    process = start(tmp_path, patience)
    assert process.stdout is not None
    while (line := process.stdout.readline()) != "ready\n":
        assert line
    for _ in range(patience):
        process.send_signal(number)
        time.sleep(0.5)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert f"stopped by {number.name}, the command above ended with exit code 75" in said
    assert "step-00000020" in said and "goes on with: python -c" in said and "bash launch/demo.sh --out" in said
    assert "Traceback" not in said
    tally("a signal for the demo: the command ends in its own way, one exit code, no traceback", 1, 1)


@pytest.mark.timeout(900)
def test_ctrl_c_ends_the_page_of_the_demo(tmp_path: Path) -> None:
    script = SERVES.format(launch=str(ROOT / "launch"), out=str(tmp_path))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen([sys.executable, "-c", script], text=True, cwd=ROOT, **pipes)  # type: ignore[call-overload]
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("ready: http"):
        assert line, process.wait()
    others = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=patience(60))
    assert process.returncode == 0 and "Traceback" not in said, said
    assert others and not any(map(alive, others))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seconds", [3, 30])
def test_ctrl_c_while_the_demo_makes_its_data(seconds: int, tmp_path: Path, tally: Tally) -> None:
    """While it starts, and while it renders in several processes; as a terminal does it, to the group."""
    process = subprocess.Popen(
        ["bash", "launch/demo.sh", "--out", str(tmp_path / "demo")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    time.sleep(seconds)
    family = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in said, said
    deadline = time.monotonic() + patience(30)
    while [pid for pid in family if alive(pid)]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    tally("a signal for the demo: the command ends in its own way, one exit code, no traceback", 1, 1)
