"""Asked to stop at any time, or killed: nothing is lost but what was not saved, and the end is the same."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opensora.datasets.decode.api import probe
from opensora.utils import signal_handler
from tests.conftest import ROOT
from tests.dist.harness import DistributedFailure, run_distributed
from tests.faults.conftest import CONFIG, Tally
from tests.faults.runs import ALWAYS, Fault, Outcome, alive, descendants, digest, run_with
from tests.patience import patience

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
    check_stops(long, tmp_path / "t", 5, 1, tally)


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
    hit = kill_again_and_again(config, tmp_path, 4, 5)
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


@pytest.mark.timeout(400)
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


def stops_at_step_2(config: Path, folder: Path, full: bool) -> int:
    """Exit code of the training command that is asked to stop in its third step; maybe its disk is full."""
    import errno

    from acceleration.checkpoint import writer_process
    from opensora.cli.train import main
    from opensora.train.run import Run

    def no_room(*args: object) -> dict[str, object]:
        raise OSError(errno.ENOSPC, "No space left on device")

    lr_at, asked = Run.lr_at, []

    def asking(run: Run, step: int) -> float:
        if step == 2 and not asked:  # once: a second later it would mean to leave at once
            asked.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return lr_at(run, step)

    Run.lr_at = asking  # type: ignore[method-assign]
    if full:
        writer_process.write = no_room  # type: ignore[assignment]
    overrides = [f"output={folder}", "train.checkpoint_async=false", "train.checkpoint_every=100"]
    return main([str(config), *overrides])


@pytest.mark.parametrize(("full", "code"), [(False, 75), (True, 1)])
def test_75_is_said_of_a_state_that_is_on_disk_alone(
    full: bool, code: int, config: Path, tmp_path: Path, tally: Tally
) -> None:
    assert run_distributed(stops_at_step_2, 2, config, tmp_path, full, init=False) == [code, code]
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ([] if full else ["step-00000003"])
    tally("asked to stop, and the last save fails: exit code 1", 1, 1)


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


@pytest.mark.timeout(600)
def test_a_signal_while_torch_is_imported_is_remembered(config: Path, tally: Tally) -> None:
    for _ in range(10):  # on a busy machine a look may come when torch is there already
        process = command(config)
        deadline = time.monotonic() + patience(30)
        while not handles_signals(process.pid):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
        if "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            break
        process.kill()
        process.communicate()
    else:
        pytest.fail("torch was always there before signals were listened to")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 75 and "nothing is lost" in said
    tally("SIGTERM before torch is there", 1, 1)


def stands_still(config: Path, overrides: list[str]) -> None:
    """A run whose second step takes for ever, with two requests to stop during it."""
    import threading

    metrics = Path(overrides[0].removeprefix("output=")) / "run/metrics.jsonl"

    def ask() -> None:
        while not metrics.exists():  # before that a request to stop ends the run politely
            time.sleep(0.05)
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
from opensora.utils import signal_handler
asked = signal_handler.install()
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


NOHUP = """
import os, signal
from opensora.utils import signal_handler
asked = signal_handler.install()
os.kill(os.getpid(), signal.SIGHUP)
print(asked.name, signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)
"""


def test_nohup_is_respected(tally: Tally) -> None:
    """SIGHUP stays ignored where it was, in a rank and in the launcher, so that a run outlives its terminal."""
    for script, wanted in (
        (NOHUP, "None True\n"),
        (
            "import sys, os, signal; sys.path.insert(0, 'launch')\n"
            + (ROOT / "launch/elastic.py").read_text().partition("STOP = Stop()")[0]
            + "Stop().listen(); os.kill(os.getpid(), signal.SIGHUP); print('here')",
            "here\n",
        ),
    ):
        done = subprocess.run(
            ["sh", "-c", 'trap "" HUP; exec "$@"', "-", sys.executable, "-c", script],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, wanted), done.stderr
        tally("SIGHUP under nohup: ignored", 1, 1)


LEAVES = """
import os, signal, sys, time
from pathlib import Path
from opensora.utils import signal_handler
asked = signal_handler.leave_when_asked("what is written stays"{code})
path = Path(sys.argv[1])
print("ready", flush=True)
if {writing}:
    with signal_handler.writing():
        path.write_text("half")
        print("writes", flush=True)
        while not asked._leaving:
            time.sleep(0.01)
        time.sleep(0.3)  # who did not wait for the file would be gone
        path.write_text("whole")
time.sleep(60)
"""


@pytest.mark.parametrize("writing", [False, True])
@pytest.mark.parametrize(("code", "wanted"), [("", None), (", code=75", 75)])
@pytest.mark.parametrize("number", signal_handler.SIGNALS)
def test_a_command_without_a_state_leaves_after_the_file_that_it_writes(
    number: signal.Signals, code: str, wanted: int | None, writing: bool, tmp_path: Path, tally: Tally
) -> None:
    script = LEAVES.format(code=code, writing=writing)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "file")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    while process.stdout.readline() != ("writes\n" if writing else "ready\n"):
        assert process.poll() is None
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (wanted or 128 + number)
    assert said == f"stopped by {number.name}: what is written stays\n"
    assert not writing or (tmp_path / "file").read_text() == "whole"
    tally("a signal while a file is written by sampling: the file is whole, one line", 1, 1)


def test_a_signal_to_a_launcher_that_has_started_nothing_yet(tmp_path: Path, tally: Tally) -> None:
    """While it imports torch."""
    script = tmp_path / "never.py"
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    for number in (signal.SIGTERM, signal.SIGUSR2):
        process = subprocess.Popen(
            ["bash", str(ROOT / "launch/torchrun.sh"), "2", str(script)], stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHON": sys.executable},
        )  # fmt: skip
        while b"elastic.py" not in Path(f"/proc/{process.pid}/cmdline").read_bytes() or not handles_signals(
            process.pid
        ):
            time.sleep(0.005)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 75 and "before the first process was started, nothing is lost" in said
        assert said.count("\n") == 1 and not (tmp_path / "ran").exists()
        tally("a signal to a launcher that imports torch: 75, nothing started", 1, 1)


STUBBORN = """
import signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: None)
open(sys.argv[1] + "/" + __import__("os").environ["RANK"], "w").close()
time.sleep(1000)
"""


@pytest.mark.timeout(240)
def test_processes_that_do_not_leave_are_killed(tmp_path: Path, tally: Tally) -> None:
    """After --shutdown-timeout, or when they were asked three times."""
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    launched = []
    for options, times in (([], 3), (["--shutdown-timeout", "3"], 1)):
        begun = tmp_path / str(times)
        begun.mkdir()
        process = subprocess.Popen(
            ["bash", str(ROOT / "launch/torchrun.sh"), *options, "2", str(script), str(begun)],
            stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHON": sys.executable},
        )  # fmt: skip
        while len(list(begun.iterdir())) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        family = descendants(process.pid)
        for _ in range(times):
            process.send_signal(signal.SIGTERM)
            time.sleep(1.2)
        launched.append((process, family))  # both waits are waited for at the same time
    for process, family in launched:
        _, said = process.communicate(timeout=90)
        assert process.returncode == 137 and "killed" in said, said
        assert not [pid for pid in family if alive(pid)]
        tally("processes that do not leave: killed in time", 1, 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sampling_leaves_in_one_line_and_what_is_written_is_whole(config: Path, tmp_path: Path, tally: Tally) -> None:
    train, sample = str(ROOT / "scripts/diffusion/train.py"), str(ROOT / "scripts/diffusion/inference.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    subprocess.run(
        [sys.executable, train, str(config), "train.steps=4", "train.export=true"], env=environment, check=True
    )
    job = [sample, str(ROOT / "configs/sample/demo.yaml"), f"weights={tmp_path}/runs/run", "prompt=a circle"]
    job += ["num_sample=400", "batch_size=1", "sampling.num_frames=9", "sampling.num_steps=2"]
    launch = ["bash", str(ROOT / "launch/torchrun.sh"), "2"]
    for launcher, number in ((launch, signal.SIGINT), (launch, signal.SIGTERM), ([sys.executable], signal.SIGINT)):
        folder = tmp_path / f"{number}-{len(launcher)}"
        process = subprocess.Popen(
            [*launcher, *job, f"save_dir={folder}"], env=environment, stderr=subprocess.PIPE, text=True
        )
        while len(list(folder.rglob("*.mp4"))) < 3:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        family = descendants(process.pid)
        process.send_signal(number)
        _, said = process.communicate(timeout=100)
        assert process.returncode == 128 + number, said
        assert said.count(f"stopped by {number.name}: samples that are written stay") == 1 and "Traceback" not in said
        assert not [pid for pid in family if alive(pid)]
        for path in folder.rglob("*.mp4"):
            assert probe(str(path)).num_frames == 9 and path.with_suffix(".txt").read_text() == "a circle\n"
        tally("a signal while sampling: one line, files are whole, nothing left", 1, 1)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_encoding_ahead_leaves_with_75_and_goes_on(config: Path, tmp_path: Path, tally: Tally) -> None:
    words = [sys.executable, "-m", "opensora.cli.precompute", str(config), "--out", str(tmp_path / "out")]
    process = subprocess.Popen([*words, "--epochs", "300"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "out").rglob("*.safetensors")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped by SIGTERM: shards that are written stay" in said, said
    assert "Traceback" not in said
    tally("a signal while encoding ahead: 75 and one line", 1, 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
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
    deadline = time.monotonic() + patience(120)
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
