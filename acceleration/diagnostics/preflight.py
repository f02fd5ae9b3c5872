"""A look at all processes and what connects them, after they met and before anything large is built.

What must be equal is compared (and whoever differs is named), every process says which device it has, and a small
buffer goes round to find the link that is much slower than the others. Takes a second or so.
"""

import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from acceleration.diagnostics import links
from acceleration.diagnostics.links import Links
from acceleration.distributed.peers import ranges
from acceleration.distributed.placement import host_names
from acceleration.distributed.runtime import Runtime

SLOW = 4.0  # a link or a device this many times slower than the median of its kind is named
MIN_LINKS = 3  # of a kind, below which there is no median to speak of
BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}  # of the buffer
ROUNDS = 3


class PreflightError(Exception):
    """These processes cannot be one run. One line that names the ranks."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one process says of itself."""

    rank: int
    host: str
    device: str  # name of the kind
    visible: int  # GPUs that the process sees
    same: Mapping[str, str]  # what must be the same everywhere, by name
    link_s: float = 0.0  # time to send the buffer to the next rank, all at the same time
    reduce_s: float = 0.0  # time to sum it over all


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found; the same on every process."""

    summary: str  # one line
    warnings: list[str] = field(default_factory=list)
    links: Links | None = None  # None where there is one process


def preflight(runtime: Runtime, same: Mapping[str, str]) -> Report:
    """Compare and measure. Collective.

    Args:
        same: what must be equal on all processes, such as a version of the code, by a name that a person understands.

    Raises:
        PreflightError: something differs; the same line on every process.
    """
    group = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None
    hosts = host_names(runtime.peers) if runtime.peers else [socket.gethostname()] * runtime.world_size
    facts = Facts(
        rank=runtime.rank,
        host=hosts[runtime.rank],
        device=device_name(runtime.device),
        visible=torch.cuda.device_count(),
        same={**same, "torch": torch.__version__},
    )
    problems = differences(_gather(facts, runtime, group))
    if problems:
        raise PreflightError("; ".join(problems))
    nbytes = BYTES[runtime.device.type]
    link_s, reduce_s = measure(runtime, nbytes)
    measured = Facts(**{**vars(facts), "link_s": link_s, "reduce_s": reduce_s})
    report = assess(_gather(measured, runtime, group), nbytes)
    if runtime.world_size == 1:
        return report
    found = links.measure(runtime, hosts, facts.device)
    return replace(report, summary=f"{report.summary}{_rates(found)}", links=found)


def differences(everyone: list[Facts]) -> list[str]:
    """What keeps these processes from being one run, in words; empty if nothing does."""
    found = []
    for name in everyone[0].same:
        groups = _groups((facts.same.get(name, "none"), facts.rank) for facts in everyone)
        if len(groups) > 1:
            # The largest group is what was meant; the others are named.
            (usual, _), *others = sorted(groups.items(), key=lambda item: -len(item[1]))
            them = ", ".join(f"{_named(ranks, everyone)} has {value}" for value, ranks in others)
            found.append(f"{name} is not the same on all processes: {them}, the others {usual}")
    return found


def assess(everyone: list[Facts], nbytes: int) -> Report:
    """The summary, and links and devices that stand out."""
    devices = _groups((facts.device, facts.rank) for facts in everyone)
    hosts = _groups((facts.host, facts.rank) for facts in everyone)
    warnings = []
    if len(devices) > 1:
        listed = ", ".join(f"{name}: rank {ranges(ranks)}" for name, ranks in devices.items())
        warnings.append(f"devices differ, and all wait for the slowest ({listed})")
    for host, ranks in hosts.items():
        visible = max(everyone[rank].visible for rank in ranks)
        if visible > len(ranks):
            warnings.append(
                f"{host} has {visible} GPUs and {len(ranks)} processes (rank {ranges(ranks)}): some are idle"
            )
    links: dict[Hashable, list[tuple[float, Facts, Facts]]] = defaultdict(list)
    for here, there in zip(everyone, [*everyone[1:], everyone[0]], strict=True):
        if here.rank != there.rank:
            links["within a node" if here.host == there.host else "between nodes"].append((here.link_s, here, there))
    for kind, among in links.items():
        median = statistics.median(seconds for seconds, _, _ in among)
        if len(among) >= MIN_LINKS:
            warnings.extend(
                f"rank {here.rank} ({here.host}) to rank {there.rank} ({there.host}): {_rate(nbytes, seconds)}, "
                f"where links {kind} have {_rate(nbytes, median)}"
                for seconds, here, there in among
                if seconds > SLOW * median
            )
    world = len(everyone)
    reduce_s = max(facts.reduce_s for facts in everyone)
    moved = 2 * nbytes * (world - 1) / world  # what each process sends
    speed = f"; all-reduce {_rate(moved, reduce_s)}" if world > 1 else ""
    kinds = ", ".join(f"{len(ranks)} x {name}" for name, ranks in devices.items())
    return Report(summary=f"preflight: {world} processes on {len(hosts)} hosts, {kinds}{speed}", warnings=warnings)


def _rates(found: Links) -> str:
    """Of both kinds of links, where there are both: of one kind the all-reduce says enough."""
    if found.within is None or found.between is None:
        return ""
    within, between = found.within / 1e9, found.between / 1e9
    return f"; a process sends {within:.2g} GB/s within its host, a host {between:.2g} GB/s to others"


def measure(runtime: Runtime, nbytes: int) -> tuple[float, float]:
    """(seconds to send to the next rank, seconds of an all-reduce), the best of a few. Collective."""
    if runtime.world_size == 1:
        return 0.0, 0.0
    buffer = torch.zeros(nbytes // 4, device=runtime.device)
    incoming = torch.empty_like(buffer)
    following, before = (runtime.rank + 1) % runtime.world_size, (runtime.rank - 1) % runtime.world_size

    def shift() -> None:
        sends = [dist.P2POp(dist.isend, buffer, following), dist.P2POp(dist.irecv, incoming, before)]
        for work in dist.batch_isend_irecv(sends):
            work.wait()

    times = []
    for exchange in (shift, lambda: dist.all_reduce(buffer)):
        best = float("inf")
        for _ in range(ROUNDS):
            dist.barrier()
            _finish(runtime.device)
            begun = time.perf_counter()
            exchange()
            _finish(runtime.device)
            best = min(best, time.perf_counter() - begun)
        times.append(best)
    return times[0], times[1]


def device_name(device: torch.device) -> str:
    """Kind of the device, as its maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _named(ranks: list[int], everyone: list[Facts]) -> str:
    """``rank 1, 3``; ``rank 1 on a, rank 3 on b`` where there is more than one host."""
    hosts = _groups((everyone[rank].host, rank) for rank in ranks)
    if len({facts.host for facts in everyone}) == 1:
        return f"rank {ranges(ranks)}"
    named = [f"rank {ranges(them)} on {host}" for host, them in hosts.items()]
    return f"{', '.join(named[:4])}{' and others' if len(named) > 4 else ''}"


def _gather(facts: Facts, runtime: Runtime, group: dist.ProcessGroup | None) -> list[Facts]:
    everyone: list[Facts | None] = [None] * runtime.world_size
    dist.all_gather_object(everyone, facts, group=group)
    return [one for one in everyone if one is not None]


def _groups(pairs: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for value, rank in pairs:
        found.setdefault(value, []).append(rank)
    return found


def _rate(nbytes: float, seconds: float) -> str:
    return f"{nbytes / max(seconds, 1e-9) / 1e9:.2g} GB/s"
