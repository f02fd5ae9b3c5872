"""What every process says of itself when the processes meet, and what that tells of all of them together."""

import json
import platform
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import torch

from acceleration.distributed import addresses

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
    torch: str = ""
    python: str = ""
    protocol: int = PROTOCOL

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
            torch=torch.__version__,
            python=platform.python_version(),
        )

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
        try:
            return cls(**{field.name: read[field.name] for field in fields(cls) if field.name in read})
        except TypeError as error:
            raise ValueError(str(error)) from None


def ranks_by_host(peers: Sequence[Peer]) -> dict[str, list[int]]:
    """Positions in ``peers`` of the processes of each host, by host_id; hosts in the order of their first process."""
    found: dict[str, list[int]] = {}
    for position, peer in enumerate(peers):
        found.setdefault(peer.host_id, []).append(position)
    return found
