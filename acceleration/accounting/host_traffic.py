"""Bytes that leave a host: which axes cross hosts, and what is sent across in an optimizer step, by formula.

What a process sends is that of comm_volume.py; here only what goes to processes of other hosts counts, for all
processes of a host together. To whom a process sends depends on the backend:

=================================  ==============================================  =================================
exchange                           gloo                                            NCCL, at its lower bound
=================================  ==============================================  =================================
all-gather of n pieces             (n-1) pieces to the next process                the same
all-reduce of b bytes              2 b (n-1)/n to a neighbour                      the same
reduce-scatter into n pieces       an all-reduce of all: 2 (n-1) pieces            (n-1) pieces to the next process
all-to-all                         each piece to whom it is for                    the same
shift along a ring                 to the next process                             the same
=================================  ==============================================  =================================

Where bytes go round, what leaves a host is what one process sends, times the places where the ring leaves it. NCCL may
choose trees or other rings; it is not measured here. Not counted: headers, messages of a few bytes (the norm,
agreements, records), checkpoints and samples, and what encoders exchange.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch

from acceleration.accounting import comm_volume
from acceleration.accounting.model_profile import ModelProfile
from acceleration.accounting.rank_layout import MicroBatch, Peers, RankLayout
from acceleration.config import ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import AXES, FSDP, REPLICATE, Axis
from acceleration.distributed.peers import ranges

REDUCTIONS = {"gloo": 2, "nccl": 1}  # how often a reduce-scatter sends what it has to send
NAMED = 8  # hosts that are named in the line about them
TRAFFIC = (FSDP, REPLICATE, "cfg", "ring", "ulysses", "tensor")  # what bytes are counted on


class OtherHosts(Peers):
    """Of a process's peers those of other hosts."""

    def __init__(self, place: RankLayout, hosts: Sequence[Hashable], backend: str = "gloo") -> None:
        """``hosts``: of every rank, anything that tells hosts apart."""
        super().__init__(REDUCTIONS[backend])
        self._place, self._hosts = place, hosts
        self._degrees = {name: place.mesh[name].degree for name in AXES}
        self._rank = 0
        for name in AXES:
            self._rank = self._rank * self._degrees[name] + place.mesh[name].rank

    def follows(self, axis: str, degree: int | None = None) -> bool:
        group = members(self._degrees, self._place.cfg.zero, axis, self._rank, degree)
        following = group[(group.index(self._rank) + 1) % len(group)]
        return self._hosts[following] != self._hosts[self._rank]

    def counted(self, axis: Axis) -> tuple[bool, ...]:
        group = members(self._degrees, self._place.cfg.zero, axis.name, self._rank, axis.degree)
        return tuple(self._hosts[rank] != self._hosts[self._rank] for rank in group)


def members(degrees: Mapping[str, int], zero: int, axis: str, rank: int, part: int | None = None) -> list[int]:
    """The ranks of the group of ``axis`` that ``rank`` is in, in order.

    Args:
        zero: stage, on which depends how many copies of the state there are.
        axis: of the mesh, or ``FSDP`` or ``REPLICATE``, over which ZeRO sends.
        part: degree of the part of the axis, for ulysses; None: the whole.
    """
    stride, degree = _strides(degrees, zero)[axis]
    degree = part or degree
    first = rank - rank // stride % degree * stride
    return list(range(first, first + degree * stride, stride))


def _strides(degrees: Mapping[str, int], zero: int) -> dict[str, tuple[int, int]]:
    """Axis -> (distance of two neighbours of a group, processes of a group)."""
    found, below = {}, 1
    for axis in reversed(AXES):
        found[axis] = (below, degrees[axis])
        below *= degrees[axis]
    tensor = degrees["tensor"]
    copies = below // tensor if zero == 0 else degrees["replicate"]
    pieces = below // tensor // copies
    return found | {FSDP: (tensor, pieces), REPLICATE: (tensor * pieces, copies)}


def leaving_host(
    structure: ModelProfile,
    cfg: ParallelConfig,
    degrees: Mapping[str, int],
    hosts: Sequence[Hashable],
    batches: Mapping[int, Sequence[MicroBatch]],
    host: Hashable,
    backend: str = "gloo",
) -> dict[str, int]:
    """Axis -> bytes that the processes of ``host`` send to other hosts in one optimizer step.

    Args:
        degrees: of every axis.
        hosts: of every rank.
        batches: of the step, for every rank on the host.
    """
    total: dict[str, int] = {}
    for rank in (rank for rank, one in enumerate(hosts) if one == host):
        place = RankLayout(meshes.view(dict(degrees), rank), cfg)
        place = replace(place, peers=OtherHosts(place, hosts, backend))
        for axis, sent in comm_volume.step_bytes(structure, place, batches[rank]).items():
            if sent:
                total[axis] = total.get(axis, 0) + sent
    return total


def shares_leaving(degrees: Mapping[str, int], zero: int, hosts: Sequence[int]) -> dict[str, float]:
    """Axis -> most bytes that leave a host, of every byte that each process sends along the axis; 0: none do.

    Exact where all processes send the same; axes of degree 1 are left out.

    Args:
        hosts: of every rank, numbered from 0.
    """
    host, ranks = torch.tensor(hosts), torch.arange(prod(degrees.values()))
    found = {}
    for axis, (stride, degree) in _strides(degrees, zero).items():
        if degree == 1 or axis not in TRAFFIC:
            continue
        place = ranks // stride % degree
        first = ranks - place * stride
        if axis == "ulysses":  # from each to each: the share of the others that are elsewhere
            _, index, here = (first * (host.max() + 1) + host).unique(return_inverse=True, return_counts=True)
            away = (degree - here[index]).double() / (degree - 1)
        else:  # to the next one alone
            away = (host[first + (place + 1) % degree * stride] != host).double()
        found[axis] = float(torch.zeros(int(host.max()) + 1, dtype=torch.float64).index_add_(0, host, away).max())
    return found


def summary(degrees: Mapping[str, int], hosts: Sequence[str], launched: Sequence[int], sent: Mapping[str, int]) -> str:
    """One line: which ranks each host has, which axes cross hosts, and what the first host will send in a step.

    Args:
        hosts: name of the host of every rank.
        launched: the launcher's rank of every rank; said where it is another.
        sent: of ``leaving_host``; empty where it is not known.
    """
    names = list(dict.fromkeys(hosts))
    listed = [_ranks_of(name, hosts, launched) for name in names[:NAMED]]
    more = [f"{len(names) - NAMED} more"] if len(names) > NAMED else []
    parts = ", ".join(f"{axis} {readable(count)}" for axis, count in sent.items())
    predicted = f"; {hosts[0]} sends the others {readable(sum(sent.values()))} per step ({parts}; predicted)"
    return f"{len(names)} hosts: {', '.join([*listed, *more])}; {_axes(degrees, hosts)}{predicted if sent else ''}"


def _ranks_of(name: str, hosts: Sequence[str], launched: Sequence[int]) -> str:
    ranks = [rank for rank, one in enumerate(hosts) if one == name]
    theirs = sorted(launched[rank] for rank in ranks)
    return f"{name} has rank {ranges(ranks)}" + (f" (the launcher's {ranges(theirs)})" if theirs != ranks else "")


def _axes(degrees: Mapping[str, int], hosts: Sequence[Hashable]) -> str:
    """``ulysses stays within a host, shard crosses hosts``."""
    groups = {axis: (count, len(hosts) // degrees[axis]) for axis, count in crossing(degrees, hosts).items()}
    within = [axis for axis, (count, _) in groups.items() if not count]
    across = [f"{axis} ({n} of {every} groups)" if n < every else axis for axis, (n, every) in groups.items() if n]
    said = []
    if within:
        said.append(f"{' and '.join(within)} {'stays' if len(within) == 1 else 'stay'} within a host")
    if across:
        said.append(f"{' and '.join(across)} {'crosses' if len(across) == 1 else 'cross'} hosts")
    return ", ".join(said)


def readable(count: float) -> str:
    """Bytes in the largest unit of which there is one: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def crossing(degrees: Mapping[str, int], hosts: Sequence[Hashable]) -> dict[str, int]:
    """Axis of the mesh -> how many of its groups have processes of several hosts; axes of degree 1 left out."""
    found = {}
    for axis in AXES:
        if degrees[axis] > 1:
            groups = {tuple(members(degrees, 1, axis, rank)) for rank in range(len(hosts))}
            found[axis] = sum(len({hosts[rank] for rank in group}) > 1 for group in groups)
    return found
