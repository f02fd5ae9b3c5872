"""Signals to commands of one process: while they import torch, which takes seconds, and at any time after."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from opensora.utils import signal_handler
from tests.conftest import ROOT
from tests.patience import patience

COMMANDS = {
    **{
        name: ["-m", f"opensora.cli.{name}", "nowhere.yaml"]
        for name in ("buckets", "calibrate", "config_reference", "forecast", "plot", "precompute", "preflight")
    },
    "index": ["-m", "data_pipeline.index", "nowhere"],
    "shapes": ["-m", "data_pipeline.shapes"],
    "submit": [str(ROOT / "launch/submit.py"), "nowhere.yaml"],
}
# In place of torch and numpy, whichever is imported first: says so, and takes its time.
SLOW = "import os, time\nopen(os.environ['IMPORTING'], 'w').close()\ntime.sleep(100)\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_during_an_import_is_one_line(command: str, tmp_path: Path) -> None:
    number = signal.SIGINT if len(command) % 2 else signal.SIGTERM
    for name in ("numpy", "torch", "yaml", "tqdm"):
        (tmp_path / f"{name}.py").write_text(SLOW)
    os.mkfifo(tmp_path / "importing")
    process = subprocess.Popen(
        [sys.executable, *COMMANDS[command]],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "IMPORTING": str(tmp_path / "importing")},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what is in the background with Ctrl-C ignored, and so may these tests be.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        (tmp_path / "importing").open().close()  # opens when the other end does
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    code = 75 if command == "precompute" else 128 + number
    assert (process.returncode, out) == (code, "") and err.startswith(f"stopped by {number.name}: "), err
    assert err.count("\n") == 1


def test_what_is_ignored_stays_so_and_a_command_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in signal_handler.SIGNALS}
    monkeypatch.setattr(signal_handler, "_asked", None)
    try:
        for number in signal_handler.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        signal_handler.listen_early()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        with pytest.raises(SystemExit) as caught, signal_handler.stopped_in_one_line():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert caught.value.code == 128 + signal.SIGUSR1
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL  # what was begun is over
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


FINALIZED = """
import sys
from opensora.utils.signal_handler import stopped_in_one_line

class Object:
    def __del__(self):
        sum(range({inside}))

with stopped_in_one_line():
    print("begun", flush=True)
    while True:
        Object()
        sum(range({outside}))
"""


@pytest.mark.parametrize(("inside", "outside"), [(100_000, 100_000), (300_000, 1000), (5_000_000, 0)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_while_an_object_is_finalized_is_heard(number: signal.Signals, inside: int, outside: int) -> None:
    """Python prints what is raised there and goes on; the last of these programs does little else."""
    program = FINALIZED.format(inside=inside, outside=outside)
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    timer = threading.Timer(patience(30), process.kill)
    timer.start()
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(number)
    _, err = process.communicate()
    timer.cancel()
    assert (process.returncode, err) == (128 + number, f"stopped by {number.name}\n")
