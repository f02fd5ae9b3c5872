"""What the variables of a launcher say: who this process is, how many there are, and where rank 0 may be found.

torchrun (RANK, WORLD_SIZE, LOCAL_RANK), SLURM steps (SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID) and a plain
``python`` call are the same to the rest of the code: a plain call is a group of one.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from acceleration.distributed.search import Place, StartError
from acceleration.files.untrusted import short

DOORS = 4  # ports that are tried one after the other
_NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")  # first to last
_LAUNCHED_AT = ("SLURM_LAUNCH_NODE_IPADDR", "SLURM_SRUN_COMM_HOST")
MAX_WORLD, MAX_PORT = 10**6, 65535
_START = "start with torchrun or srun, which set all of them, or unset it"


@dataclass(frozen=True)
class Ranks:
    """This process's place, known before any process group exists."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str  # torchrun | slurm | none


def ranks_from_environment(env: Mapping[str, str] = os.environ) -> Ranks:
    """Read the launcher's variables: torchrun before SLURM (torchrun may run inside a SLURM job), else one process.

    An empty variable is one that is not set. One process needs no address: RANK=0 and WORLD_SIZE=1 are then a plain
    call.

    Raises:
        StartError: they contradict each other, or are no numbers; exit code 2.
    """
    if text_of(env, "RANK") or text_of(env, "WORLD_SIZE"):
        return _of_torchrun(env)
    # Only srun sets the step's task count: a batch script alone has SLURM_NTASKS, but is one process.
    if text_of(env, "SLURM_PROCID") and text_of(env, "SLURM_STEP_NUM_TASKS"):
        world_size = _whole(env, "SLURM_STEP_NUM_TASKS", 1, MAX_WORLD)
        rank = _whole(env, "SLURM_PROCID", 0, world_size - 1, "tasks of the step")
        return Ranks(rank, world_size, _whole(env, "SLURM_LOCALID", 0, MAX_WORLD, default=0), "slurm")
    return Ranks(0, 1, 0, "none")


def _of_torchrun(env: Mapping[str, str]) -> Ranks:
    """RANK and WORLD_SIZE, either of which may be missing for one process only."""
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        alone = "0" if name == "RANK" else "1"
        if text_of(env, name) not in ("", alone) and not text_of(env, other):
            raise refused(f"{name}={short(text_of(env, name))} without {other}: {_START}")
    world_size = _whole(env, "WORLD_SIZE", 1, MAX_WORLD, default=1)
    rank = _whole(env, "RANK", 0, world_size - 1, f"WORLD_SIZE={world_size}", default=0)
    here = _whole(env, "LOCAL_WORLD_SIZE", 1, world_size, f"WORLD_SIZE={world_size}", default=world_size)
    local_rank = _whole(env, "LOCAL_RANK", 0, here - 1, f"{here} processes of this machine", default=0)
    has_address = text_of(env, "MASTER_ADDR") and text_of(env, "MASTER_PORT")
    launcher = "torchrun" if world_size > 1 or has_address else "none"
    return Ranks(rank, world_size, local_rank, launcher)


def check_meeting(ranks: Ranks, env: Mapping[str, str] = os.environ) -> None:
    """That the environment says where the processes meet; looks at its text only.

    Raises:
        StartError: it does not; exit code 2.
    """
    if ranks.launcher == "torchrun":
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not text_of(env, name):
                raise refused(f"{name}: missing with WORLD_SIZE={ranks.world_size}; {_START}")
        _whole(env, "MASTER_PORT", 1, MAX_PORT)
    if ranks.launcher == "slurm":
        rendezvous_from_environment(env)


def rendezvous_from_environment(env: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """(address, port) where rank 0 of a SLURM step, or of a plain call, is found.

    The first host of the step, and a port from job id and restart count below the ephemeral range, so that two jobs or
    two attempts on one host do not meet; MASTER_ADDR and MASTER_PORT win.

    Raises:
        StartError: a variable is not what it should be; exit code 2.
    """
    name = next((name for name in _NODE_LISTS if text_of(env, name)), "")
    address = text_of(env, "MASTER_ADDR") or (first_host(env[name], name) if name else "127.0.0.1")
    job, restart = _whole(env, "SLURM_JOB_ID", 0, 2**40, default=0), restart_count(env)
    return address, _whole(env, "MASTER_PORT", 1, MAX_PORT, default=15000 + (job * 7 + restart) % 15000)


def places_from_environment(ranks: Ranks, env: Mapping[str, str] = os.environ) -> list[Place]:
    """Where the others may find rank 0, best first.

    MASTER_ADDR, and this machine itself where torchrun says that rank 0 is on it: torchrun gives a name that this
    machine need not know. Else the first host of a SLURM step, and since its name may lead nowhere, or to whoever asks,
    the addresses that SLURM tells of the machine where the step was started: rank 0 is often there.
    """
    if text_of(env, "MASTER_ADDR"):
        chosen = Place(text_of(env, "MASTER_ADDR"), "MASTER_ADDR", expected=ranks.launcher == "torchrun")
        with_rank_0 = text_of(env, "GROUP_RANK") == "0" or text_of(env, "LOCAL_WORLD_SIZE") == str(ranks.world_size)
        here = with_rank_0 and ranks.launcher == "torchrun"
        return [chosen, *([Place("127.0.0.1", "GROUP_RANK")] if here else [])]
    name = next((name for name in _NODE_LISTS if text_of(env, name)), "")
    first = [Place(first_host(env[name], name), name)] if name else [Place("127.0.0.1", "MASTER_ADDR")]
    return first + [Place(text_of(env, other), other) for other in _LAUNCHED_AT if text_of(env, other)]


def hosts_of_ranks(world_size: int, env: Mapping[str, str] = os.environ) -> dict[int, str]:
    """Host of every rank of a SLURM step that fills host after host; empty where SLURM does not say so."""
    name = next((name for name in _NODE_LISTS if text_of(env, name)), "")
    counts = text_of(env, "SLURM_STEP_TASKS_PER_NODE")
    if not name or not re.fullmatch(r"[0-9]{1,6}(\(x[0-9]{1,6}\))?(,[0-9]{1,6}(\(x[0-9]{1,6}\))?)*", counts):
        return {}
    tasks: list[int] = []
    for part in counts.split(","):  # as 2(x3),1
        number, _, times = part.rstrip(")").partition("(x")
        tasks += [int(number)] * min(int(times or 1), MAX_WORLD)
    hosts = all_hosts(env[name])
    ranks = [host for host, count in zip(hosts, tasks, strict=False) for _ in range(min(count, world_size))]
    complete = len(hosts) == len(tasks) and len(ranks) == world_size
    return dict(enumerate(ranks)) if complete else {}


def all_hosts(nodelist: str) -> list[str]:
    """All hosts of a SLURM node list: ``n[3-5,9],m1`` -> ``n3 n4 n5 n9 m1``; empty if it is none."""
    found: list[str] = []
    for part in re.findall(r"(?:[^,\[\]\s]|\[[^\[\]]*\])+", nodelist):
        hosts = [""]
        for text, numbers in re.findall(r"([^\[\]]+)|\[([0-9,-]+)\]", part):
            ends = [text] if text else [one for span in numbers.split(",") for one in _span(span)]
            hosts = [host + end for host in hosts for end in ends][:MAX_WORLD]
        found += hosts
    return found


def _span(text: str) -> list[str]:
    """``08-10`` -> ``08 09 10``."""
    first, _, last = text.partition("-")
    if not first.isdigit() or not (last or first).isdigit():
        return []
    stop = min(int(last or first), int(first) + MAX_WORLD)
    return [str(number).zfill(len(first)) for number in range(int(first), stop + 1)]


def restart_count(env: Mapping[str, str] = os.environ) -> int:
    """How often SLURM has started this job again.

    Raises:
        StartError: the variable is no number; exit code 2.
    """
    return _whole(env, "SLURM_RESTART_COUNT", 0, 2**31, default=0)


def first_host(nodelist: str, name: str = "SLURM_STEP_NODELIST") -> str:
    """First host of a SLURM node list: ``n[3-5,9],m1`` -> ``n3``; ``name``: of the variable that holds it.

    Raises:
        StartError: it begins with no host; exit code 2.
    """
    match = re.match(r"([^,\[\]\s]*)(?:\[([0-9]+)[^\[\]]*\])?([^,\[\]\s]*)", nodelist.strip())
    host = "".join(part or "" for part in match.groups()) if match else ""
    if not host:
        raise refused(f"{name}={short(repr(nodelist))}: begins with no host; set MASTER_ADDR")
    return host


def text_of(env: Mapping[str, str], name: str) -> str:
    return env.get(name, "").strip()


def _whole(
    env: Mapping[str, str], name: str, least: int, most: int, why: str = "", *, default: int | None = None
) -> int:
    """The integer in a variable; ``why``: what bounds it, for the message."""
    text = text_of(env, name)
    if not text and default is not None:
        return default
    if re.fullmatch(r"[0-9]{1,15}", text) and least <= int(text) <= most:
        return int(text)
    bound = f" with {why}" if why else ""
    raise refused(f"{name}={short(text)}: must be an integer from {least} to {most}{bound}; {_START}")


def refused(message: str) -> StartError:
    return StartError(message, exit_code=2)


def candidate_ports(port: int, env: Mapping[str, str] = os.environ) -> list[int]:
    """Ports to try in turn, the same on every rank; only ``port`` where a person chose it."""
    return [port] if text_of(env, "MASTER_PORT") else [15000 + (port + 3989 * i) % 15000 for i in range(DOORS)]


def attempt_token(launcher: str, env: Mapping[str, str] = os.environ) -> str:
    """What tells this start from others, as far as its launcher says: the same on every rank of it, without spaces.

    Of a SLURM step its number and attempt. Otherwise the identity that torchrun was given, which may be none at all:
    what may differ between hosts (users, counts of restarts) is left out, and each start has a MASTER_PORT of its own.
    """
    if launcher != "slurm":
        return f"run-{'_'.join(text_of(env, 'TORCHELASTIC_RUN_ID').split())[:100]}"
    return "-".join(env.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))


def check_visible_devices(env: Mapping[str, str] = os.environ) -> None:
    """That CUDA_VISIBLE_DEVICES names devices, or none: CUDA reads anything else as no device, without a word.

    Raises:
        StartError: it does not; exit code 2.
    """
    text = text_of(env, "CUDA_VISIBLE_DEVICES")
    named = r"(?:[0-9]{1,4}|(?:GPU|MIG)-[0-9A-Za-z/-]+)"
    if text in ("", "-1") or text.startswith("No") or re.fullmatch(rf"{named}(?: *, *{named})*,?", text):
        return
    allowed = "must be numbers or names of devices, as 0,1, or -1 for none"
    raise refused(f"CUDA_VISIBLE_DEVICES={short(text)}: {allowed}")
