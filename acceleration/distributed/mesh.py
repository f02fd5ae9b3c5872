"""Processes arranged on named axes, and who belongs to which group.

Rank order is replicate (slowest) x shard x cfg x ring x ulysses x tensor (fastest), so that the axes with the most
traffic stay within a node. Data-parallel ranks are (replicate, shard): all others work on the same samples. State is
sharded over shard x cfg x ring x ulysses together, and layers over tensor, so that memory falls with every process
added, whatever it does with tokens.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from acceleration.config import MeshConfig

AXES = ("replicate", "shard", "cfg", "ring", "ulysses", "tensor")
SAMPLE_AXES = AXES[2:]  # whose processes work on the same samples
FSDP, REPLICATE = "fsdp", "replicas"  # the axes of sharding: a replica of the state is cut into FSDP shards


@dataclass
class Axis:
    """One process's view of a mesh axis, or of a part of one: its peers, and the bytes it sent to them."""

    name: str
    degree: int
    rank: int
    group: dist.ProcessGroup | None  # None only where the degree is 1
    parent: "Axis | None" = None  # the axis that this is a part of, which counts its bytes
    _sent: int = field(default=0)

    @property
    def bytes_sent(self) -> int:
        """By this process, over the axis and all its parts."""
        return self.parent.bytes_sent if self.parent else self._sent

    @bytes_sent.setter
    def bytes_sent(self, sent: int) -> None:
        if self.parent:
            self.parent.bytes_sent = sent
        else:
            self._sent = sent


@dataclass(frozen=True)
class Mesh:
    """The layout of a run as seen by one process."""

    axes: dict[str, Axis]
    device_type: str
    subgroups: dict[int, Axis] = field(default_factory=dict)  # of ulysses, by degree: of so many consecutive processes

    def __getitem__(self, axis: str) -> Axis:
        return self.axes[axis]

    def __str__(self) -> str:
        degrees = [f"{name} {self[name].degree}" for name in AXES if self[name].degree > 1]
        return " x ".join(degrees) or "one process"

    @property
    def world_size(self) -> int:
        return prod(self[name].degree for name in AXES)

    def bytes_sent(self) -> Counter[str]:
        """What this process has sent so far, by axis."""
        return Counter({name: axis.bytes_sent for name, axis in self.axes.items() if axis.bytes_sent})

    @property
    def data_degree(self) -> int:
        """How many micro-batches are worked on at the same time."""
        return self["replicate"].degree * self["shard"].degree

    @property
    def data_rank(self) -> int:
        """Which of those micro-batches is this process's."""
        return self["replicate"].rank * self["shard"].degree + self["shard"].rank

    @property
    def is_first_of_sample(self) -> bool:
        """True on one of the processes that work on the same samples."""
        return all(self[name].rank == 0 for name in SAMPLE_AXES)

    def submesh(self, ulysses: int | None) -> "Mesh":
        """The mesh for samples that only so many processes of ulysses cut, each part of the axis its own.

        ``ulysses``: a divisor of the axis's degree; None: the whole axis.
        """
        if ulysses is None or ulysses == self["ulysses"].degree:
            return self
        return replace(self, axes=self.axes | {"ulysses": self.subgroups[ulysses]})


def resolve(cfg: MeshConfig, world_size: int) -> dict[str, int]:
    """Degrees per axis for this many processes, an axis of -1 filled in.

    Raises:
        ValueError: the product is not ``world_size``; says which process counts or degrees would work.
    """
    degrees = {axis: getattr(cfg, axis) for axis in AXES}
    fixed = prod(degree for degree in degrees.values() if degree != -1)
    is_open = -1 in degrees.values()
    if world_size % fixed or (not is_open and fixed != world_size):
        wanted = f"a multiple of {fixed}" if is_open else f"{fixed}"
        stated = {axis: degree for axis, degree in degrees.items() if degree != 1 or axis == "shard"}
        raise ValueError(
            f"{' x '.join(f'{axis}={degree}' for axis, degree in stated.items())} does not fit {world_size} "
            f"process{'es' if world_size != 1 else ''}: start {wanted}, or change the degrees"
            + ("" if is_open else " (shard=-1 takes all that are left)")
        )
    return {axis: world_size // fixed if degree == -1 else degree for axis, degree in degrees.items()}


def coordinates(degrees: dict[str, int], rank: int) -> dict[str, int]:
    """Where process ``rank`` stands on every axis."""
    place = {}
    for axis in reversed(AXES):
        rank, place[axis] = divmod(rank, degrees[axis])
    return place


def view(degrees: dict[str, int], rank: int = 0, device_type: str = "cpu") -> Mesh:
    """What process ``rank`` would see, without any group: for plans and predictions. Axes not named have degree 1."""
    degrees = {axis: degrees.get(axis, 1) for axis in AXES}
    place = coordinates(degrees, rank)
    axes = {name: Axis(name, degree, place[name], None) for name, degree in degrees.items()}
    parent = axes["ulysses"]
    parts = {d: Axis("ulysses", d, parent.rank % d, None, parent) for d in divisors(parent.degree)[:-1]}
    # Nobody moves tokens along these two: they count what sharding sends.
    return Mesh(axes | {name: Axis(name, 1, 0, None) for name in (FSDP, REPLICATE)}, device_type, parts)


def divisors(degree: int) -> list[int]:
    """In ascending order."""
    return [d for d in range(1, degree + 1) if degree % d == 0]


def build(cfg: MeshConfig, world_size: int, device: torch.device) -> Mesh:
    """Make the groups; those of the parts of ulysses with ``cfg.dynamic``. Collective: every process calls it."""
    degrees = resolve(cfg, world_size)
    wide = {name: degree for name, degree in degrees.items() if degree > 1}
    devices = init_device_mesh(device.type, tuple(wide.values()), mesh_dim_names=tuple(wide)) if wide else None
    mesh = view(degrees, dist.get_rank(), device.type)
    for name in wide:
        assert devices is not None
        mesh[name].group = devices.get_group(name)
    if cfg.dynamic:
        for degree, part in mesh.subgroups.items():
            if degree > 1:
                part.group, _ = dist.new_subgroups_by_enumeration(part_ranks(degrees, degree))
    return mesh


def part_ranks(degrees: dict[str, int], part: int) -> list[list[int]]:
    """The processes of every part of ulysses of this degree, in ascending order, over the whole world."""
    tensor = degrees["tensor"]
    stride = part * tensor  # tensor is the only axis that is faster
    starts = (first + place for first in range(0, prod(degrees.values()), stride) for place in range(tensor))
    return [list(range(start, start + stride, tensor)) for start in starts]


def sharding_mesh(mesh: Mesh, zero: int) -> DeviceMesh:
    """The mesh that ZeRO works on, for this process's place on tensor: (copies, pieces), or pieces where one copy is.

    ZeRO 0 keeps a whole copy on every process. Otherwise a copy is cut over shard x cfg x ring x ulysses and repeated
    over replicate (hybrid sharding). Collective.
    """
    tensor = mesh["tensor"].degree
    members = mesh.world_size // tensor
    copies = members if zero == 0 else mesh["replicate"].degree
    sizes = {REPLICATE: copies, FSDP: members // copies, "tensor": tensor}
    kept = {name: size for name, size in sizes.items() if size > 1 or name == FSDP}
    devices = init_device_mesh(mesh.device_type, tuple(kept.values()), mesh_dim_names=tuple(kept))
    for name in (FSDP, REPLICATE):
        axis = mesh[name]
        axis.degree = sizes[name]
        if name in kept:
            axis.rank, axis.group = devices.get_local_rank(name), devices.get_group(name)
    if tensor == 1:
        return devices
    return devices[tuple(name for name in kept if name != "tensor")]
