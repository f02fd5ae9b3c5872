"""Processes: who am I, how many are we, on which device; starting and stopping the process group.

torchrun (RANK, WORLD_SIZE, LOCAL_RANK), SLURM steps (SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID) and a plain
``python`` call are the same to the rest of the code: a plain call is a group of one.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from acceleration.rendezvous import StartError, check_in, meet

DOORS = 4  # ports that are tried one after the other


@dataclass(frozen=True)
class Ranks:
    """This process's place, known before any process group exists."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str  # torchrun | slurm | none


@dataclass(frozen=True)
class Runtime:
    """A started process group."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that writes what all share."""
        return self.rank == 0


def ranks_from_environment(env: Mapping[str, str] = os.environ) -> Ranks:
    """Read the launcher's variables: torchrun before SLURM (torchrun may run inside a SLURM job), else one process."""
    if "RANK" in env and "WORLD_SIZE" in env:
        return Ranks(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)), "torchrun")
    # Only srun sets the step's task count: a batch script alone has SLURM_NTASKS, but is one process.
    if "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
        return Ranks(
            int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_LOCALID", 0)), "slurm"
        )
    return Ranks(0, 1, 0, "none")


def rendezvous_from_environment(env: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """(address, port) where rank 0 of a SLURM step, or of a plain call, is found.

    The first host of the step, and a port from job id and restart count below the ephemeral range, so that two jobs or
    two attempts on one host do not meet; MASTER_ADDR and MASTER_PORT win.
    """
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    job, restart = int(env.get("SLURM_JOB_ID", 0)), int(env.get("SLURM_RESTART_COUNT", 0))
    return env.get("MASTER_ADDR") or first_host(hosts), int(
        env.get("MASTER_PORT") or 15000 + (job * 7 + restart) % 15000
    )


def first_host(nodelist: str) -> str:
    """First host of a SLURM node list: ``n[3-5,9],m1`` -> ``n3``."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?([^,\[]*)", nodelist)
    assert match, nodelist
    prefix, ranges, suffix = match.groups()
    return prefix + (re.split(r"[-,]", ranges)[0] if ranges else "") + suffix


def doors(port: int, env: Mapping[str, str] = os.environ) -> list[int]:
    """Ports to try in turn, the same on every rank; only ``port`` where a person chose it."""
    return [port] if "MASTER_PORT" in env else [15000 + (port + 3989 * i) % 15000 for i in range(DOORS)]


def attempt_token(env: Mapping[str, str] = os.environ) -> str:
    """What tells this attempt of this SLURM step from all others, the same on every rank of it."""
    return "-".join(env.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))


def start(timeout_s: int) -> Runtime:
    """Join the process group (nccl with a GPU per process, else gloo) and choose the device.

    Raises:
        StartError: a peer did not come within ``timeout_s`` seconds, the port is in use, or two processes have one GPU;
            one line says which.
    """
    ranks = ranks_from_environment()
    if torch.cuda.is_available():
        device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", common_store(ranks, timeout_s, device_identity(device))),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,  # nccl must not guess it from the rank
    )
    return Runtime(ranks.rank, ranks.world_size, ranks.local_rank, device)


def device_identity(device: torch.device) -> str:
    """What no other device has; empty for a CPU, which processes share."""
    if device.type != "cuda":
        return ""
    properties = torch.cuda.get_device_properties(device)
    return f"{socket.gethostname()} GPU {getattr(properties, 'uuid', device.index)}"


def common_store(ranks: Ranks, timeout_s: int, device: str = "") -> dist.Store:
    """The store of the launcher if it has one, else of rank 0; returns when every rank is there.

    Raises:
        StartError: as ``start``.
    """
    if ranks.launcher == "none":
        return dist.HashStore()
    if ranks.launcher == "slurm":
        address, port = rendezvous_from_environment()
        return meet(ranks.rank, ranks.world_size, address, doors(port), attempt_token(), timeout_s, device)
    limit = timedelta(seconds=timeout_s)
    try:
        store, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.world_size, timeout=limit))
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = "in use by another program" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise StartError(f"{where}: {reason}; set MASTER_ADDR and MASTER_PORT, or start again") from None
    check_in(store, ranks.rank, ranks.world_size, timeout_s, device)
    return store


def stop() -> None:
    """Leave together: a process that exits without this aborts now and then, and the launcher reports a failure."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
