"""Launching without a cluster: jobs as text, decisions as functions, locks, and processes that look for each other."""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from acceleration import preflight as look
from acceleration.preflight import Facts, assess, differences
from acceleration.rendezvous import Door, StartError, meet, ranges
from acceleration.runtime import Runtime
from launch import submit
from launch.attempts import Attempt, attempts_without_progress, decide, newest_step, read_history
from launch.attempts import main as attempts_main
from opensora.cli.train import main as train_main
from opensora.config import RunConfig, load_config, run_cli
from opensora.train import run_folder
from opensora.train.preflight import check_disk, checkpoint_bytes
from opensora.train.run_folder import DONE, OWNER, RunLock, finished, read_owner, write_done
from opensora.utils.errors import UserError
from opensora.utils.version import code_digest
from tests.conftest import ROOT
from tests.dist.harness import DistributedFailure, run_distributed
from tests.integration.conftest import CONFIG

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


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration; its table is made up, so it is submitted with --no-check."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train.yaml"
    path.write_text(CONFIG.format(output=tmp_path / "runs", table="clips.csv"))
    return path


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
    "no nodes": (["--nodes=0"], "--nodes=0: allowed are integers >= 1"),
    "no time to save": (["--signal=5"], "--signal=5: allowed are integers >= 30"),
    "two processes on a GPU": (["--gpus-per-node=4", "--tasks-per-node=8"], "--tasks-per-node=8: allowed are at most"),
    "a layout that does not fit": (["--check", "--gpus-per-node=3"], "parallel.mesh"),
    "an array of nothing": (["--array=nowhere"], "--array=nowhere: No such file"),
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
    (job / "code/opensora/config.py").open("a").write("\n")
    code_digest.cache_clear()
    assert code_digest(job / "code") != about["code"]


def stub(path: Path, script: str) -> None:
    path.write_text(script)
    path.chmod(0o755)


# Two tasks; USR2 and TERM go to all processes of a task, one that fails ends the other, the highest code is returned.
SRUN = """#!{python}
import os, signal, subprocess, sys, time
command = [word for i, word in enumerate(sys.argv[1:]) if not word.startswith("--") or i > 1]
tasks = [subprocess.Popen(command, start_new_session=True, env={{**os.environ, "RANK": str(i)}}) for i in range(2)]
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
rank = int(os.environ["RANK"])
def leave(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(0.5 * rank)
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
    "is cancelled": (f"{LISTEN}; {READY}", [signal.SIGTERM], 75, False),
}


@pytest.mark.parametrize("case", SCRIPT)
def test_the_batch_script(case: str, tmp_path: Path) -> None:
    """With an srun and an scontrol that do what they are told."""
    does, signals, code, again = SCRIPT[case]
    run, log = tmp_path / "run", tmp_path / "scontrol.log"
    stub(tmp_path / "python", TASK.format(python=sys.executable, does=does.replace("{here}", str(tmp_path))))
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
        deadline = time.monotonic() + 30
        while signals and time.monotonic() < deadline and len(list(tmp_path.glob("started-*"))) < 2:
            time.sleep(0.02)
        for number in signals:
            # SLURM's warning goes to the script alone, the end of a job to all.
            (process.send_signal if number == signal.SIGUSR2 else lambda n: os.killpg(process.pid, n))(number)
        while again and time.monotonic() < deadline and not (log.exists() and "requeue" in log.read_text()):
            time.sleep(0.02)
        if again:  # then SLURM ends the script
            os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert ("requeue 5" in log.read_text()) is again, said
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


# --- a run's folder


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        RunLock(folder, beat_s=0.1, stale_s=0.5, **options)
    return str(caught.value)


def no_locks(file: int, how: int) -> None:
    raise OSError(38, "Function not implemented")


def another_process(folder: Path, *, ends: bool, job: str = "", machine: str = "") -> "subprocess.Popen[str]":
    """Takes the folder, then dies without a word or stays."""
    code = (
        "import sys, time, os, fcntl; from pathlib import Path; from opensora.train import run_folder\n"
        f"run_folder._machine = lambda: {machine!r} or 'here'\n"
        f"env = {{'SLURM_JOB_ID': {job!r}}} if {job!r} else {{}}\n"
        f"lock = run_folder.RunLock(Path({str(folder)!r}), env=env, beat_s=0.1)\n"
        f"print('taken', flush=True); os._exit(9) if {ends} else time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "taken\n"
    if ends:
        process.wait(20)
    return process


def test_a_second_run_on_a_folder_is_told_who_has_it(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, env={"SLURM_JOB_ID": "12"}, beat_s=0.1)
    said = refused(tmp_path, env={"SLURM_JOB_ID": "13"})
    who = rf"process {os.getpid()} on \S+, SLURM job 12 attempt 0, since \S+"
    assert re.fullmatch(rf"{tmp_path}: in use by {who}; end that run first, .*", said)
    time.sleep(0.3)
    owner = read_owner(tmp_path / OWNER)
    assert owner is not None and owner["beat"] > 0
    lock.release()
    lock.release()
    assert not (tmp_path / OWNER).exists()
    RunLock(tmp_path).release()


def test_what_a_dead_process_held_is_taken_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_machine", lambda: "here")
    another_process(tmp_path, ends=True)
    assert (tmp_path / OWNER).exists()
    begun = time.monotonic()
    RunLock(tmp_path, stale_s=30).release()
    assert time.monotonic() - begun < 5


def test_a_live_process_holds_without_file_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number and start on this machine; by its count on another. Dead, the count stands still."""
    process = another_process(tmp_path, ends=False)
    try:
        monkeypatch.setattr(run_folder, "_machine", lambda: "here")
        assert "in use by process" in refused(tmp_path)  # the kernel's lock
        assert "in use by process" in refused(tmp_path, lock=no_locks)
        monkeypatch.setattr(run_folder, "_machine", lambda: "elsewhere")
        # A lock that only holds on the other machine: it is granted here, the count decides.
        assert "in use by process" in refused(tmp_path, lock=lambda file, how: None)
        assert "in use by process" in refused(tmp_path, lock=no_locks)
    finally:
        process.kill()
        process.wait()
    RunLock(tmp_path, beat_s=0.1, stale_s=0.5, lock=no_locks).release()


def test_the_next_attempt_of_a_job_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node is lost, so nobody will ever count there again."""
    another_process(tmp_path, ends=True, job="7", machine="lost")
    begun = time.monotonic()
    RunLock(tmp_path, env={"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, stale_s=30).release()
    assert time.monotonic() - begun < 5


def test_a_process_that_lost_its_run_ends(tmp_path: Path) -> None:
    """Cut off with its node, it comes back after the next attempt has begun."""
    lost: list[str] = []
    first = RunLock(tmp_path, env={"SLURM_JOB_ID": "7"}, beat_s=0.05, lock=no_locks, lost=lost.append)
    next_one = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    second = RunLock(tmp_path, env=next_one, beat_s=0.05, lock=no_locks)
    time.sleep(0.3)
    assert len(lost) == 1 and "taken over by" in lost[0] and "attempt 1" in lost[0]
    first.release()
    assert read_owner(tmp_path / OWNER) is not None
    second.release()


def test_locks_are_not_inherited(tmp_path: Path) -> None:
    """A data worker that outlives its trainer must not hold the run."""
    lock = RunLock(tmp_path)
    child = subprocess.Popen(["sleep", "20"])
    lock.release()
    file = os.open(tmp_path / run_folder.LOCK, os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(file)
    child.kill()
    child.wait()


def test_a_finished_run_is_over(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = load_config(RunConfig, config)
    assert not finished(cfg)
    cfg.folder.mkdir(parents=True)
    write_done(cfg)
    assert finished(cfg) and os.listdir(cfg.folder) == [DONE]
    assert train_main([str(config)]) == 0  # without data, without processes
    for more in (["train.steps=7"], ["train.resume=elsewhere"], ["train.resume=none"]):
        assert not finished(load_config(RunConfig, config, more)), more
    write_done(load_config(RunConfig, config, ["train.export=false"]))
    assert not finished(cfg) and finished(load_config(RunConfig, config, ["train.export=false"]))
    (cfg.folder / DONE).write_text("")
    assert not finished(cfg)


# --- processes that look for each other


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """Results, or what was raised."""
    results: list[Any] = [None] * len(calls)

    def keep(i: int) -> None:
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=keep, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("0.0.0.0", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def test_ranks_meet_past_strangers() -> None:
    """A silent one, one that talks, and the door of another job."""
    ports = free_ports(4)
    silent = socket.create_server(("0.0.0.0", ports[0]))
    talker = socket.create_server(("0.0.0.0", ports[1]))
    threading.Thread(target=lambda: talker.accept()[0].sendall(b"220 ready\r\n"), daemon=True).start()
    other = Door("localhost", ports[2:3], "another-job", 1)
    found = in_threads(*(lambda rank=rank: meet(rank, 3, "127.0.0.1", ports, "this-job", 20) for rank in range(3)))
    found[1].set("a", "b")
    assert found[0].get("a") == found[2].get("a") == b"b"
    silent.close(), talker.close(), other.close()


def test_who_does_not_come_is_named() -> None:
    ports = free_ports(1)
    said = in_threads(*(lambda rank=rank: meet(rank, 5, "127.0.0.1", ports, "job", 1) for rank in (0, 2)))
    assert str(said[0]) == "2 of 5 processes came within 1 s; missing: rank 1, 3-4; see their logs"
    assert isinstance(said[1], StartError) and "rank 2" in str(said[1])


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("0.0.0.0", 0)) as stranger:
        port = stranger.getsockname()[1]
        said = in_threads(
            lambda: meet(0, 2, "127.0.0.1", [port], "job", 2), lambda: meet(1, 2, "127.0.0.1", [port], "job", 1)
        )
    assert str(said[0]).startswith(f"127.0.0.1: port {port} in use by another program")
    assert str(said[1]).startswith("rank 0 did not answer at 127.0.0.1 within") and f"port {port}" in str(said[1])


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


# --- preflight


def facts(rank: int, **more: Any) -> Facts:
    return Facts(
        **{"rank": rank, "host": f"n{rank // 2}", "device": "cpu", "identity": "", "same": {"code": "a"}, **more}
    )


def test_who_differs_is_named() -> None:
    everyone = [facts(rank) for rank in range(6)]
    assert differences(everyone) == []
    everyone[3] = facts(3, same={"code": "b"})
    assert differences(everyone) == ["code is not the same on all processes: rank 3 has b, the others a"]
    shared = [facts(rank, identity=f"gpu-{rank % 2}") for rank in range(3)]
    assert differences(shared) == ["rank 0, 2 share one device (gpu-0): start one process per device"]


def test_slow_links_and_mixed_devices_are_named() -> None:
    everyone = [facts(rank, link_s=1e-3 if rank % 2 else 1e-4, reduce_s=2e-3) for rank in range(8)]
    report = assess(everyone, 1 << 20)
    assert report.warnings == [] and report.summary.startswith(
        "preflight: 8 processes on 4 hosts, 8 x cpu; all-reduce "
    )
    everyone[3] = facts(3, link_s=1e-2)
    everyone[0] = facts(0, link_s=1e-4, device="other")
    warnings = assess(everyone, 1 << 20).warnings
    assert len(warnings) == 2 and "rank 0" in warnings[0]
    assert warnings[1].startswith("rank 3 (n1) to rank 4 (n2): 0.1 GB/s, where links between nodes have 1 GB/s")


def look_at_all(differing: int | None) -> str:
    rank = int(os.environ["RANK"])
    runtime = Runtime(rank, int(os.environ["WORLD_SIZE"]), rank, torch.device("cpu"))
    return look.preflight(runtime, {"code": "b" if rank == differing else "a"}).summary


def test_preflight_on_processes() -> None:
    said = run_distributed(look_at_all, 2, None, timeout=60)
    assert said[0] == said[1] and re.match(r"preflight: 2 processes on 1 hosts, 2 x cpu; all-reduce \S+ GB/s", said[0])
    with pytest.raises(DistributedFailure, match="code is not the same on all processes: rank 1 has b, the others a"):
        run_distributed(look_at_all, 2, 1, timeout=60)


def test_a_disk_that_is_too_small(config: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    cfg = load_config(RunConfig, config)
    model = torch.nn.Linear(1000, 1000, device="meta")
    cfg.folder.mkdir(parents=True)
    size = checkpoint_bytes(cfg, model)
    assert size == 1_001_000 * 8 * 4  # weights, two moments, the average, in fp64
    usage = shutil.disk_usage(config)
    for free, ok in ((size - 1, False), (size, True), (4 * size, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if ok:
            check_disk(cfg, model)
        else:
            with pytest.raises(UserError, match=r"output=.*: .* GB left, a checkpoint takes 0.0; make room"):
                check_disk(cfg, model)


# --- torchrun


WORKER = """
import os, sys
import torch, torch.distributed as dist
from acceleration.runtime import start, stop
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
start(30)
open(f"{sys.argv[1]}/{attempt}-{rank}", "w").close()
if sys.argv[2] == "killed" and attempt == 0 and rank == 1:
    os.kill(os.getpid(), 9)
if sys.argv[2].isdigit():
    os._exit(int(sys.argv[2]))
dist.all_reduce(torch.ones(1))
stop()
"""


def torchrun(tmp_path: Path, *arguments: object) -> "subprocess.Popen[str]":
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "made").mkdir(exist_ok=True)
    return subprocess.Popen(
        ["bash", ROOT / "launch/torchrun.sh", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
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
)


@pytest.mark.parametrize("arguments", [*USAGE, "--nodes 2 --rendezvous h 1 x"])
def test_torchrun_usage(arguments: str, tmp_path: Path) -> None:
    process = torchrun(tmp_path, *arguments.split())
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2 and err.startswith("usage: launch/torchrun.sh")


def test_a_stop_is_not_started_again(tmp_path: Path) -> None:
    process = torchrun(tmp_path, "--restarts", 2, 2, tmp_path / "worker.py", tmp_path / "made", 75)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in err
    assert sorted(os.listdir(tmp_path / "made")) == ["0-0", "0-1"]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code", "attempts"), [("2", 2, 1), ("1", 1, 3), ("killed", 0, 2), ("well", 0, 1)])
def test_restarts(tmp_path: Path, how: str, code: int, attempts: int) -> None:
    process = torchrun(tmp_path, "--restarts", 2, 2, tmp_path / "worker.py", tmp_path / "made", how)
    _, err = process.communicate(timeout=100)
    assert process.returncode == code, err
    assert sorted(os.listdir(tmp_path / "made")) == [f"{i}-{rank}" for i in range(attempts) for rank in (0, 1)]


@pytest.mark.slow
def test_two_nodes(tmp_path: Path) -> None:
    """Two launchers on this machine; both start again when a process of one is killed."""
    where = ["--nodes", 2, "--rendezvous", f"localhost:{free_ports(1)[0]}", "--restarts", 1]
    both = [torchrun(tmp_path, *where, 1, tmp_path / "worker.py", tmp_path / "made", "killed") for _ in range(2)]
    said = [process.communicate(timeout=100)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(os.listdir(tmp_path / "made")) == ["0-0", "0-1", "1-0", "1-1"]


@pytest.mark.slow
def test_a_stranger_where_nodes_should_meet(tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as stranger:
        port = stranger.getsockname()[1]
        process = torchrun(tmp_path, "--nodes", 2, "--rendezvous", f"localhost:{port}", 1, tmp_path / "worker.py")
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.startswith(f"error: localhost:{port} is in use by another program")
