"""Processes: who am I, how many are we, on which device; starting and stopping the process group.

torchrun (RANK, WORLD_SIZE, LOCAL_RANK), SLURM steps (SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID) and a plain
``python`` call are the same to the rest of the code: a plain call is a group of one.
"""

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from acceleration.config import MeshConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed import network
from acceleration.distributed.agreement import Interrupted
from acceleration.distributed.meeting import agent_store, rendezvous
from acceleration.distributed.peers import Peer
from acceleration.distributed.placement import place
from acceleration.distributed.search import Place, StartError, Waiting
from acceleration.files.untrusted import parsing, short

T = TypeVar("T")
DOORS = 4  # ports that are tried one after the other
ASK_S = 0.1  # between two looks whether a process was asked to stop
GRACE_S = 10.0  # of a process that was asked to stop while it waited for the others
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


@dataclass(frozen=True)
class Runtime:
    """A started process group."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    peers: tuple[
        Peer, ...
    ] = ()  # all processes, by rank in the process group; empty in a group of one that was not started

    @property
    def is_main(self) -> bool:
        """True on the one process that writes what all share."""
        return self.rank == 0


def ranks_from_environment(env: Mapping[str, str] = os.environ) -> Ranks:
    """Read the launcher's variables: torchrun before SLURM (torchrun may run inside a SLURM job), else one process.

    An empty variable is one that is not set. One process needs no address: RANK=0 and WORLD_SIZE=1 are then a plain
    call.

    Raises:
        StartError: they contradict each other, or are no numbers; exit code 2.
    """
    if _text(env, "RANK") or _text(env, "WORLD_SIZE"):
        return _of_torchrun(env)
    # Only srun sets the step's task count: a batch script alone has SLURM_NTASKS, but is one process.
    if _text(env, "SLURM_PROCID") and _text(env, "SLURM_STEP_NUM_TASKS"):
        world_size = _whole(env, "SLURM_STEP_NUM_TASKS", 1, MAX_WORLD)
        rank = _whole(env, "SLURM_PROCID", 0, world_size - 1, "tasks of the step")
        return Ranks(rank, world_size, _whole(env, "SLURM_LOCALID", 0, MAX_WORLD, default=0), "slurm")
    return Ranks(0, 1, 0, "none")


def _of_torchrun(env: Mapping[str, str]) -> Ranks:
    """RANK and WORLD_SIZE, either of which may be missing for one process only."""
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        alone = "0" if name == "RANK" else "1"
        if _text(env, name) not in ("", alone) and not _text(env, other):
            raise _refused(f"{name}={short(_text(env, name))} without {other}: {_START}")
    world_size = _whole(env, "WORLD_SIZE", 1, MAX_WORLD, default=1)
    rank = _whole(env, "RANK", 0, world_size - 1, f"WORLD_SIZE={world_size}", default=0)
    here = _whole(env, "LOCAL_WORLD_SIZE", 1, world_size, f"WORLD_SIZE={world_size}", default=world_size)
    local_rank = _whole(env, "LOCAL_RANK", 0, here - 1, f"{here} processes of this machine", default=0)
    has_address = _text(env, "MASTER_ADDR") and _text(env, "MASTER_PORT")
    launcher = "torchrun" if world_size > 1 or has_address else "none"
    return Ranks(rank, world_size, local_rank, launcher)


def check_meeting(ranks: Ranks, env: Mapping[str, str] = os.environ) -> None:
    """That the environment says where the processes meet; looks at its text only.

    Raises:
        StartError: it does not; exit code 2.
    """
    if ranks.launcher == "torchrun":
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not _text(env, name):
                raise _refused(f"{name}: missing with WORLD_SIZE={ranks.world_size}; {_START}")
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
    name = next((name for name in _NODE_LISTS if _text(env, name)), "")
    address = _text(env, "MASTER_ADDR") or (first_host(env[name], name) if name else "127.0.0.1")
    job, restart = _whole(env, "SLURM_JOB_ID", 0, 2**40, default=0), restart_count(env)
    return address, _whole(env, "MASTER_PORT", 1, MAX_PORT, default=15000 + (job * 7 + restart) % 15000)


def places_from_environment(ranks: Ranks, env: Mapping[str, str] = os.environ) -> list[Place]:
    """Where the others may find rank 0, best first.

    MASTER_ADDR, and this machine itself where torchrun says that rank 0 is on it: torchrun gives a name that this
    machine need not know. Else the first host of a SLURM step, and since its name may lead nowhere, or to whoever asks,
    the addresses that SLURM tells of the machine where the step was started: rank 0 is often there.
    """
    if _text(env, "MASTER_ADDR"):
        chosen = Place(_text(env, "MASTER_ADDR"), "MASTER_ADDR", expected=ranks.launcher == "torchrun")
        with_rank_0 = _text(env, "GROUP_RANK") == "0" or _text(env, "LOCAL_WORLD_SIZE") == str(ranks.world_size)
        here = with_rank_0 and ranks.launcher == "torchrun"
        return [chosen, *([Place("127.0.0.1", "GROUP_RANK")] if here else [])]
    name = next((name for name in _NODE_LISTS if _text(env, name)), "")
    first = [Place(first_host(env[name], name), name)] if name else [Place("127.0.0.1", "MASTER_ADDR")]
    return first + [Place(_text(env, other), other) for other in _LAUNCHED_AT if _text(env, other)]


def hosts_of_ranks(world_size: int, env: Mapping[str, str] = os.environ) -> dict[int, str]:
    """Host of every rank of a SLURM step that fills host after host; empty where SLURM does not say so."""
    name = next((name for name in _NODE_LISTS if _text(env, name)), "")
    counts = _text(env, "SLURM_STEP_TASKS_PER_NODE")
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
        raise _refused(f"{name}={short(repr(nodelist))}: begins with no host; set MASTER_ADDR")
    return host


def _text(env: Mapping[str, str], name: str) -> str:
    return env.get(name, "").strip()


def _whole(
    env: Mapping[str, str], name: str, least: int, most: int, why: str = "", *, default: int | None = None
) -> int:
    """The integer in a variable; ``why``: what bounds it, for the message."""
    text = _text(env, name)
    if not text and default is not None:
        return default
    if re.fullmatch(r"[0-9]{1,15}", text) and least <= int(text) <= most:
        return int(text)
    bound = f" with {why}" if why else ""
    raise _refused(f"{name}={short(text)}: must be an integer from {least} to {most}{bound}; {_START}")


def _refused(message: str) -> StartError:
    return StartError(message, exit_code=2)


def candidate_ports(port: int, env: Mapping[str, str] = os.environ) -> list[int]:
    """Ports to try in turn, the same on every rank; only ``port`` where a person chose it."""
    return [port] if _text(env, "MASTER_PORT") else [15000 + (port + 3989 * i) % 15000 for i in range(DOORS)]


def attempt_token(launcher: str, env: Mapping[str, str] = os.environ) -> str:
    """What tells this start from others, as far as its launcher says: the same on every rank of it, without spaces.

    Of a SLURM step its number and attempt. Otherwise the identity that torchrun was given, which may be none at all:
    what may differ between hosts (users, counts of restarts) is left out, and each start has a MASTER_PORT of its own.
    """
    if launcher != "slurm":
        return f"run-{'_'.join(_text(env, 'TORCHELASTIC_RUN_ID').split())[:100]}"
    return "-".join(env.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))


def start(
    timeout_s: int, asked: Callable[[], bool] = lambda: False, mesh: MeshConfig | None = None, interface: str = ""
) -> Runtime:
    """Join the process group (nccl with a GPU per process, else gloo) and choose the device.

    Args:
        asked: whether this process was asked to stop; looked at while it waits for the others.
        mesh: for which ranks are laid out, so that what exchanges most stays within a host; None: the launcher's order.
        interface: network interface of groups on the CPU; empty: found from the routing table.

    Raises:
        StartError: a peer did not come within ``timeout_s`` seconds, the port is in use, two processes have one GPU, no
            network interface can be used, or a variable of the environment is not what it should be; one line says
            which.
        Interrupted: it was asked to stop before all were there.
    """
    ranks = ranks_from_environment()
    check_visible_devices()
    check_meeting(ranks)
    if torch.cuda.is_available():
        device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    chosen = network.chosen_interface(interface)
    if chosen.problem and ranks.world_size == 1:
        raise _refused(chosen.problem)
    meeting = Meeting(timeout_s, asked, None if ranks.local_rank else say)
    store, peers = unless_asked(asked, meeting.hold, ranks, device_identity(device), chosen)
    order = group_order(peers, mesh)
    rank = order.index(ranks.rank)
    network.use(peers[ranks.rank], chosen)
    if ranks.rank == 0 and (line := network.describe(peers)):
        say(line)
    connecting = Connecting(store, backend, peers, ranks.rank)
    with connecting.announced(Waiting(meeting.say, asked)), parsing(connecting.failure):
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=ranks.world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,  # nccl must not guess it from the rank
        )
    return Runtime(rank, ranks.world_size, ranks.local_rank, device, tuple(peers[other] for other in order))


def say(text: str) -> None:
    """One line to stderr; a terminal or a pipe that is gone is no reason to stop."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def group_order(peers: Sequence[Peer], mesh: MeshConfig | None) -> list[int]:
    """The launcher's rank of every rank of the process group; the launcher's rank 0 stays rank 0.

    Raises:
        ValueError: the mesh is not of so many processes.
    """
    if mesh is None:
        return list(range(len(peers)))
    ranks = place([peer.host_id for peer in peers], meshes.resolve(mesh, len(peers)))
    return sorted(range(len(peers)), key=ranks.__getitem__)


class Connecting:
    """While the library of a backend connects the processes, which says little about whom it waits for."""

    def __init__(self, store: dist.Store, backend: str, peers: Sequence[Peer], rank: int) -> None:
        """``rank``: of this process, as the launcher numbers it."""
        self._store, self._backend, self._peers, self._me = store, backend, peers, peers[rank]
        with suppress(dist.DistError, RuntimeError):  # the same will come to light in a moment
            store.set(f"connecting/{rank}", "1")

    @contextmanager
    def announced(self, waiting: Waiting) -> Iterator[None]:
        """A line says what is waited for if it takes long."""
        done = threading.Event()

        def look() -> None:
            while not done.wait(ASK_S):
                waiting.look(lambda: f"{self._me.where(rank=True)} waits for {self._backend} to connect all processes")

        threading.Thread(target=look, name="connecting", daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def failure(self, reason: str) -> StartError:
        """What the library found wrong, who has not come so far, and the variable that chooses the interface."""
        name = f"{self._backend.upper()}_SOCKET_IFNAME"
        reason = re.sub(r"^\[enforce fail at [^\]]*\]\s*", "", reason)
        interface = f", interface {self._me.interface}" if self._me.interface else ""
        return StartError(
            f"{self._backend} cannot connect the processes, says {self._me.where(rank=True)}{interface} "
            f"({reason}){self._behind()}; {name} chooses the interface"
        )

    def _behind(self) -> str:
        try:
            behind = [peer for peer in self._peers if not self._store.check([f"connecting/{peer.rank}"])]
        except (dist.DistError, RuntimeError):
            return f"; {self._peers[0].where(rank=True)} has ended"
        return f"; not there: {', '.join(peer.where(rank=True) for peer in behind[:8])}" if behind else ""


def check_visible_devices(env: Mapping[str, str] = os.environ) -> None:
    """That CUDA_VISIBLE_DEVICES names devices, or none: CUDA reads anything else as no device, without a word.

    Raises:
        StartError: it does not; exit code 2.
    """
    text = _text(env, "CUDA_VISIBLE_DEVICES")
    named = r"(?:[0-9]{1,4}|(?:GPU|MIG)-[0-9A-Za-z/-]+)"
    if text in ("", "-1") or text.startswith("No") or re.fullmatch(rf"{named}(?: *, *{named})*,?", text):
        return
    allowed = "must be numbers or names of devices, as 0,1, or -1 for none"
    raise _refused(f"CUDA_VISIBLE_DEVICES={short(text)}: {allowed}")


def device_identity(device: torch.device) -> str:
    """What no other device has; empty for a CPU, which processes share."""
    if device.type != "cuda":
        return ""
    properties = torch.cuda.get_device_properties(device)
    return f"{socket.gethostname()} GPU {getattr(properties, 'uuid', device.index)}"


def unless_asked(asked: Callable[[], bool], wait: Callable[..., T], *args: Any) -> T:
    """``wait(*args)``, which may take any time inside a library; a thread of its own waits, so that signals are heard.

    Processes that are on their way have ``GRACE_S`` to come, so that all agree to stop instead of waiting for this one.

    Raises:
        Interrupted: ``asked()`` became true first; the thread is left behind, and ends with the process.
    """
    result: Future[T] = Future()
    leave_at: float | None = None

    def run() -> None:
        try:
            result.set_result(wait(*args))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="meeting", daemon=True).start()
    while True:
        try:
            return result.result(ASK_S)
        except FutureTimeout:
            if result.done():  # just now, or this is what the wait itself raised
                return result.result()
            if leave_at is None and asked():
                leave_at = time.monotonic() + GRACE_S
            if leave_at is not None and time.monotonic() >= leave_at:
                raise Interrupted from None


@dataclass(frozen=True)
class Meeting:
    """How processes meet: how long they wait for one another, and who says so."""

    timeout_s: int
    asked: Callable[[], bool]  # whether this process was asked to stop, which ends its speaking
    say: (
        Callable[[str], None] | None
    )  # one line, after five seconds and later; None: another process of the host speaks

    def hold(self, ranks: Ranks, device: str, chosen: network.Chosen) -> tuple[dist.Store, list[Peer]]:
        """A store that all share, and all processes by rank; returns when every rank is there, and can be reached.

        Raises:
            StartError: as ``start``.
        """
        me, waiting = Peer.here(ranks.rank, ranks.world_size, device), Waiting(self.say, self.asked)
        me = replace(me, problem=chosen.problem)
        if ranks.world_size == 1:
            store: dist.Store = dist.HashStore()
            peers = [me]
        else:
            check_meeting(ranks)
            store, peers = self._common_store(ranks, me, waiting)
        return store, network.settle(store, ranks.rank, peers, chosen, self.timeout_s, waiting)

    def _common_store(self, ranks: Ranks, me: Peer, waiting: Waiting) -> tuple[dist.Store, list[Peer]]:
        """Hosted by the launcher if it does so, else by rank 0."""
        places, (_, port) = places_from_environment(ranks), rendezvous_from_environment()
        if ranks.launcher == "torchrun" and _text(os.environ, "TORCHELASTIC_USE_AGENT_STORE") == "True":
            return agent_store(me, places, port, self.timeout_s, waiting)
        hosts = hosts_of_ranks(ranks.world_size) if ranks.launcher == "slurm" else {}
        token, ports = attempt_token(ranks.launcher), candidate_ports(port)
        return rendezvous(me, places, ports, token, self.timeout_s, waiting, hosts)


def stop() -> None:
    """Leave together: a process that exits without this aborts now and then, and the launcher reports a failure."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
