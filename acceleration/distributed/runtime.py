"""Starting and stopping the process group: meeting the other processes, ranks, device and network interface."""

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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
from acceleration.distributed.launcher_variables import (
    Ranks,
    attempt_token,
    candidate_ports,
    check_meeting,
    check_visible_devices,
    hosts_of_ranks,
    places_from_environment,
    ranks_from_environment,
    refused,
    rendezvous_from_environment,
    text_of,
)
from acceleration.distributed.meeting import agent_store, rendezvous
from acceleration.distributed.peers import Peer
from acceleration.distributed.placement import place
from acceleration.distributed.search import StartError, Waiting
from acceleration.files.untrusted import parsing

T = TypeVar("T")
ASK_S = 0.1  # between two looks whether a process was asked to stop
GRACE_S = 10.0  # of a process that was asked to stop while it waited for the others


@dataclass(frozen=True)
class Runtime:
    """A started process group."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    peers: tuple[Peer, ...] = ()  # all processes, by rank in the group; empty in a group of one that was not started

    @property
    def is_main(self) -> bool:
        """True on the one process that writes what all share."""
        return self.rank == 0


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
        raise refused(chosen.problem)
    meeting = Meeting(timeout_s, asked, None if ranks.local_rank else say)
    store, peers = unless_asked(asked, meeting.hold, ranks, device_identity(device), chosen)
    order = group_order(peers, mesh)
    rank = order.index(ranks.rank)
    network.use(peers[ranks.rank], chosen)
    if ranks.rank == 0 and (line := network.describe(peers, backend)):
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
        print(f"{text}\n", end="", file=sys.stderr, flush=True)  # one write: other ranks' lines stay whole


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
        if ranks.launcher == "torchrun" and text_of(os.environ, "TORCHELASTIC_USE_AGENT_STORE") == "True":
            return agent_store(me, places, port, self.timeout_s, waiting)
        hosts = hosts_of_ranks(ranks.world_size) if ranks.launcher == "slurm" else {}
        token, ports = attempt_token(ranks.launcher), candidate_ports(port)
        return rendezvous(me, places, ports, token, self.timeout_s, waiting, hosts)


def stop() -> None:
    """Leave together: a process that exits without this aborts now and then, and the launcher reports a failure."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
