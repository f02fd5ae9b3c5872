"""launch/submit.py pipeline: the jobs it makes, by a stand-in for sbatch."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from launch import submit
from launch.slurm import pipeline
from opensora.utils.errors import UserError
from tests.conftest import ROOT


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(7):
        (folder / f"{number}.mp4").write_bytes(bytes([number]))
    config = tmp_path / "run.yaml"
    config.write_text(f"source: {folder}\nout: {tmp_path / 'run'}\nshard_size: 2\n")
    return ["pipeline", str(config), "--cpus", "3"]


def test_a_dry_run_prints_the_jobs_and_writes_nothing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "GLOBAL", ("duplicates",))
    options = ["--tasks", "4", "--at-once", "2", "--time", "1:00:00", "--sbatch=--mem=0", "--dry-run"]
    assert submit.main([*words, *options]) == 0
    jobs = capsys.readouterr().out.split("#!/usr/bin/env bash\n")[1:]
    names = [re.findall(r"--job-name=(\S+)", job)[0] for job in jobs]
    assert names == ["run-shards-1", "run-duplicates", "run-shards-2", "run-table"]
    tails = [re.findall(r"config\.yaml engine\.workers=3(.*)", job)[0] for job in jobs]
    assert tails == [" --worker $task/4", " --until duplicates", " --worker $task/4", ""]
    assert ["--array=0-3%2" in job for job in jobs] == [True, False, True, False]
    assert all("#SBATCH --time=1:00:00" in job and "#SBATCH --mem=0" in job for job in jobs)
    assert not (tmp_path / "run").exists()
    for job in jobs:
        checked = subprocess.run(["bash", "-n"], input=job, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr


def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """A folder before all others of PATH; what the stand-ins were called with is in its file ``said``."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sbatch", "scancel"):
        (tools / name).write_text(
            f'#!/bin/sh\necho "{name} $*" >> {tools}/said\n{script if name == "sbatch" else ""}\n'
        )
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    return tools / "said"


def test_each_job_waits_for_the_one_before(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "GLOBAL", ("duplicates",))
    said = stub(tmp_path, monkeypatch, f"wc -l < {tmp_path}/tools/said")
    assert submit.main([*words, "--tasks", "9"]) == 0
    job = tmp_path / "run/jobs/1"
    assert re.findall(r"--dependency=afterany:(\d)|parsable (?=/)", said.read_text()) == ["", "1", "2", "3"]
    assert "submitted jobs 1, 2, 3, 4" in capsys.readouterr().out
    assert "#SBATCH --array=0-3\n" in (job / "shards-1.sbatch").read_text()  # four shards, no task without one
    assert (tmp_path / "run/plan.json").is_file() and (job / "code/data_pipeline/run.py").is_file()
    assert (job / "code/launch/slurm/pipeline.sbatch").is_file() and (job / "job.json").is_file()


def test_of_a_chain_that_is_refused_nothing_is_left(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = stub(
        tmp_path, monkeypatch, f"[ $(wc -l < {tmp_path}/tools/said) = 1 ] && echo 77 || {{ echo no >&2; exit 1; }}"
    )
    with pytest.raises(UserError, match="sbatch: no; nothing was submitted"):
        submit.main(words)
    assert said.read_text().splitlines()[-1] == "scancel 77"
    assert not list((tmp_path / "run/jobs").iterdir())


def test_mistakes_cost_no_place_in_the_queue(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = stub(tmp_path, monkeypatch, "echo 1")
    for more, told in (
        (["engine.kind=slurm"], "must be one of local, ray"),
        (["--tasks", "0"], "must be an integer from 1"),
        (["source=nowhere"], "no such folder or file"),
    ):
        with pytest.raises(UserError, match=told):
            submit.main([*words, *more])
    assert not said.exists()


@pytest.mark.parametrize(
    ("made", "code", "requeued"),
    [(True, 143, True), (False, 143, False), (True, 0, False)],
    ids=["made", "idle", "done"],
)
def test_a_task_whose_time_is_over_is_queued_again_if_it_got_on(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: bool, code: int, requeued: bool
) -> None:
    """The script as bash runs it: srun is a stand-in that ends on the signal."""
    said = stub(tmp_path, monkeypatch, "echo 1")
    submit.main([*words, "--python", shutil.which("true") or "true"])
    tools, out = tmp_path / "tools", tmp_path / "run"
    work = f"mkdir -p {out}/probe; echo x > {out}/probe/1.parquet" if made else ":"
    (tools / "srun").write_text(
        f'#!/bin/sh\ntrap "{work}; exit {code}" USR2\ntouch {tools}/ready\nwhile :; do sleep 0.05; done\n'
    )
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "scontrol $*" >> {said}\nexit 1\n')
    for name in ("srun", "scontrol"):
        (tools / name).chmod(0o755)
    script = out / "jobs/1/table.sbatch"
    environment = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n1", "PATH": f"{tools}:/usr/bin:/bin"}
    waiting = f'while [ ! -e {tools}/ready ]; do sleep 0.05; done; sleep 0.2; kill -USR2 "$0"'
    program = f"bash {script} & job=$!; bash -c '{waiting}' $job; wait $job"
    done = subprocess.run(
        ["bash", "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert ("scontrol requeue 5" in said.read_text()) == requeued, done.stdout + done.stderr
    assert not list((out / "jobs/1").glob("begun-*"))
