"""A run's folder: who owns it, what it says when the run is finished, whether its disk is large enough."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora.cli.train import main as train_main
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.train.state import run_lock
from opensora.train.state.disk_check import check_disk, checkpoint_bytes
from opensora.train.state.run_lock import DONE, OWNER, RunLock, finished, read_owner, write_done
from opensora.utils.errors import UserError
from tests.conftest import ROOT
from tests.integration.conftest import CONFIG


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of a run in runs/run; its table is made up, so it is submitted with --no-check."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train.yaml"
    path.write_text(CONFIG.format(output=tmp_path / "runs", table="clips.csv"))
    return path


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        RunLock(folder, beat_s=0.1, stale_s=0.5, **options)
    return str(caught.value)


def no_locks(file: int, how: int) -> None:
    raise OSError(38, "Function not implemented")


def another_process(folder: Path, *, ends: bool, job: str = "", machine: str = "") -> "subprocess.Popen[str]":
    """Takes the folder, then dies without a word or stays."""
    code = (
        "import sys, time, os, fcntl; from pathlib import Path; from opensora.train.state import run_lock\n"
        f"run_lock._machine = lambda: {machine!r} or 'here'\n"
        f"env = {{'SLURM_JOB_ID': {job!r}}} if {job!r} else {{}}\n"
        f"lock = run_lock.RunLock(Path({str(folder)!r}), env=env, beat_s=0.1)\n"
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
    monkeypatch.setattr(run_lock, "_machine", lambda: "here")
    another_process(tmp_path, ends=True)
    assert (tmp_path / OWNER).exists()
    begun = time.monotonic()
    RunLock(tmp_path, stale_s=30).release()
    assert time.monotonic() - begun < 5


def test_a_live_process_holds_without_file_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number and start on this machine; by its count on another. Dead, the count stands still."""
    process = another_process(tmp_path, ends=False)
    try:
        monkeypatch.setattr(run_lock, "_machine", lambda: "here")
        assert "in use by process" in refused(tmp_path)  # the kernel's lock
        assert "in use by process" in refused(tmp_path, lock=no_locks)
        monkeypatch.setattr(run_lock, "_machine", lambda: "elsewhere")
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
    file = os.open(tmp_path / run_lock.LOCK, os.O_RDWR)
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
            with pytest.raises(UserError, match=r"output=.*: the disk has .* GB left, and one checkpoint takes"):
                check_disk(cfg, model)
