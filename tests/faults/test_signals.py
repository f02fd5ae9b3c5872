"""Asked to stop at any time, or killed: nothing is lost but what was not saved, and the end is the same."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.dist.harness import DistributedFailure, run_distributed
from tests.faults.conftest import CONFIG, Tally
from tests.faults.runs import ALWAYS, Fault, Outcome, alive, descendants, digest, run_with

STEPS = 30


@pytest.fixture(scope="module")
def long(stills: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(configuration of a run of ``STEPS`` steps, digest of its end)."""
    folder = tmp_path_factory.mktemp("long")
    config = folder / "train.yaml"
    short = "steps: 8, log_every: 1, checkpoint_every: 2, checkpoint_keep: 0"
    assert short in CONFIG
    text = CONFIG.replace(short, f"steps: {STEPS}, log_every: 10, checkpoint_every: 3, checkpoint_keep: 2")
    config.write_text(text.format(output=folder / "clean", table=stills))
    assert attempt(config, folder / "clean").end == "finished"
    return config, digest(folder / "clean/run")


def attempt(config: Path, folder: Path, *faults: Fault, overrides: tuple[str, ...] = (), world: int = 2) -> Outcome:
    """One start of the run; all processes saw the same."""
    outcomes = run_distributed(
        run_with, world, config, [f"output={folder}", *overrides], faults, timeout=100, init=False
    )
    assert len({(outcome.end, outcome.step) for outcome in outcomes}) == 1
    return outcomes[0]


def at_random(draw: random.Random, kind: str) -> Fault:
    """To one process or to both; one in five while the run starts, the others in one of the next steps."""
    rank = draw.choice((0, 1, -1))
    if draw.random() < 0.2:
        return Fault(f"{kind} later", rank=rank, value=draw.uniform(0.0, 2.0))
    return Fault(f"{kind} soon", rank=rank, step=draw.randrange(6), value=draw.uniform(0.0, 0.2))


def stop_again_and_again(config: Path, folder: Path, times: int, seed: int) -> list[Outcome]:
    """SIGTERM at a random time, until it was done so often; then to the end."""
    draw = random.Random(seed)
    seen: list[Outcome] = []
    while len(seen) < times:
        outcome = attempt(config, folder, at_random(draw, "term"))
        if outcome.end == "finished":  # before the signal: begin anew
            folder = folder.with_name(f"{folder.name}-")
            continue
        seen.append(outcome)
    seen.append(attempt(config, folder))
    return seen


def check_stops(long: tuple[Path, str], folder: Path, times: int, seed: int, tally: Tally) -> None:
    config, wanted = long
    seen = stop_again_and_again(config, folder, times, seed)
    ends = [outcome.end for outcome in seen]
    assert set(ends[:-1]) <= {"interrupted", "before the first step"} and ends[-1] == "finished"
    last = max(folder.parent.glob(f"{folder.name}*"), key=lambda path: len(path.name))
    assert digest(last / "run") == wanted
    row = "SIGTERM at a random time: saved, and the same end bit for bit"
    tally(row, times, times)
    tally("  of these before the first step", ends.count("before the first step"), times)


@pytest.mark.timeout(400)
def test_sigterm_at_random_times(long: tuple[Path, str], tmp_path: Path, tally: Tally) -> None:
    check_stops(long, tmp_path / "t", 10, 1, tally)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sigterm_at_random_times_100(long: tuple[Path, str], tmp_path: Path, tally: Tally) -> None:
    for seed in range(10):
        check_stops(long, tmp_path / f"t{seed}", 10, 100 + seed, tally)


def kill_again_and_again(config: Path, folder: Path, times: int, seed: int) -> int:
    """SIGKILL to one process, or to both, at a random time; how often it hit before the end."""
    draw = random.Random(seed)
    hit = 0
    for _ in range(times):
        try:
            attempt(config, folder, at_random(draw, "kill"))
        except DistributedFailure:
            hit += 1
    assert attempt(config, folder).end == "finished"
    return hit


@pytest.mark.timeout(400)
def test_sigkill_at_random_times(long: tuple[Path, str], tmp_path: Path, tally: Tally) -> None:
    config, wanted = long
    hit = kill_again_and_again(config, tmp_path, 6, 5)
    assert digest(tmp_path / "run") == wanted and hit
    tally("SIGKILL at a random time: the same end bit for bit", hit, hit)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sigkill_at_random_times_40(long: tuple[Path, str], tmp_path: Path, tally: Tally) -> None:
    config, wanted = long
    for seed in range(10):
        hit = kill_again_and_again(config, tmp_path / f"{seed}", 4, 50 + seed)
        assert digest(tmp_path / f"{seed}/run") == wanted
        tally("SIGKILL at a random time: the same end bit for bit", hit, hit)


def test_a_signal_while_loading_saving_or_sampling(config: Path, tmp_path: Path, tally: Tally) -> None:
    """Loading: nothing is made; saving: the save is committed, one step more; sampling: not one step more."""
    saved = attempt(config, tmp_path, Fault("term in save", step=2, rank=1))
    assert saved == Outcome("interrupted", 3, 0, saved.judged)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    loaded = attempt(config, tmp_path, Fault("term in load", rank=1))
    assert loaded.end == "before the first step"
    sampling = "validate.sampling={width: 40, height: 24, num_frames: 1, num_steps: 1, fps: 8}"
    overrides = ("validate.every=5", "validate.prompts=[a red circle]", sampling)
    sampled = attempt(config, tmp_path, Fault("term in samples", step=5, rank=1), overrides=overrides)
    assert (sampled.end, sampled.step) == ("interrupted", 5)
    assert attempt(config, tmp_path).end == "finished"
    tally("SIGTERM while loading, saving, sampling", 3, 3)


# Commands as they are typed.


def command(config: Path, *overrides: str, launcher: list[str] | None = None) -> "subprocess.Popen[str]":
    script = str(ROOT / "scripts/diffusion/train.py")
    return subprocess.Popen(
        [*(launcher or [sys.executable]), script, str(config), *overrides],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def handles_signals(pid: int) -> bool:
    """Whether the process has its handlers, as the system sees it."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGUSR2 - 1) & 1)


def test_a_signal_while_torch_is_imported_is_remembered(config: Path, tally: Tally) -> None:
    process = command(config)
    deadline = time.monotonic() + 30
    while not handles_signals(process.pid):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 75 and "nothing is lost" in said
    tally("SIGTERM before torch is there", 1, 1)


def stands_still(config: Path, overrides: list[str]) -> None:
    """A run whose second step takes for ever, with two requests to stop during it."""
    import threading

    def ask() -> None:
        time.sleep(1.0)
        for _ in range(2):  # by two ways: from a terminal, and passed on by a launcher
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.5)
        Path(config.parent / "once").touch()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    run_with(config, overrides, (Fault("sleep", step=0, rank=0, times=ALWAYS),))


def test_the_same_signal_again_leaves_at_once(config: Path, tmp_path: Path, tally: Tally) -> None:
    with pytest.raises(DistributedFailure, match=f"exit code {128 + signal.SIGTERM}"):
        run_distributed(stands_still, 1, config, [f"output={tmp_path}"], timeout=60, init=False)
    assert (config.parent / "once").exists()  # twice at the same time is once
    tally("second SIGTERM: leaves at once", 1, 1)


REPEATED = """
import os, signal, time
from opensora.utils import signals
asked = signals.remember()
for _ in range(3):
    os.kill(os.getpid(), signal.SIGUSR2)
    time.sleep(1.1)
print(asked.name)
"""


def test_a_repeated_warning_is_one_warning(tally: Tally) -> None:
    """The batch script sends SIGUSR2 until the step has ended."""
    done = subprocess.run([sys.executable, "-c", REPEATED], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "SIGUSR2\n", "")
    tally("SIGUSR2 again and again: one warning", 1, 1)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("launcher", ["torch.distributed.run", "launch/torchrun.sh"])
def test_nothing_is_left_when_the_launcher_is_killed(
    launcher: str, long: tuple[Path, str], tmp_path: Path, tally: Tally
) -> None:
    """Its processes save and leave, and everything that they started with them."""
    config, _ = long
    start = ["bash", str(ROOT / launcher), "2"]
    if launcher == "torch.distributed.run":
        start = [sys.executable, "-m", launcher, "--standalone", "--nproc-per-node=2"]
    process = command(config, f"output={tmp_path}", "train.steps=100000", "data.workers=1", launcher=start)
    folder = tmp_path / "run/checkpoints"
    deadline = time.monotonic() + 120
    while not list(folder.glob("step-*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    family = descendants(process.pid)
    assert len(family) >= 6  # processes that train, decode and watch
    process.kill()
    started = time.monotonic()
    while [pid for pid in family if alive(pid)]:
        assert time.monotonic() < started + 60, [Path(f"/proc/{p}/cmdline").read_text() for p in family if alive(p)]
        time.sleep(0.1)
    steps = sorted(path.name for path in folder.glob("step-*"))
    assert steps and not list(folder.glob(".tmp-*"))
    tally("launcher killed: its processes save and leave", 1, 1)
