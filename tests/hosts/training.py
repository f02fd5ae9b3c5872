"""A tiny training run on the hosts of a lab, started in each of the ways that people start one."""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from acceleration.checkpoint import contents, newest
from tests.conftest import ROOT
from tests.hosts.lab import Host, HostProcess, Lab

PORT = 29400
STEPS = 4
LIMIT_S = 240.0  # for a run on a machine that does other things too
# SGD: Adam would make steps of the roundings of gradients that are zero at the start.
# Six micro-batches in a step: any number of processes trains the same, and up to six have something to do.
OVERRIDES = ("data.micro_batches=6", "optim.kind=sgd", "optim.lr=0.1", "optim.warmup_steps=0")
TRAIN = (ROOT / "tests/faults/faulty.py", ROOT / "scripts/diffusion/train.py")
# What a launcher sets, which must not come from where the tests run.
_LAUNCHER = re.compile("RANK|WORLD_SIZE|LOCAL_.*|MASTER_.*|GROUP_.*|ROLE_.*|TORCHELASTIC_.*|SLURM_.*|GLOO_.*|NCCL_.*")
Processes = list[HostProcess]
Start = Callable[..., Processes]


def environment(**more: str) -> dict[str, str]:
    """That of a login on a host, with what the tests need."""
    own = {name: value for name, value in os.environ.items() if not _LAUNCHER.fullmatch(name)}
    return own | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)} | more


def arguments(config: Path, *overrides: str) -> list[str]:
    """Of the training command: what every number of processes trains the same with."""
    return [str(config), *OVERRIDES, *overrides]


def by_torchrun(
    hosts: Sequence[Host],
    per_host: int,
    command: Sequence[object],
    *,
    where: str = "",
    port: int = PORT,
    options: Sequence[object] = (),
    env: Mapping[str, str] | None = None,
    only: int | None = None,
) -> Processes:
    """``launch/torchrun.sh`` on every host, or ``only`` on one of them while the others are awaited.

    Args:
        where: the host of the rendezvous, by default the address of the first.
    """
    meeting = f"{bracketed(where or hosts[0].address)}:{port}"
    together = ["--nodes", len(hosts), "--rendezvous", meeting] if len(hosts) > 1 else []
    shared = ["bash", ROOT / "launch/torchrun.sh", *together, *options, per_host]
    return [host.popen([*shared, *command], env=environment(**(env or {}))) for _, host in _chosen(hosts, only)]


def by_variables(
    hosts: Sequence[Host],
    per_host: int,
    command: Sequence[object],
    *,
    where: str = "",
    port: int = PORT,
    env: Mapping[str, str] | None = None,
    only: int | None = None,
) -> Processes:
    """RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT by hand, a command for each process."""
    shared = {"WORLD_SIZE": len(hosts) * per_host, "MASTER_ADDR": where or hosts[0].address, "MASTER_PORT": port}
    return _each(hosts, per_host, command, env, only, shared, "RANK", "LOCAL_RANK")


def by_srun(
    hosts: Sequence[Host],
    per_host: int,
    command: Sequence[object],
    *,
    where: str = "",
    port: int = 0,
    env: Mapping[str, str] | None = None,
    only: int | None = None,
) -> Processes:
    """The variables of a step of SLURM; ``where`` (MASTER_ADDR) and ``port`` where its names lead nowhere."""
    shared: dict[str, object] = {"SLURM_STEP_NUM_TASKS": len(hosts) * per_host, "SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0}
    shared |= {"SLURM_STEP_NODELIST": ",".join(host.name for host in hosts), "SLURM_NNODES": len(hosts)}
    shared |= {"MASTER_ADDR": where} if where else {}
    shared |= {"MASTER_PORT": port} if port else {}
    return _each(hosts, per_host, command, env, only, shared, "SLURM_PROCID", "SLURM_LOCALID")


STARTS: dict[str, Start] = {"torchrun.sh": by_torchrun, "variables": by_variables, "srun": by_srun}


def _each(
    hosts: Sequence[Host],
    per_host: int,
    command: Sequence[object],
    env: Mapping[str, str] | None,
    only: int | None,
    shared: Mapping[str, object],
    rank: str,
    local_rank: str,
) -> Processes:
    started = []
    for i, host in _chosen(hosts, only):
        for j in range(per_host):
            own = {**shared, rank: i * per_host + j, local_rank: j}
            variables = {name: str(value) for name, value in own.items()} | dict(env or {})
            started.append(host.popen([sys.executable, *command], env=environment(**variables)))
    return started


def _chosen(hosts: Sequence[Host], only: int | None) -> list[tuple[int, Host]]:
    """(number, host) of those on which something is started."""
    return [(i, host) for i, host in enumerate(hosts) if only in (None, i)]


def bracketed(address: str) -> str:
    """As an address is written before a port."""
    return f"[{address}]" if ":" in address else address


def finish(processes: Processes, limit_s: float = LIMIT_S) -> list[int]:
    """Exit codes, in order."""
    return [process.finish(limit_s) for process in processes]


def all_said(processes: Processes) -> str:
    """What they said, for a failure."""
    return "\n".join(f"== {i}: {process.returncode}\n{process.said[-3000:]}" for i, process in enumerate(processes))


def train(
    lab: Lab, start: Start, per_host: int, config: Path, *overrides: str, hosts: int = 0, **more: Any
) -> Processes:
    """Trains to the end on the first ``hosts`` hosts (0: all) and finds exit code 0 everywhere."""
    used = lab.hosts[: hosts or len(lab.hosts)]
    command = [*TRAIN, *arguments(config, *overrides)]
    processes = start(used, per_host, command, **more)
    codes = finish(processes)
    assert set(codes) == {0}, all_said(processes)
    return processes


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of numbers of the newest checkpoint of a run."""
    path = newest(folder / "checkpoints")
    assert path is not None, f"no checkpoint in {folder}"
    found = contents(path)
    return {
        name: value for name, value in found.items() if isinstance(value, torch.Tensor) and value.is_floating_point()
    }


def difference(found: Path, truth: Path) -> float:
    """The largest relative difference of anything in the newest checkpoints of two runs."""
    one, other = weights(found), weights(truth)
    assert one.keys() == other.keys() and one
    return max(
        ((one[name] - other[name]).abs().max() / other[name].abs().max().clamp(min=1e-12)).item() for name in one
    )
