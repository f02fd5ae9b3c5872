"""How fast processes exchange bytes within a host and between hosts: measured, kept in a file, read by the planner."""

import json
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from acceleration.accounting.host_traffic import REDUCTIONS
from acceleration.distributed.runtime import Runtime
from acceleration.files.atomic_write import read_small, replacing
from acceleration.files.untrusted import parse_json
from acceleration.sharding.fsdp import ALL_GATHER, REDUCE_SCATTER

T = TypeVar("T")
NAME = "links.json"  # in the folder of a run
FIRST = {"cpu": 1 << 20, "cuda": 1 << 26}  # bytes of the first try
FEW = 64  # of an exchange whose bytes take no time
MOST = 1 << 28  # of one that is measured
LEAST_S = 0.1  # that it should take: a short one is over before the link's own buffers are full
ROUNDS, LONG_S = 3, 1.0  # how often, but once where one takes longer
FIELDS = {"processes", "within", "between", "latency_within", "latency_between", "device"}
TURNS = 16  # of work and an exchange, to find what an exchange takes beside its bytes
SIDE = 256  # of the matrices that are multiplied between two exchanges
MAX_HOSTS, MAX_RATE, MAX_LATENCY_S = 10**6, 1e15, 3600.0


@dataclass(frozen=True, kw_only=True)
class Links:
    """Rates in bytes/s, in one direction while the other is used as much, all processes exchanging at the same time."""

    processes: tuple[int, ...]  # of every host, in the order of ranks
    within: float | None  # from every process to others of its host, in what sharding does; None: no host has two
    between: float | None  # from every host to another one, all its processes together; None: there is one host
    # Seconds that an exchange of a few bytes adds to the work before it: processes wait for the slowest. 0: unknown.
    latency_within: float = 0.0
    latency_between: float = 0.0
    device: str = ""  # kind of device between which it was measured

    def write(self, path: Path) -> None:
        """
        Raises:
            OSError: the file cannot be written.
        """
        with replacing(path) as file:
            file.write((json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> "Links":
        """From a file, or from the folder of a run that has measured.

        Raises:
            OSError: it cannot be read.
            ValueError: it holds no rates; says what is wrong.
        """
        found = parse_json(read_small(path / NAME if path.is_dir() else path, 1 << 24), ValueError)
        if not isinstance(found, dict) or not {"processes", "within", "between"} <= found.keys() <= FIELDS:
            raise ValueError("must hold processes, within and between, as preflight writes them")
        waits = {name: found.get(name, 0.0) for name in ("latency_within", "latency_between")}
        counts, rates = found["processes"], (found["within"], found["between"])
        if not isinstance(counts, list) or not counts or not all(type(n) is int and 0 < n <= MAX_HOSTS for n in counts):
            raise ValueError("processes: must be a list of the number of processes of every host")
        for name, rate in zip(("within", "between"), rates, strict=True):
            if rate is not None and not (type(rate) in (int, float) and 0 < rate <= MAX_RATE):
                raise ValueError(f"{name}: must be a number of bytes/s > 0, or null")
        for name, seconds in waits.items():
            if not (type(seconds) in (int, float) and 0 <= seconds <= MAX_LATENCY_S):
                raise ValueError(f"{name}: must be a number of seconds from 0 to {MAX_LATENCY_S:g}")
        device = str(found.get("device", ""))
        return cls(processes=tuple(counts), within=rates[0], between=rates[1], device=device, **waits)


def measure(runtime: Runtime, hosts: Sequence[Hashable], device: str = "") -> Links:
    """Do within every host what sharding does there, then send from every host to the next one. Collective; a second.

    The slowest host or process counts.

    Args:
        hosts: of every rank.
        device: kind of the devices, to be kept beside the rates.
    """
    members: dict[Hashable, list[int]] = {}
    for rank, host in enumerate(hosts):
        members.setdefault(host, []).append(rank)
    groups = list(members.values())
    found = Links(processes=tuple(map(len, groups)), within=None, between=None, device=device)
    if any(len(group) > 1 for group in groups):
        neighbours = {a: b for group in groups if len(group) > 1 for a, b in _turned(group)}
        latency = _latency(_sending(neighbours, FEW, runtime), runtime)
        found = replace(found, within=_rate_within(groups, runtime), latency_within=latency)
    if len(groups) > 1:
        receivers = {rank: there[i % len(there)] for here, there in _turned(groups) for i, rank in enumerate(here)}
        nbytes, seconds = _timed(lambda nbytes: _sending(receivers, nbytes, runtime), runtime)
        between = min(nbytes * len(group) / max(seconds[rank] for rank in group) for group in groups)
        latency = _latency(_sending(receivers, FEW, runtime), runtime)
        found = replace(found, between=between, latency_between=latency)
    return found


def _turned(one: Sequence[T]) -> list[tuple[T, T]]:
    """Each with the next one, the last with the first."""
    return list(zip(one, [*one[1:], one[0]], strict=True))


def _rate_within(groups: Sequence[Sequence[int]], runtime: Runtime) -> float:
    """Bytes/s that a process sends in a reduce-scatter and an all-gather, which on CPUs take more than sending does."""
    mine = next(list(group) for group in groups if runtime.rank in group)
    group = dist.new_group(mine, use_local_synchronization=True) if len(mine) > 1 else None
    backend = dist.get_backend()

    def exchanging(nbytes: int) -> Callable[[], None]:
        piece = torch.zeros(nbytes // 4, device=runtime.device)
        whole = torch.zeros(nbytes // 4 * len(mine), device=runtime.device)

        def exchange() -> None:
            if group is not None:
                getattr(dist, REDUCE_SCATTER)(piece, whole, group=group)
                getattr(dist, ALL_GATHER)(whole, piece, group=group)

        return exchange

    nbytes, seconds = _timed(exchanging, runtime)
    if group is not None:
        dist.destroy_process_group(group)
    sent = nbytes * (REDUCTIONS.get(backend, 1) + 1)
    return min(sent * (len(g) - 1) / seconds[rank] for g in groups for rank in g if len(g) > 1)


def _sending(receivers: dict[int, int], nbytes: int, runtime: Runtime) -> Callable[[], None]:
    """What sends so many bytes to the receiver of this rank, and takes what comes."""
    buffer = torch.zeros(nbytes, dtype=torch.uint8, device=runtime.device)
    senders = [sender for sender, receiver in receivers.items() if receiver == runtime.rank]
    incoming = [torch.empty_like(buffer) for _ in senders]

    def send() -> None:
        transfers = [dist.P2POp(dist.irecv, x, sender) for x, sender in zip(incoming, senders, strict=True)]
        if runtime.rank in receivers:
            transfers.append(dist.P2POp(dist.isend, buffer, receivers[runtime.rank]))
        for work in dist.batch_isend_irecv(transfers) if transfers else ():
            work.wait()

    return send


def _latency(exchange: Callable[[], None], runtime: Runtime) -> float:
    """Seconds that an exchange of a few bytes takes among work that it interrupts, beyond the work by itself."""
    matrix = torch.zeros(SIDE, SIDE, device=runtime.device)

    def work() -> None:
        for _ in range(TURNS):
            matrix @ matrix

    def both() -> None:
        for _ in range(TURNS):
            matrix @ matrix
            exchange()

    alone, together = (sorted(max(_once(what, runtime)) for _ in range(ROUNDS)) for what in (work, both))
    return max(0.0, together[ROUNDS // 2] - alone[ROUNDS // 2]) / TURNS


def _timed(made_for: Callable[[int], Callable[[], None]], runtime: Runtime) -> tuple[int, list[float]]:
    """(bytes, seconds of every rank) of an exchange of so many bytes that it takes ``LEAST_S``; the best of a few."""
    nbytes = FIRST[runtime.device.type]
    tried = max(_once(made_for(nbytes), runtime))
    nbytes = min(int(nbytes * max(1.0, LEAST_S / tried)) // 4 * 4, MOST)
    exchange = made_for(nbytes)
    rounds = [_once(exchange, runtime) for _ in range(ROUNDS if tried < LONG_S else 1)]
    return nbytes, min(rounds, key=max)


def _once(exchange: Callable[[], None], runtime: Runtime) -> list[float]:
    """Seconds that it takes every rank."""
    device = runtime.device
    dist.barrier()
    _finish(device)
    begun = time.perf_counter()
    exchange()
    _finish(device)
    took = torch.tensor(time.perf_counter() - begun, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(took) for _ in range(runtime.world_size)]
    dist.all_gather(everyone, took)
    return [max(float(one), 1e-9) for one in everyone]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
