"""The layouts that are compared with one process: what the tests run and ``python -m tests.layout_table`` prints."""

from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from acceleration.config import MeshConfig, ParallelConfig, PrecisionConfig, RecomputeConfig

FP64 = PrecisionConfig(compute="fp64", reduce="fp64", master="fp64")
RECOMPUTE = {
    "none": RecomputeConfig(),
    "full": RecomputeConfig(kind="full"),
    "first": RecomputeConfig(kind="first", blocks=3),
    "every": RecomputeConfig(kind="every", every=2),
    "selective": RecomputeConfig(kind="selective"),
    "offload": RecomputeConfig(kind="full", offload=True),
}
# Processes -> meshes. The model has 4 heads, so three processes on ulysses hold 2, 1 and 1 of them.
MESHES: dict[int, list[dict[str, int]]] = {
    1: [{}],
    2: [{}, {"replicate": 2}, {"ulysses": 2}, {"ring": 2}, {"tensor": 2}],
    3: [{}, {"ulysses": 3}, {"ring": 3}],
    4: [
        {},
        {"replicate": 2},
        {"ulysses": 2},
        {"ulysses": 4},
        {"ring": 2},
        {"ring": 4},
        {"tensor": 2},
        {"tensor": 4},
        {"replicate": 2, "ulysses": 2},
        {"replicate": 2, "tensor": 2},
        {"ring": 2, "ulysses": 2},
        {"ring": 2, "tensor": 2},
        {"ulysses": 2, "tensor": 2},
    ],
    6: [{"ring": 2, "ulysses": 3}, {"ring": 3, "tensor": 2}],
    8: [
        {"ring": 2, "ulysses": 4},
        {"ring": 2, "ulysses": 2, "tensor": 2},
        {"replicate": 2, "ring": 2, "tensor": 2},
        {"replicate": 2, "shard": 2, "ulysses": 2},
    ],
}
# Each axis, each ZeRO stage and each kind of recomputation at least twice, and the combinations where they meet.
QUICK = {
    "1-none-zero3-full",
    "2-none-zero1-none",
    "2-replicate2-zero3-full",
    "2-ulysses2-zero0-none",
    "2-ulysses2-zero2-first",
    "2-ring2-zero3-full",
    "2-tensor2-zero2-full",
    "3-ulysses3-zero3-none",
    "3-ring3-zero1-first",
    "4-ring2-ulysses2-zero3-selective",
    "4-ulysses2-tensor2-zero2-none",
    "4-replicate2-ulysses2-zero1-first",
}


@dataclass(frozen=True)
class Layout:
    """How one run is spread."""

    world: int
    mesh: dict[str, int] = field(hash=False)
    zero: int
    recompute: str

    def __str__(self) -> str:
        axes = [f"{axis}{degree}" for axis, degree in self.mesh.items()] or ["none"]
        return "-".join([str(self.world), *axes, f"zero{self.zero}", self.recompute])

    @property
    def config(self) -> ParallelConfig:
        zero: Any = self.zero
        return ParallelConfig(
            zero=zero, mesh=MeshConfig(**self.mesh), recompute=RECOMPUTE[self.recompute], precision=FP64
        )


def every_layout() -> list[Layout]:
    """Every mesh under every ZeRO stage, the kinds of recomputation in turn, and the quick ones."""
    kinds = cycle(RECOMPUTE)
    found = [
        Layout(world, mesh, zero, next(kinds))
        for world, meshes in MESHES.items()
        for mesh in meshes
        for zero in range(4)
    ]
    quick = [
        layout
        for world, meshes in MESHES.items()
        for mesh in meshes
        for zero in range(4)
        for kind in RECOMPUTE
        if str(layout := Layout(world, mesh, zero, kind)) in QUICK
    ]
    assert {str(layout) for layout in quick} == QUICK
    return found + [layout for layout in quick if layout not in found]
