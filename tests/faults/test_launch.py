"""Launching without a cluster: jobs as text, decisions as functions, the batch script, torchrun."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from acceleration.checkpoint.atomic_dir import read_manifest
from launch import elastic, submit
from launch.attempts import Attempt, attempts_without_progress, decide, newest_step, read_history
from launch.attempts import main as attempts_main
from opensora.cli.main import run_cli
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.utils.files.code_digest import code_digest
from tests.conftest import ROOT
from tests.integration import conftest as integration
from tests.integration.conftest import CONFIG
from tests.patience import patience

shapes = integration.shapes  # the fixture


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of a run in runs/run; its table is made up, so it is submitted with --no-check."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train.yaml"
    path.write_text(CONFIG.format(output=tmp_path / "runs", table="clips.csv"))
    return path


# --- whether to queue again


def attempt(code: int, begun: int, step: int, **more: bool) -> Attempt:
    return Attempt(attempt=0, code=code, begun=begun, step=step, **more)


FAILED = attempt(1, 40, 40)
DECISIONS: dict[str, tuple[list[Attempt], Attempt, bool]] = {
    "finished": ([], attempt(0, 0, 50), False),
    "saved": ([], attempt(75, 0, 20), True),
    "saved for the tenth time": ([attempt(75, i, i + 1) for i in range(10)], attempt(75, 10, 11), True),
    "bad configuration": ([], attempt(2, 0, 0), False),
    "cancelled": ([], attempt(75, 0, 20, terminated=True), False),
    "cancelled before it could save": ([], attempt(143, 0, 0, terminated=True), False),
    "a crash after progress": ([], attempt(1, 0, 40), True),
    "a hang after progress": ([], attempt(70, 0, 40), True),
    "a first crash without": ([attempt(1, 0, 40)], FAILED, True),
    "a second": ([attempt(1, 0, 40), FAILED], FAILED, True),
    "a third": ([attempt(1, 0, 40), FAILED, FAILED], FAILED, False),
    "a resumed run that crashes at once, three times": ([FAILED, FAILED], FAILED, False),
    "progress between crashes": ([FAILED, FAILED, attempt(1, 40, 60)], attempt(1, 60, 60), True),
    "saved without progress, three times": ([attempt(75, 9, 9)] * 2, attempt(75, 9, 9), False),
    "pre-empted before it could begin, again and again": (
        [attempt(143, 9, 9, preempted=True)] * 9,
        attempt(143, 9, 9, preempted=True),
        True,
    ),
    "pre-emptions excuse no crashes": ([FAILED, attempt(143, 40, 40, preempted=True), FAILED], FAILED, False),
}


@pytest.mark.parametrize("case", DECISIONS)
def test_whether_a_job_is_queued_again(case: str) -> None:
    history, now, wanted = DECISIONS[case]
    assert decide(history, now).requeue is wanted


def test_attempts_are_written_down_and_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, job = tmp_path, tmp_path / "jobs/1"
    job.mkdir(parents=True)
    for step, complete in ((20, True), (40, True), (60, False)):
        (run / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        if complete:
            (run / f"checkpoints/step-{step:08d}/manifest.json").touch()
    assert newest_step(run) == 40 and newest_step(tmp_path / "none") == 0
    command = ["decide", "--run", str(run), "--job", str(job)]
    assert attempts_main([*command, "--begun", "20", "--code", "1"]) == 0
    for code in (0, 0, 1):
        assert attempts_main([*command, "--begun", "40", "--code", "1"]) == code
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("requeue: exit code 1 at step 40") and said[3].startswith("stop: 3 attempts in a row")
    (job / "attempts.jsonl").open("a").write('{"attempt": 1, "co')
    assert attempts_without_progress(read_history(job / "attempts.jsonl")) == 3


# --- the job


def rendered(config: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert submit.main([str(config), "--no-check", "--dry-run", *options]) == 0
    text = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert sorted(os.listdir(config.parent)) == ["train.yaml"]
    return text


def test_a_job_says_what_was_asked(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "--nodes=4",
        "--time=4:00:00",
        "--partition=gpu",
        "--account=a",
        "--qos=q",
        "--signal=90",
        "--sbatch=--mem=0",
    ]
    text = rendered(config, capsys, *asked, "name=first", "--cpus-per-task=12")
    before_code = text[: text.index("set -uo")]
    for line in (
        "nodes=4",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "time=4:00:00",
        "partition=gpu",
        "account=a",
        "qos=q",
    ):
        assert f"\n#SBATCH --{line}\n" in before_code, line
    for line in ("signal=B:USR2@90", "requeue", "open-mode=append", "mem=0", "job-name=first", "cpus-per-task=12"):
        assert f"\n#SBATCH --{line}\n" in before_code, line
    assert before_code.rindex("--signal=B:USR2@90") > before_code.index("--signal=B:USR2@120")  # the last one counts
    # What stands after a command is not read by sbatch.
    commands = [i for i, line in enumerate(text.splitlines()) if line and not line.startswith("#")]
    assert all(i < commands[0] for i, line in enumerate(text.splitlines()) if line.startswith("#SBATCH"))


def test_a_container_and_an_array(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = config.parent.parent / f"{config.parent.name}-lines"
    lines.write_text("seed=1\n# not this\nseed=2 name=other\n")
    text = rendered(config, capsys, "--container=a.sqsh", "--mounts=/data:/data", f"--array={lines}")
    assert "#SBATCH --array=0-1\n" in text and "%A_%a.log" in text
    assert "--container-image=a.sqsh --container-mounts=/data:/data" in text and "PYTHON=python\n" in text
    assert f"RUNS=({config.parent}/runs/run-0 {config.parent}/runs/other)" in text


MISTAKES: dict[str, tuple[list[str], str]] = {
    "a key": (["train.stepz=3"], "train.stepz: unknown key; did you mean steps?"),
    "an option": (["--nodez=2"], "nodez: unknown key"),
    "no nodes": (["--nodes=0"], "--nodes=0: must be an integer from 1 to"),
    "no time to save": (["--signal=5"], "--signal=5: must be an integer from 30 to"),
    "two processes on a GPU": (["--gpus-per-node=4", "--tasks-per-node=8"], "--tasks-per-node=8: must be at most"),
    "a layout that does not fit": (["--check", "--gpus-per-node=3"], "parallel.mesh"),
    "an array of nothing": (["--array=nowhere"], "--array=nowhere: cannot be read (No such file"),
    "two runs in one folder": (["--array=same"], "two runs in"),
    "no cluster": ([], "sbatch: not found"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    case: str, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, wanted = MISTAKES[case]
    Path("same").write_text("name=a\nname=a\n")
    check = [] if "--check" in options else ["--no-check"]
    monkeypatch.setattr(submit.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["submit.py", str(config), *check, *(o for o in options if o != "--check")])
    with pytest.raises(SystemExit) as caught:
        run_cli(submit.main)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.count("\n") == 1
    assert wanted in err
    assert sorted(os.listdir(config.parent)) == ["same", "train.yaml"]


def test_what_is_submitted_is_frozen(config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bin = tmp_path / "bin"
    bin.mkdir()
    stub(bin / "sbatch", "#!/bin/sh\necho '77;cluster'\n")
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    for number in ("1", "2"):
        assert submit.main([str(config), "--no-check", "optim.lr=3e-4", "name=first"]) == 0
        job = tmp_path / "runs/first/jobs" / number
        assert (job / "slurm_job_id").read_text() == "77\n"
    cfg = load_config(RunConfig, job / "config-0.yaml")
    assert cfg == load_config(RunConfig, config, ["optim.lr=3e-4", "name=first"])
    about = json.loads((job / "job.json").read_text())
    assert about["code"] == code_digest() == code_digest(job / "code") and "optim.lr=3e-4" in about["command"]
    (job / "code/opensora/config/run.py").open("a").write("\n")
    code_digest.cache_clear()
    assert code_digest(job / "code") != about["code"]


def stub(path: Path, script: str) -> None:
    path.write_text(script)
    path.chmod(0o755)


REFUSING = "#!/bin/sh\necho 'sbatch: error: Batch job submission failed: Invalid account' >&2\nexit 1\n"
# what sbatch does -> (exit code, what is said)
REFUSALS: dict[str, tuple[str, str]] = {
    "refuses": (REFUSING, "error: sbatch: error: Batch job submission failed: Invalid account; nothing was submitted"),
    "refuses on stdout": ("#!/bin/sh\necho no such partition; exit 3\n", "error: sbatch: no such partition; nothing"),
    "says nothing": ("#!/bin/sh\nexit 7\n", "error: sbatch: exit code 7, without a word; nothing was submitted"),
    "cannot be run": (
        "#!/nowhere\n",
        "error: sbatch: cannot be run (No such file or directory); nothing was submitted",
    ),
    "dies": ("#!/bin/sh\nkill -9 $$\n", "error: sbatch: exit code -9, without a word; nothing was submitted"),
}


def sbatch_does(script: str, tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    bin = tmp_path / "bin"
    bin.mkdir(exist_ok=True)
    stub(bin / "sbatch", script)
    patch.setenv("PATH", f"{bin}:{os.environ['PATH']}")


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_job_leaves_nothing(
    case: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what was there before stays."""
    script, wanted = REFUSALS[case]
    monkeypatch.setattr(sys, "argv", ["submit.py", str(config), "--no-check", "name=first"])
    for there in ([], ["1"]):
        for number in there:
            sbatch_does("#!/bin/sh\necho 77\n", tmp_path, monkeypatch)
            with pytest.raises(SystemExit, match="0"):
                run_cli(submit.main)
            capsys.readouterr()
            assert (tmp_path / "runs/first/jobs" / number / "slurm_job_id").read_text() == "77\n"
        sbatch_does(script, tmp_path, monkeypatch)
        with pytest.raises(SystemExit) as caught:
            run_cli(submit.main)
        out, err = capsys.readouterr()
        assert caught.value.code == 2 and out == "" and err.count("\n") == 1 and wanted in err, err
        assert (tmp_path / "runs").exists() is bool(there)
        assert not there or os.listdir(tmp_path / "runs/first/jobs") == there


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("number", "queued"),
    [
        (signal.SIGUSR1, False),
        (signal.SIGTERM, True),
        pytest.param(signal.SIGINT, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_submit_leaves_nothing_that_is_not_queued(
    number: signal.Signals, queued: bool, config: Path, tmp_path: Path
) -> None:
    bin = tmp_path / "bin"
    bin.mkdir()
    said = "echo 77;" if queued else ""
    stub(bin / "sbatch", f"#!/bin/sh\n{said}\ntouch {tmp_path}/asked\nexec sleep 100\n")
    process = subprocess.Popen(
        [sys.executable, ROOT / "launch/submit.py", str(config), "--no-check"],
        env=os.environ | {"PATH": f"{bin}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + patience(100)
        while not (tmp_path / "asked").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    jobs = tmp_path / "runs/run/jobs"
    assert err == "" and out.count("\n") == 1
    if queued:
        assert process.returncode == 0 and "submitted job 77" in out and (jobs / "1/code/opensora").is_dir()
    else:
        assert process.returncode == 128 + number and not (tmp_path / "runs").exists()
        assert f"interrupted: {jobs / '1'} is removed; squeue --name=run shows" in out


def test_a_place_that_cannot_be_written_is_one_line(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch_does("#!/bin/sh\necho 77\n", config.parent, monkeypatch)
    (config.parent / "runs").write_text("x")
    from opensora.utils.errors import UserError

    with pytest.raises(UserError, match=r"runs/run/jobs: cannot be written \(Not a directory\); nothing was submitted"):
        submit.main([str(config), "--no-check"])


def test_attempts_that_cannot_be_written_down_are_not_made_without_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "attempts.jsonl").mkdir()
    assert attempts_main(["decide", "--run", str(tmp_path), "--job", str(tmp_path), "--code", "1"]) == 1
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "attempts.jsonl: not a file; move it away, and submit again" in said


# Two tasks, as in SLURM: USR2 and TERM go to all processes of a task, one that fails ends the other, the highest code
# is returned.
SRUN = """#!{python}
import os, signal, subprocess, sys, time
command = sys.argv[next(i for i, word in enumerate(sys.argv) if word == "sh"):]
slurm = {{"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1"}}
tasks = [
    subprocess.Popen(command, start_new_session=True,
                     env={{**os.environ, **slurm, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}})
    for i in range(2)
]
def forward(number, frame):
    for task in tasks:
        if task.poll() is None:
            os.killpg(task.pid, number)
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, forward)
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks):
        forward(signal.SIGTERM, None)
    time.sleep(0.02)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
"""
TASK = """#!{python}
import os, signal, sys, time
rank = int(os.environ["SLURM_PROCID"])
def leave(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(0.5 * rank)
    open(f"{here}/left-{{rank}}", "w").close()
    sys.exit(75)
{does}
"""
READY = "open(f'{here}/started-{rank}', 'w').close(); time.sleep(20)"
LISTEN = "signal.signal(signal.SIGUSR2, leave); signal.signal(signal.SIGTERM, leave)"
# what every task does, the signals that come meanwhile, the exit code, whether the job queues itself again
SCRIPT: dict[str, tuple[str, list[signal.Signals], int, bool]] = {
    "finishes": ("", [], 0, False),
    "is refused": ("if rank == 0: sys.exit(2)\ntime.sleep(20)", [], 2, False),
    "fails": ("if rank == 1: sys.exit(1)\ntime.sleep(20)", [], 1, True),
    "is asked to stop before the limit": (f"{LISTEN}; {READY}", [signal.SIGUSR2], 75, True),
    "is asked before it listens": (f"{READY.replace('20', '2')}; {LISTEN}; time.sleep(20)", [signal.SIGUSR2], 75, True),
    "is asked by another warning": (f"{LISTEN}; {READY}", [signal.SIGUSR1], 75, True),
    "is cancelled": (f"{LISTEN}; {READY}", [signal.SIGTERM], 75, False),
    "is asked by a person": (f"{LISTEN}; {READY}", [signal.SIGINT], 75, False),
    "is asked by a person to stop now": (f"{LISTEN}; {READY}", [signal.SIGQUIT], 75, False),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", SCRIPT)
def test_the_batch_script(case: str, tmp_path: Path) -> None:
    """With an srun and an scontrol that do what they are told."""
    does, signals, code, again = SCRIPT[case]
    run, log = tmp_path / "run", tmp_path / "scontrol.log"
    stub(
        tmp_path / "python",
        TASK.format(python=sys.executable, here=tmp_path, does=does.replace("{here}", str(tmp_path))),
    )
    stub(tmp_path / "srun", SRUN.format(python=sys.executable))
    stub(tmp_path / "scontrol", f'#!/bin/sh\necho "$*" >> {log}')
    environment = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n1", "RUN": str(run), "CODE": str(ROOT)}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOST_PYTHON": sys.executable}
    process = subprocess.Popen(
        ["bash", ROOT / "launch/slurm.sbatch", "config.yaml"],
        env=os.environ | environment | {"PYTHON": str(tmp_path / "python"), "ENTRY": "x"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + patience(30)
        while signals and time.monotonic() < deadline and len(list(tmp_path.glob("started-*"))) < 2:
            time.sleep(0.02)
        for number in signals:
            # The end of a job goes to all, everything else to the script alone.
            (process.send_signal if number != signal.SIGTERM else lambda n: os.killpg(process.pid, n))(number)
        while again and time.monotonic() < deadline and not (log.exists() and "requeue" in log.read_text()):
            time.sleep(0.02)
        if again:  # then SLURM ends the script
            os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert ("requeue 5" in log.read_text()) is again, said
    assert len(list(tmp_path.glob("left-*"))) == (2 if code == 75 else 0), "a task was ended while it left"
    assert json.loads((run / "jobs/slurm-5/attempts.jsonl").read_text())["code"] == code, said
    assert again or process.returncode == code, said


def test_the_batch_script_by_hand_wants_a_run(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RUN"}
    done = subprocess.run(
        ["bash", ROOT / "launch/slurm.sbatch"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=20,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: RUN is not set") and not os.listdir(tmp_path)


# --- torchrun


def free_port() -> int:
    with socket.create_server(("0.0.0.0", 0)) as one:
        return int(one.getsockname()[1])


WORKER = """
import os, sys
import torch, torch.distributed as dist
from acceleration.distributed.runtime import start, stop
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
open(f"{sys.argv[1]}/{attempt}-{rank}", "w").close()  # before the group is made, which waits for both
start(30)
if sys.argv[2] == "killed" and attempt == 0 and rank == 1:
    os.kill(os.getpid(), 9)
if sys.argv[2].isdigit():
    os._exit(int(sys.argv[2]))
dist.all_reduce(torch.ones(1))
stop()
"""


def torchrun(tmp_path: Path, *arguments: object, env: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "made").mkdir(exist_ok=True)
    return subprocess.Popen(
        ["bash", ROOT / "launch/torchrun.sh", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | dict(env or {}),
    )


USAGE = (
    "",
    "2",
    "0 x",
    "two x",
    "--nodes 2 1 x",
    "--nodes 2",
    "--fast 1 2 x",
    "--rendezvous h:1 1 x",
    "--restarts -1 1 x",
    "--shutdown-timeout 0 1 x",
)


@pytest.mark.parametrize("arguments", [*USAGE, "--nodes 2 --rendezvous h 1 x"])
def test_torchrun_usage(arguments: str, tmp_path: Path) -> None:
    process = torchrun(tmp_path, *arguments.split())
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2 and err.startswith("usage: launch/torchrun.sh")


@pytest.mark.parametrize(("code", "final"), [(2, True), (75, True), (1, False), (70, False), (-9, False)])
def test_what_is_started_again(code: int, final: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=code, error_file="none")
    later = ProcessFailure(local_rank=0, pid=2, exitcode=1 if final else 75, error_file="none")
    later.timestamp = failure.timestamp + 1
    result = RunResult(state=WorkerState.FAILED, failures={0: later, 1: failure})
    monkeypatch.setattr(elastic.Agent.__mro__[1], "_monitor_workers", lambda agent, group: result)
    agent = elastic.Agent.__new__(elastic.Agent)
    agent._remaining_restarts = 1
    group = SimpleNamespace(spec=SimpleNamespace(max_restarts=1))
    if final:
        with pytest.raises(ChildFailedError):
            agent._monitor_workers(group)
    else:
        assert agent._monitor_workers(group) is result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "attempts"), [("75", 75, 1), ("2", 2, 1), ("1", 1, 3), ("killed", 0, 2), ("well", 0, 1)]
)
def test_restarts(tmp_path: Path, how: str, code: int, attempts: int) -> None:
    process = torchrun(tmp_path, "--restarts", 2, 2, tmp_path / "worker.py", tmp_path / "made", how)
    _, err = process.communicate(timeout=100)
    assert process.returncode == code, err
    assert sorted(os.listdir(tmp_path / "made")) == [f"{i}-{rank}" for i in range(attempts) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_training_that_is_killed_starts_again_and_ends_the_same(shapes: Path, tmp_path: Path) -> None:
    """Rank 1 is killed while step 4 is being saved; the next attempt finds the checkpoint of step 2, or this one."""
    config, digests = tmp_path / "train.yaml", []
    config.write_text(CONFIG.format(output=tmp_path / "runs", table=shapes / "train.csv"))
    command = [ROOT / "tests/faults/faulty.py", ROOT / "scripts/diffusion/train.py", config, "train.checkpoint_every=2"]
    for name, fault in (("whole", {}), ("killed", {"FAULTY_KILL_AT": "4"})):
        process = torchrun(tmp_path, "--restarts", 1, 2, *command, f"name={name}", env=fault)
        _, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        assert ("starting again (1 of 1)" in err) is bool(fault) and ("resumed" in err) is bool(fault), err
        manifest = read_manifest(tmp_path / f"runs/{name}/checkpoints/step-00000006")
        assert manifest is not None
        digests.append({file: about["sha256"] for file, about in manifest["files"].items()})
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_two_nodes(tmp_path: Path) -> None:
    """Two launchers on this machine; both start again when a process of one is killed."""
    where = ["--nodes", 2, "--rendezvous", f"localhost:{free_port()}", "--restarts", 1]
    both = [torchrun(tmp_path, *where, 1, tmp_path / "worker.py", tmp_path / "made", "killed") for _ in range(2)]
    said = [process.communicate(timeout=100)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    # A launcher that sees the other one come back joins it without counting that as an attempt of its own.
    made = set(os.listdir(tmp_path / "made"))
    assert made >= {"0-0", "0-1"} and made & {"1-0", "1-1"}


@pytest.mark.slow
def test_a_stranger_where_nodes_should_meet(tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as stranger:
        port = stranger.getsockname()[1]
        process = torchrun(tmp_path, "--nodes", 2, "--rendezvous", f"localhost:{port}", 1, tmp_path / "worker.py")
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.startswith(f"error: localhost:{port} is in use by another program")
