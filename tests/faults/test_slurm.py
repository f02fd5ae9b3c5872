"""launch/submit.py on a real Slurm: whatever ends an attempt, the run ends as if nothing had, or not at all.

The cluster is started here by ``slurm_lab.sh`` (OPENSORA_SLURM_LAB, or ../shared/slurm): four virtual nodes on this
machine, a partition ``low`` that ``high`` pre-empts.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from acceleration.checkpoint import newest
from acceleration.checkpoint.atomic_dir import read_manifest
from acceleration.distributed.launcher_variables import candidate_ports, rendezvous_from_environment
from tests.conftest import ROOT
from tests.integration import conftest as integration
from tests.patience import patience

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4500)]
STEPS, EVERY = 16, 4
shapes = integration.shapes  # the fixture
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


def call(*command: object, **more: Any) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, check=False, **more)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def lab() -> Iterator[Path]:
    """The folder of a running cluster."""
    script = Path(os.environ.get("OPENSORA_SLURM_LAB", ROOT.parent / "shared" / "slurm")) / "slurm_lab.sh"
    if not script.is_file():
        pytest.skip(f"no {script}; set OPENSORA_SLURM_LAB to a folder with slurm_lab.sh")
    if os.geteuid() != 0:
        pytest.skip("a Slurm of one's own needs root")
    for what in ("install", "start"):
        if what == "install" and shutil.which("sbatch") and shutil.which("munged"):
            continue
        done = subprocess.run(["bash", script, what], capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            pytest.skip(f"Slurm cannot be {what}ed here: {done.stderr[-300:]}")
    conf = call("bash", script, "env").removeprefix("export SLURM_CONF=")
    os.environ["SLURM_CONF"] = conf
    yield Path(conf).parent.parent
    del os.environ["SLURM_CONF"]
    call("bash", script, "stop")


class Cluster:
    """Jobs of one test."""

    def __init__(self, lab: Path, folder: Path, table: Path) -> None:
        self.lab, self.folder = lab, folder
        self.config = folder / "train.yaml"
        self.config.write_text(integration.CONFIG.format(output=folder / "runs", table=table))
        self.python = folder / "python"
        self.python.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/faults/faulty.py "$@"\n')
        self.python.chmod(0o755)
        (folder / "hooks").mkdir()
        self.begun = time.monotonic()
        self.jobs: list[str] = []

    def submit(self, name: str, *options: object, **environment: object) -> str:
        """Number of a job on two nodes."""
        command = [sys.executable, ROOT / "launch/submit.py", self.config, "--nodes", 2, "--gpus-per-node", 0]
        fixed = ["--tasks-per-node", 1, "--partition", "low", "--python", self.python]
        steps = [f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", f"name={name}"]
        asked = {"FAULTY_HOOKS": str(self.folder / "hooks"), "OMP_NUM_THREADS": "1"}
        asked |= {f"FAULTY_{key.upper()}": str(value) for key, value in environment.items()}
        said = call(*command, *fixed, *steps, *options, env=os.environ | asked, cwd=self.folder)
        number = said.split()[2].rstrip(":")
        self.jobs.append(number)
        return number

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        return dict(word.split("=", 1) for word in call("scontrol", "show", "job", job).split() if "=" in word)

    def wait(self, what: Callable[[], Any], limit_s: float = 400) -> Any:
        deadline = time.monotonic() + patience(limit_s)
        while time.monotonic() < deadline:
            found = what()
            if found:
                return found
            time.sleep(0.3)
        raise AssertionError(f"nothing within {limit_s} s\n{self.logs()}")

    def wait_step(self, step: int) -> None:
        self.wait(lambda: (self.folder / f"hooks/step-{step}").exists())

    def end(self, job: str) -> str:
        """The state in which the job ends."""
        return str(self.wait(lambda: next((s for s in ENDED if self.facts(job)["JobState"] == s), None)))

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def attempts(self, name: str) -> list[dict[str, Any]]:
        path = self.run(name) / "jobs/1/attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def logs(self) -> str:
        files = sorted((self.folder / "runs").glob("*/jobs/*/**/*.log"))
        return "\n".join(f"== {path}\n{path.read_text()[-1500:]}" for path in files)

    def digest(self, name: str) -> tuple[int, dict[str, str]]:
        """Step and SHA-256 of the files of the newest checkpoint: on one layout, equal states are equal bytes."""
        path = newest(self.run(name) / "checkpoints")
        assert path is not None, self.logs()
        manifest = read_manifest(path)
        assert manifest is not None
        return manifest["step"], {file: about["sha256"] for file, about in manifest["files"].items()}


@pytest.fixture
def cluster(lab: Path, shapes: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    made = Cluster(lab, tmp_path, shapes / "train.csv")
    yield made
    for job in made.jobs:
        subprocess.run(["scancel", job], check=False, timeout=60)
    print(f"\n| {request.node.name.removeprefix('test_')} | {time.monotonic() - made.begun:.0f} s |")


@pytest.fixture(scope="module")
def wanted(lab: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, str]]:
    """Digest of the run that nothing interrupts."""
    cluster = Cluster(lab, tmp_path_factory.mktemp("whole"), shapes / "train.csv")
    job = cluster.submit("whole")
    assert cluster.end(job) == "COMPLETED", cluster.logs()
    assert (cluster.run("whole") / "DONE").exists() and not (cluster.run("whole") / "owner.json").exists()
    print(f"\n| uninterrupted | {time.monotonic() - cluster.begun:.0f} s |")
    return cluster.digest("whole")


def test_a_finished_run_is_left_alone(cluster: Cluster) -> None:
    job = cluster.submit("run", "train.steps=4")
    assert cluster.end(job) == "COMPLETED", cluster.logs()
    before = cluster.digest("run")
    again = cluster.submit("run", "train.steps=4")
    assert cluster.end(again) == "COMPLETED"
    assert "is finished" in cluster.logs() and cluster.digest("run") == before


def test_the_script_by_hand(cluster: Cluster) -> None:
    settings = {"RUN": str(cluster.run("run")), "PYTHON": sys.executable, "HOST_PYTHON": sys.executable}
    size = ["--nodes=2", "--ntasks-per-node=1", "--partition=low", f"--output={cluster.folder}/job.log"]
    command = ["sbatch", "--parsable", *size, ROOT / "launch/slurm.sbatch", cluster.config, "train.steps=4"]
    job = call(*command, env=os.environ | settings, cwd=ROOT)
    cluster.jobs.append(job)
    assert cluster.end(job) == "COMPLETED", (cluster.folder / "job.log").read_text()
    assert cluster.digest("run")[0] == 4 and (cluster.run("run") / f"jobs/slurm-{job}/logs/{job}-0-1.log").exists()


def test_time_limit(cluster: Cluster, wanted: Any) -> None:
    """Asked to stop a minute before a limit of two; nothing is lost between attempts."""
    job = cluster.submit("run", "--time", 2, "--signal", 60, sleep_s=3)
    assert cluster.end(job) == "COMPLETED", cluster.logs()
    assert cluster.digest("run") == wanted
    attempts = cluster.attempts("run")
    assert len(attempts) > 1 and [one["code"] for one in attempts[:-1]] == [75] * (len(attempts) - 1)
    assert [one["step"] for one in attempts[:-1]] == [one["begun"] for one in attempts[1:]]


def test_pre_emption(cluster: Cluster, wanted: Any) -> None:
    job = cluster.submit("run", sleep_s=1)
    cluster.wait_step(5)
    asked = time.monotonic()
    call("sbatch", "-N4", "--exclusive", "-p", "high", "-o", "/dev/null", "--wrap", "sleep 5")
    cluster.wait(lambda: cluster.facts(job)["JobState"] != "RUNNING")
    print(f"\nstopped {time.monotonic() - asked:.1f} s after the other job came")
    assert cluster.end(job) == "COMPLETED", cluster.logs()
    assert cluster.digest("run") == wanted
    first = cluster.attempts("run")[0]
    assert (first["code"] == 75 and first["preempted"] and first["step"] % EVERY) or first["step"] > 4, first


def test_node_crash(cluster: Cluster, wanted: Any, lab: Path) -> None:
    """The daemon, the step and the rank of a node are gone at once."""
    job = cluster.submit("run", sleep_s=1)
    cluster.wait_step(6)
    crashed = time.monotonic()
    node = expand(cluster.facts(job)["NodeList"])[1]
    kill_node(lab, node, job)
    try:
        cluster.wait(lambda: int(cluster.facts(job)["Restarts"]) > 0)
        cluster.wait(lambda: cluster.facts(job)["JobState"] == "RUNNING")
        (cluster.folder / "hooks/step-7").unlink(missing_ok=True)
        cluster.wait_step(7)
        print(f"\nat work again after {time.monotonic() - crashed:.0f} s on {cluster.facts(job)['NodeList']}")
        assert cluster.end(job) == "COMPLETED", cluster.logs()
    finally:
        call("slurmd", "-f", os.environ["SLURM_CONF"], "-N", node)
        cluster.wait(lambda: call("sinfo", "-h", "-n", node, "-p", "low", "-o", "%T") == "idle", 60)
    assert cluster.digest("run") == wanted


def test_scancel_is_final_and_a_new_job_goes_on(cluster: Cluster, wanted: Any) -> None:
    job = cluster.submit("run", sleep_s=1)
    cluster.wait_step(5)
    call("scancel", job)
    assert cluster.end(job) == "CANCELLED"
    time.sleep(12)  # longer than the cluster keeps a job back that is queued again
    assert cluster.facts(job)["JobState"] == "CANCELLED" and cluster.facts(job)["Restarts"] == "0"
    assert not (cluster.run("run") / "DONE").exists()
    assert cluster.end(cluster.submit("run")) == "COMPLETED", cluster.logs()
    assert cluster.digest("run") == wanted


def test_a_mistake_that_repeats_itself_gives_up(cluster: Cluster) -> None:
    job = cluster.submit("run", crash_at=6)
    assert cluster.end(job) == "FAILED", cluster.logs()
    attempts = cluster.attempts("run")
    assert [(one["begun"], one["step"]) for one in attempts] == [(0, 4), (4, 4), (4, 4), (4, 4)]
    assert [one["requeue"] for one in attempts] == [True, True, True, False]
    assert "without progress" in attempts[-1]["reason"]


def test_a_configuration_that_is_refused_runs_once(cluster: Cluster) -> None:
    job = cluster.submit("run", "--no-check", "train.init_from=nowhere")
    assert cluster.end(job) == "FAILED"
    assert [one["code"] for one in cluster.attempts("run")] == [2]
    assert "train.init_from=nowhere: no such file" in cluster.logs()


def test_two_jobs_on_one_run(cluster: Cluster, wanted: Any) -> None:
    first = cluster.submit("run", sleep_s=1)
    cluster.wait_step(2)
    second = cluster.submit("run")
    assert cluster.end(second) == "FAILED"
    log = (cluster.run("run") / f"jobs/2/logs/{second}-0-0.log").read_text()
    assert log.startswith("error: ") and log.count("\n") == 1, log
    assert "in use by process " in log and f"SLURM job {first} attempt 0" in log
    assert cluster.end(first) == "COMPLETED", cluster.logs()
    assert cluster.digest("run") == wanted


def test_port_in_use(cluster: Cluster, wanted: Any) -> None:
    """Strangers, one silent and one that talks, on the first two ports of the job."""
    job = cluster.submit("run", "--sbatch=--hold")
    _, port = rendezvous_from_environment({"SLURM_JOB_ID": job})
    with (
        socket.create_server(("0.0.0.0", candidate_ports(port, {})[0])),
        socket.create_server(("0.0.0.0", candidate_ports(port, {})[1])),
    ):
        call("scontrol", "release", job)
        assert cluster.end(job) == "COMPLETED", cluster.logs()
    assert cluster.facts(job)["Restarts"] == "0"
    assert cluster.digest("run") == wanted


def test_array(cluster: Cluster, wanted: Any) -> None:
    """A run for every line, each in its own folder."""
    lines = cluster.folder / "lines"
    lines.write_text("# two runs\nseed=3\nseed=4 train.steps=4\n")
    job = cluster.submit("run", "--array", lines)
    cluster.wait(lambda: all((cluster.run(f"run-{i}") / "DONE").exists() for i in (0, 1)))
    cluster.wait(lambda: job not in call("squeue", "-h", "-o", "%A %F"))
    assert cluster.digest("run-0") == wanted
    assert cluster.digest("run-1")[0] == 4


def expand(nodes: str) -> list[str]:
    """``n[1-2]`` -> n1, n2."""
    return call("scontrol", "show", "hostnames", nodes).split()


def kill_node(lab: Path, node: str, job: str) -> None:
    """SIGKILL to a virtual node's daemon and to what it runs of this job."""
    victims = {int((lab / f"run/slurmd-{node}.pid").read_text())}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            if f"SLURMD_NODENAME={node}".encode() in environment and f"SLURM_JOB_ID={job}".encode() in environment:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                victims.add(int(entry.name))
                if (Path("/proc") / str(parent) / "comm").read_text().startswith("slurmstepd"):
                    victims.add(parent)
        except OSError:
            continue
    for pid in sorted(victims):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
