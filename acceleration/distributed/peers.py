"""What every process says of itself when the processes meet, and what that tells of all of them together."""

import json
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from acceleration.distributed import addresses

MAX_NAMED = 8  # hosts or addresses in one line
PROTOCOL = 2  # of what is said at a rendezvous and written in the store; raised when either changes


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One process of a start, as it describes itself."""

    rank: int  # as the launcher numbers it; the rank in the process group may be another
    world_size: int  # as this process was told
    host_id: str  # equal in processes of one host, and on no other; host names may be equal
    host: str  # its name
    address: str = ""  # numeric, by which the other hosts reach this one; on one host, loopback
    interface: str = ""  # that has the address; empty where the system does not tell
    device: str = ""  # what no other device has; empty where processes may share it
    torch: str = ""  # its version
    python: str = ""  # as 3.12
    protocol: int = PROTOCOL
    problem: str = ""  # what this process found wrong with its own machine, which all are to hear

    @classmethod
    def here(cls, rank: int, world_size: int, device: str = "", address: str = "") -> "Peer":
        """This process."""
        return cls(
            rank=rank,
            world_size=world_size,
            host_id=addresses.host_id(),
            host=socket.gethostname(),
            address=address,
            interface=addresses.interface_of(address) if address else "",
            device=device,
            torch=_torch_version(),
            python=f"{sys.version_info.major}.{sys.version_info.minor}",
        )

    def where(self, rank: bool = False) -> str:
        """``host a (10.0.0.1)``, or ``rank 3 on a (10.0.0.1)``: host names alone may be equal."""
        address = f" ({self.address})" if self.address and not addresses.is_loopback(self.address) else ""
        return f"rank {self.rank} on {self.host}{address}" if rank else f"host {self.host}{address}"

    def to_text(self) -> str:
        """What ``from_text`` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> "Peer":
        """Fields that another version has and this one lacks are left out, so that versions can be compared.

        Raises:
            ValueError: this is no peer.
        """
        read = json.loads(text)
        if not isinstance(read, dict):
            raise ValueError("must be an object")
        known = {field.name: read[field.name] for field in fields(cls) if field.name in read}
        numbers = ("rank", "world_size", "protocol")
        if not all(type(value) is (int if name in numbers else str) for name, value in known.items()):
            raise ValueError("a value is of the wrong type")
        try:
            return cls(**known)
        except TypeError as error:
            raise ValueError(str(error)) from None


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def ranks_by_host(peers: Sequence[Peer]) -> dict[str, list[int]]:
    """Positions in ``peers`` of the processes of each host, by host_id; hosts in the order of their first process."""
    found: dict[str, list[int]] = {}
    for position, peer in enumerate(peers):
        found.setdefault(peer.host_id, []).append(position)
    return found


def misfits(peers: Sequence[Peer]) -> str:
    """Why these cannot be one start, in words; empty if nothing differs."""
    for name, value_of, remedy in _SAME:
        groups: dict[Any, list[Peer]] = {}
        for peer in peers:
            groups.setdefault(value_of(peer), []).append(peer)
        if len(groups) > 1:
            listed = "; ".join(f"{_who(them)}: {value}" for value, them in groups.items())
            return f"{name} is not the same on all processes ({listed}); {remedy}"
    return ""


# What has to be equal: its name, the value of a process, and what to do where it is not.
_SAME: tuple[tuple[str, Callable[[Peer], Any], str], ...] = (
    ("the protocol of the rendezvous", lambda peer: peer.protocol, "install the same code on all hosts"),
    ("the number of processes (WORLD_SIZE)", lambda peer: peer.world_size, "start all of them with the same"),
    ("the version of torch", lambda peer: peer.torch, "install the same on all hosts"),
    ("the version of Python", lambda peer: peer.python, "use the same on all hosts"),
    (
        "the kind of device",
        lambda peer: "GPU" if peer.device else "CPU",
        "some see no GPU; hide them on all (CUDA_VISIBLE_DEVICES=-1) or on none",
    ),
)


def _who(peers: Sequence[Peer]) -> str:
    hosts: dict[str, list[Peer]] = {}
    for peer in peers:
        hosts.setdefault(peer.host_id, []).append(peer)
    named = [f"rank {ranges(sorted({one.rank for one in them}))} on {them[0].host}" for them in hosts.values()]
    return f"{', '.join(named[:4])}{' and others' if len(named) > 4 else ''}"


def shared_devices(peers: Sequence[Peer]) -> str:
    """Which ranks have the same device, in words; empty if none do."""
    for device in dict.fromkeys(peer.device for peer in peers):
        ranks = sorted(peer.rank for peer in peers if peer.device == device)
        if device and len(ranks) > 1:
            return f"rank {ranges(ranks)} share one device ({device}): start one process per device"
    return ""


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers in short: ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def with_hosts(ranks: Sequence[int], host_of: Mapping[int, str]) -> str:
    """``rank 2-5 (n2: 2-3, n3: 4-5)``; without hosts where they are not known."""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(host_of.get(rank, ""), []).append(rank)
    if list(by_host) in ([], [""]):
        return f"rank {ranges(ranks)}"
    named = [f"{host or 'unknown host'}: {ranges(them)}" for host, them in by_host.items()]
    more = f", and {len(named) - MAX_NAMED} more hosts" if len(named) > MAX_NAMED else ""
    return f"rank {ranges(ranks)} ({', '.join(named[:MAX_NAMED])}{more})"
