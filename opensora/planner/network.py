"""Which processes share a host, and how fast bytes go within hosts and between them; for forecasts."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from acceleration.accounting import host_traffic
from acceleration.diagnostics.links import Links
from acceleration.distributed.mesh import AXES
from acceleration.distributed.placement import arrange, block_sizes
from opensora.planner.devices import Device
from opensora.utils.errors import UserError


@dataclass(frozen=True)
class Network:
    """Hosts and rates. A host's processes share its rate to others, in one direction; each has its own within it."""

    processes: tuple[int, ...]  # of every host
    within: float  # bytes/s of a process to others of its host
    between: float  # bytes/s of a host to other hosts
    latency_within: float = 0.0  # seconds that an exchange takes beside its bytes, among processes of a host
    latency_between: float = 0.0  # and of several
    is_measured: bool = False

    @classmethod
    def of_device(cls, device: Device, world: int) -> "Network":
        """By the makers' figures, on nodes that are full but for the last."""
        full, rest = divmod(world, device.per_node)
        processes = (device.per_node,) * full + (rest,) * (rest > 0)
        return cls(processes, device.node_bandwidth, device.net_bandwidth * device.per_node)

    @classmethod
    def of_links(cls, links: Links, device: Device, world: int) -> "Network":
        """As preflight measured, on the same hosts or on another number of hosts that are alike; what was not measured,
        as there was only one host or one process on each, is by the makers' figures.

        Raises:
            ValueError: ``world`` is no number of processes of such hosts.
        """
        counts = links.processes
        if sum(counts) != world:
            if len(set(counts)) > 1 or world % counts[0]:
                hosts = " + ".join(map(str, counts[:8])) + (" + ..." if len(counts) > 8 else "")
                raise ValueError(f"measured on hosts of {hosts} processes, which {world} are not")
            counts = (counts[0],) * (world // counts[0])
        within, between = links.within or device.node_bandwidth, links.between or device.net_bandwidth * max(counts)
        return cls(counts, within, between, links.latency_within, links.latency_between, is_measured=True)

    @property
    def most(self) -> int:
        """Processes of the largest host."""
        return max(self.processes)

    def seconds(
        self, degrees: Mapping[str, int], zero: int, sent: Mapping[str, float], exchanges: Mapping[str, int]
    ) -> dict[str, float]:
        """Axis -> time of so many exchanges, and bytes from every process along it, all at the same time.

        A process's bytes at the rate within its host, or what leaves a host at the host's rate: what takes longer. And
        for every exchange what it takes beside its bytes.
        """
        leaving = _leaving(self.processes, tuple(degrees[axis] for axis in AXES), zero)
        found = {}
        for axis, count in sent.items():
            crosses = leaving.get(axis, 0.0)
            latency = self.latency_between if crosses else self.latency_within
            found[axis] = max(count / self.within, count * crosses / self.between) + latency * exchanges.get(axis, 0)
        return found

    def leaving_host(self, degrees: Mapping[str, int], zero: int, sent: Mapping[str, float]) -> float:
        """Bytes that leave a host, the one of most, where every process sends so many along each axis."""
        leaving = _leaving(self.processes, tuple(degrees[axis] for axis in AXES), zero)
        return sum(count * leaving.get(axis, 0.0) for axis, count in sent.items())

    def __str__(self) -> str:
        source = "measured" if self.is_measured else "by data sheets"
        return (
            f"{len(self.processes)} hosts; {self.within / 1e9:.3g} GB/s from a process within its host, "
            f"{self.between / 1e9:.3g} GB/s from a host to others ({source})"
        )


def read_links(path: Path, device: Device, world: int) -> Network:
    """What preflight measured, for ``world`` processes.

    Raises:
        UserError: there is no such file, or it does not fit.
    """
    try:
        return Network.of_links(Links.read(path), device, world)
    except OSError as error:
        raise UserError(
            f"--links={path}: {error.strerror or error}; opensora.cli.preflight --links writes one"
        ) from None
    except ValueError as error:
        raise UserError(f"--links={path}: {error}") from None


@cache
def _leaving(processes: tuple[int, ...], sizes: tuple[int, ...], zero: int) -> dict[str, float]:
    degrees = dict(zip(AXES, sizes, strict=True))
    return host_traffic.shares_leaving(degrees, zero, arrange(processes, block_sizes(degrees)))
