"""Processes arranged on named axes, and who belongs to which group.

Rank order is replicate (slowest) x shard x ulysses (fastest), so that the axis with the most traffic stays within a
node. Data-parallel ranks are (replicate, shard): the processes of one ulysses group work on the same samples. State is
sharded over shard x ulysses together, so that memory falls with every process added, whatever it does with tokens.
"""

from dataclasses import dataclass, field
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from acceleration.config import MeshConfig

AXES = ("replicate", "shard", "ulysses")


@dataclass
class Axis:
    """One process's view of a mesh axis: its peers, and the bytes it sent to them."""

    name: str
    degree: int
    rank: int
    group: dist.ProcessGroup | None  # None only where the degree is 1
    bytes_sent: int = field(default=0)


@dataclass(frozen=True)
class Mesh:
    """The layout of a run as seen by one process."""

    axes: dict[str, Axis]
    devices: DeviceMesh
    device_type: str

    def __getitem__(self, axis: str) -> Axis:
        return self.axes[axis]

    @property
    def world_size(self) -> int:
        return prod(axis.degree for axis in self.axes.values())

    @property
    def data_degree(self) -> int:
        """How many micro-batches are worked on at the same time."""
        return self["replicate"].degree * self["shard"].degree

    @property
    def data_rank(self) -> int:
        """Which of those micro-batches is this process's."""
        return self["replicate"].rank * self["shard"].degree + self["shard"].rank


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
        raise ValueError(
            f"{' x '.join(f'{axis}={degree}' for axis, degree in degrees.items())} does not fit {world_size} "
            f"process{'es' if world_size != 1 else ''}: start {wanted}, or change the degrees"
            + ("" if is_open else " (shard=-1 takes all that are left)")
        )
    return {axis: world_size // fixed if degree == -1 else degree for axis, degree in degrees.items()}


def build(cfg: MeshConfig, world_size: int, device: torch.device) -> Mesh:
    """Make the groups. Collective: every process of the group calls it."""
    degrees = resolve(cfg, world_size)
    devices = init_device_mesh(device.type, tuple(degrees[a] for a in AXES), mesh_dim_names=AXES)
    axes = {}
    for name, degree in degrees.items():
        group = devices.get_group(name) if degree > 1 else None
        axes[name] = Axis(name, degree, devices.get_local_rank(name), group)
    return Mesh(axes, devices, device.type)


def sharding_mesh(mesh: Mesh, zero: int) -> DeviceMesh:
    """The mesh that ZeRO works on: (copies, pieces of one copy), or pieces alone where there is one copy.

    ZeRO 0 keeps a whole copy on every process. Otherwise a copy is cut over shard x ulysses and repeated over
    replicate (hybrid sharding).
    """
    copies = mesh.world_size if zero == 0 else mesh["replicate"].degree
    if copies == 1:
        return init_device_mesh(mesh.device_type, (mesh.world_size,), mesh_dim_names=("pieces",))
    return init_device_mesh(mesh.device_type, (copies, mesh.world_size // copies), mesh_dim_names=("copies", "pieces"))
