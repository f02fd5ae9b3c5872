"""Jobs of a real Slurm whose nodes are hosts of a lab."""

import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.hosts.conftest import MakeLab
from tests.hosts.lab import Host, until
from tests.hosts.slurm import environment, missing, slurm
from tests.hosts.training import LIMIT_S, STEPS, arguments, difference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def submit(host: Host, conf: Path, config: Path, nodes: int, tasks: int) -> str:
    """The number of a job of ``launch/submit.py``."""
    fixed = ["--nodes", nodes, "--gpus-per-node", 0, "--tasks-per-node", tasks, "--python", sys.executable]
    command = [sys.executable, ROOT / "launch/submit.py", *arguments(config, f"train.steps={STEPS}")]
    done = host.run([*command, *fixed], env=environment(conf) | {"OMP_NUM_THREADS": "1"}, limit_s=LIMIT_S)
    return done.stdout.split()[2].rstrip(":")


def end(host: Host, conf: Path, job: str) -> str:
    """The state in which a job ends."""

    def state() -> str | None:
        said = host.run(["scontrol", "show", "job", job], env=environment(conf)).stdout
        return next((one for one in ENDED if f"JobState={one}" in said), None)

    return str(until(state, LIMIT_S, "the end of the job"))


def logs(run: Path) -> str:
    """Of all ranks."""
    return "\n".join(f"== {path}\n{path.read_text()[-2000:]}" for path in sorted(run.glob("jobs/**/*.log")))


@pytest.mark.parametrize(
    ("nodes", "tasks", "lab"),
    [
        (2, 2, {"names": "loopback"}),
        (3, 1, {"names": "loopback", "dead_interface": True}),
        (2, 1, {"names": "full", "family": "ipv6"}),
    ],
)
def test_a_job_on_nodes_that_are_hosts(
    nodes: int, tasks: int, lab: dict[str, object], make_lab: MakeLab, config: Path, truth: Path, tmp_path: Path
) -> None:
    if name := missing():
        pytest.skip(f"no {name}: Slurm is not installed")
    hosts = make_lab(hosts=nodes, **lab).hosts
    with slurm(hosts[0].lab, tmp_path) as conf:
        job = submit(hosts[0], conf, config, nodes, tasks)
        assert end(hosts[0], conf, job) == "COMPLETED", logs(tmp_path / "run")
    assert difference(tmp_path / "run", truth) <= 1e-10
