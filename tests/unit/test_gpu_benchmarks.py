"""benchmarks.gpu.all on a machine without a GPU: limits, failures and the budget, with stand-ins for the parts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import all as gpu
from benchmarks.gpu.all import Part
from tests.patience import patience

PRINT = 'print(\'{"benchmark": "one", "value": 1.5}\', flush=True)'


def part(name: str, code: str, limit: float = 60.0) -> Part:
    return Part(name, (sys.executable, "-c", code), limit)


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def test_a_dry_run_by_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What fails and what hangs costs its own result, and the exit code tells."""
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 1
    states = {one["name"]: one["state"] for one in results(tmp_path)["parts"]}
    assert states == {"passes": "ok", "fails": "failed", "hangs": "timeout", "passes-too": "ok"}
    assert [len(one["records"]) for one in results(tmp_path)["parts"]] == [1, 1, 1, 1]
    table = (tmp_path / "results.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    for name, state in states.items():
        assert any(row.startswith(f"| {name} | {state} |") for row in rows), table
    assert all(row.count("|") == 6 for row in rows)
    assert "as it should" in table and (tmp_path / "fails.log").read_text().endswith("as it should\n")
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_all_well_is_zero(tmp_path: Path) -> None:
    assert gpu.main(["--dry", "--only", "passes", "--out", str(tmp_path)]) == 0
    assert [one["name"] for one in results(tmp_path)["parts"]] == ["passes", "passes-too"]


@pytest.mark.slow
def test_a_part_that_ignores_signals_ends_with_its_children(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    child = f"import os,signal,time; signal.signal(15, signal.SIG_IGN); open({str(pid)!r}, 'w').write(str(os.getpid()))"
    code = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", {child + "; time.sleep(600)"!r}])
time.sleep(600)
"""
    result = gpu.run_part(part("deaf", code, 3.0), 100.0, tmp_path)
    assert result.state == "timeout" and result.seconds < 3.0 + 5 * gpu.GRACE_S
    if pid.exists():  # a busy machine may not have come so far
        assert _gone(int(pid.read_text()))


def _gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":  # nobody has asked for its exit code yet
            return True
        time.sleep(0.1)
    return False


def test_the_budget_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part gets what is left, and is not begun where that is too little."""
    monkeypatch.setattr(gpu, "LEAST_S", 2.0)
    hang = f"{PRINT}; import time; time.sleep(600)"
    began = time.monotonic()
    parts = [part("first", hang, 4.0), part("second", hang), part("third", PRINT)]
    found = gpu.run_all(parts, 10.0, tmp_path, {"gpu": "none"})
    assert time.monotonic() - began < 10.0 + 2 * gpu.GRACE_S
    assert [one.state for one in found] == ["timeout", "timeout", "no time left"]
    assert found[0].limit_s == 4.0 and found[1].limit_s < 4.0
    assert [one["name"] for one in results(tmp_path)["parts"]] == ["first", "second", "third"]


@pytest.mark.timeout(1200)
def test_results_are_there_after_every_part(tmp_path: Path) -> None:
    """A script that is stopped leaves what it has, and no process."""
    code = f"""
from pathlib import Path
from benchmarks.gpu import all as gpu
import sys
gpu.DRY = (gpu.Part("quick", (sys.executable, "-c", {PRINT!r}), 60), gpu.Part("long", (sys.executable, "-c",
    "import time; time.sleep(600)"), 300))
sys.exit(gpu.main(["--dry", "--out", {str(tmp_path)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=gpu.ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + patience(60)
    while not (tmp_path / "long.log").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 1
    assert [one["name"] for one in results(tmp_path)["parts"]] == ["quick"]


def test_tests_are_counted_by_name(tmp_path: Path) -> None:
    """Results of pytest; a part whose tests were all skipped has shown nothing."""
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_good(): pass\n@pytest.mark.gpu\ndef test_bad(): assert 0, 'why'\n"
        "@pytest.mark.gpu\n@pytest.mark.skip\ndef test_later(): pass\n"
    )
    some = Part("tests", gpu._tests(str(file)), 100)
    result = gpu.run_part(some, 200.0, tmp_path)
    assert result.state == "failed"
    assert [result.tests[key] for key in ("passed", "failed", "skipped")] == [1, 1, 1]
    assert result.tests["names"][0].endswith("::test_bad") and any("why" in line for line in result.tail)
    assert "1 passed, 1 failed, 1 skipped" in gpu.table([result], {})
    only_skipped = Part("skipped", gpu._tests(str(file), "-k", "later"), 100)
    assert gpu.run_part(only_skipped, 200.0, tmp_path).state == "failed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_gpu_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.all", "--out", str(tmp_path / "out")]
    found = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, timeout=100)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr == "no CUDA device: nothing to measure; --dry runs stand-ins for the parts\n"
    assert not (tmp_path / "out").exists()


def test_an_unknown_part_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--only", "mfu", "speed"]) == 2
    assert capsys.readouterr().err.startswith("--only mfu speed: no such part; must be beginnings of tests-steps, ")


def test_every_part_is_there_to_be_run() -> None:
    """Modules and test files exist, tests come first, and whoever adds one gives it a limit within the budget."""
    for one in gpu.PARTS:
        kind = one.command[2]
        if kind == "pytest":
            assert (gpu.ROOT / one.command[3]).is_file(), one
        else:
            assert (gpu.ROOT / f"{kind.replace('.', '/')}.py").is_file(), kind
        assert 10 <= one.limit_s <= gpu.BUDGET_S / 2
    assert [one.name for one in gpu.PARTS[:3]] == ["tests-steps", "tests-recompute", "tests-kernels"]
    tested = {one.command[3] for one in gpu.PARTS if one.command[2] == "pytest"}
    assert {f"tests/gpu/{path.name}" for path in (gpu.ROOT / "tests/gpu").glob("test_*.py")} - tested == {
        "tests/gpu/test_colossalai.py"  # its package is not part of an installation
    }
    assert gpu.BUDGET_S <= 480
