"""Ray that is not there, cannot start or does not answer: one line, with what to do."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.patience import patience

pytestmark = pytest.mark.timeout(600)
# Ray as it is, or as it is not: what a stand-in for it does in place of starting.
PROGRAM = """
import sys, types, os
if {kind!r} != "real":
    fake = types.ModuleType("ray")
    def init(**asked):
        os.write(2, b"[W 1 1] gcs_client.cc:210: warnings of C++\\n")
        {ray}
    fake.init = init
    sys.modules["ray"] = None if {kind!r} == "missing" else fake
from data_pipeline.engines.config import EngineConfig
from data_pipeline.engines.ray_tasks import _started
from opensora.utils.errors import UserError
try:
    _started(EngineConfig(kind="ray", address={address!r}))
    print("started")
except UserError as error:
    print("error:", error)
"""
FAILS = "raise RuntimeError('The node of Ray died. Look at https://docs')"


@pytest.mark.parametrize(
    ("ray", "address", "said"),
    [
        ("missing", "", "engine.kind=ray: the package ray is not installed; pip install ray, or engine.kind=local,"),
        (FAILS, "", "engine.kind=ray: Ray cannot start on this machine (The node of Ray died); set engine.kind=local,"),
        (FAILS, "auto", "engine.address=auto: no cluster of Ray answers (The node of Ray died); ray start --head"),
        (
            "pass",
            "127.0.0.1:1",
            "engine.address=127.0.0.1:1: no cluster of Ray answers (Connection refused); ray start",
        ),
        ("pass", "ray://[::1]:1", "engine.address=ray://[::1]:1: no cluster of Ray answers ("),
        ("pass", "host:99999", "engine.address=host:99999: no cluster of Ray answers ("),
        (
            "real",
            "127.0.0.1:1",
            "engine.address=127.0.0.1:1: no cluster of Ray answers (Connection refused); ray start",
        ),
        ("real", "nonsense", "engine.address=nonsense: no cluster of Ray answers (Invalid address format: nonsense);"),
    ],
)
def test_one_line_says_what_to_do(ray: str, address: str, said: str) -> None:
    if ray == "real":
        pytest.importorskip("ray")
    code = PROGRAM.format(ray="pass" if ray in ("missing", "real") else ray, kind=ray, address=address)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=patience(60), check=True
    )
    assert done.stderr == "" and done.stdout.count("\n") == 1
    assert done.stdout.startswith(f"error: {said}"), done.stdout


def test_what_it_says_when_it_starts_is_not_lost(tmp_path: Path) -> None:
    code = PROGRAM.format(ray="pass", kind="fake", address="")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "started\n" and "warnings of C++" in done.stderr
