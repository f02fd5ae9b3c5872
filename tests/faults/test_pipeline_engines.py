"""The same outputs from every engine, byte for byte: Ray with its processes killed, and an array of a real Slurm."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults import test_slurm
from tests.faults.conftest import Tally
from tests.faults.pipeline_runs import Command, journals, outputs, run
from tests.faults.test_pipeline_kill import SLOWLY, clips, wanted, write_config
from tests.patience import patience

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
lab = test_slurm.lab  # the fixture
__all__ = ["clips", "lab", "wanted"]
RAY = ("engine.kind=ray", "engine.workers=2", "limits.attempts=100")


@pytest.fixture
def ray() -> None:
    pytest.importorskip("ray")


def test_ray(ray: None, clips: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    run(write_config(tmp_path, clips), *RAY)
    assert outputs(tmp_path / "run") == wanted and journals(tmp_path / "run") == []


def wait_for_others(command: Command, word: str) -> list[int]:
    deadline = time.monotonic() + patience(200)
    while not (found := command.others(word)):
        assert time.monotonic() < deadline and command.process.poll() is None, command.end()
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("word", ["data_pipeline.worker", "ray::_make"])
def test_ray_with_a_process_killed(ray: None, clips: Path, wanted: dict[str, bytes], tmp_path: Path, word: str) -> None:
    """The worker that decodes, and the one of Ray's that runs the task."""
    draw = random.Random(3)
    command = Command(write_config(tmp_path, clips), *RAY, env=SLOWLY)
    for _ in range(3):
        if command.process.poll() is not None:
            break
        os.kill(draw.choice(wait_for_others(command, word)), signal.SIGKILL)
        time.sleep(draw.uniform(0.1, 1.0))
    assert command.end(300) == 0, command.said
    assert outputs(tmp_path / "run") == wanted and journals(tmp_path / "run") == []


def test_ray_killed_whole_at_random_instants(
    ray: None, clips: Path, wanted: dict[str, bytes], tmp_path: Path, tally: Tally
) -> None:
    """The command alone, which takes its cluster down with it; what is done stays."""
    draw, kills = random.Random(11), 0
    for number in range(int(os.environ.get("OPENSORA_TEST_RAY_KILLS", "4"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = write_config(folder, clips)
        command = Command(config, *RAY, env=SLOWLY)
        wait_for_others(command, "data_pipeline.worker")
        time.sleep(draw.uniform(0.0, 4.0))
        if command.process.poll() is None:
            command.kill()
            kills += 1
        command.process.wait()
        command.wait_gone(120)
        run(config)  # by the other engine
        assert outputs(folder / "run") == wanted and journals(folder / "run") == []
    tally("pipeline: kills of a command with Ray, same outputs", kills, kills)


def test_an_array_of_five_tasks_with_some_of_them_killed(
    lab: Path, shared_media: Path, tmp_path: Path, tally: Tally
) -> None:
    """The pipeline as it is, on real clips; tasks are requeued as a cluster does it, and killed as it never should."""
    what = f"source: {shared_media}/edge_cases\nshard_size: 3\n"
    for name in ("wanted", "run"):
        (tmp_path / f"{name}.yaml").write_text(what + f"out: {tmp_path / name}\n")
    run(tmp_path / "wanted.yaml", program="data_pipeline.run")
    submit = [
        sys.executable,
        ROOT / "launch/submit.py",
        "pipeline",
        tmp_path / "run.yaml",
        "--tasks",
        "5",
        "--cpus",
        "1",
    ]
    said = subprocess.run([*submit, "--partition", "low"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    jobs = (tmp_path / "run/jobs/1/slurm_job_id").read_text().split()
    deadline, disturbed = time.monotonic() + patience(600), 0
    while states := queue(jobs):
        assert time.monotonic() < deadline, states
        running = [job for job, state in states if state == "RUNNING"]
        if disturbed < 3 and running and list((tmp_path / "run").glob("*/.*.journal")):
            subprocess.run(["scontrol", "requeue", running[disturbed % len(running)]], check=False)
            disturbed += 1
        time.sleep(1)
    logs = "\n".join(path.read_text() for path in (tmp_path / "run/jobs/1/logs").iterdir())
    assert disturbed == 3 and logs.count("starts on") >= len(jobs) + 3, logs
    assert outputs(tmp_path / "run") == outputs(tmp_path / "wanted"), logs
    for name in ("clips.parquet",):
        if (tmp_path / "wanted" / name).exists():
            assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()
    tally("pipeline: tasks of an array requeued, same outputs", disturbed, disturbed)


def queue(jobs: list[str]) -> list[tuple[str, str]]:
    """(job, state) of what is in the queue."""
    done = subprocess.run(
        ["squeue", "-h", "-r", "-j", ",".join(jobs), "-o", "%i %T"], capture_output=True, text=True, check=False
    )
    return [(line.split()[0], line.split()[1]) for line in done.stdout.splitlines()]
