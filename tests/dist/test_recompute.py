"""Every kind of recomputation under every kind of layout: the gradients of one process, and what is sent again."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.config import MeshConfig, OptimConfig, ParallelConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from acceleration.engines import build_engine
from acceleration.parallelize import parallelize
from acceleration.sequence import SequenceParallel
from tests.dist.harness import run_distributed
from tests.dist.layouts import FP64
from tests.dist.parity import TOLERANCE, Step, fill, worst_error
from tests.dist.test_parity import on_one_process, on_this_layout
from tests.dist.toy import Toy

MESHES: dict[str, tuple[int, dict[str, int]]] = {
    "one": (1, {}),
    "shard2": (2, {}),
    "ulysses2": (2, {"ulysses": 2}),
    "ring2": (2, {"ring": 2}),
    "tensor2": (2, {"tensor": 2}),
    "ring2ulysses2": (4, {"ring": 2, "ulysses": 2}),
}
KINDS = {
    "full": RecomputeConfig(kind="full"),
    "first": RecomputeConfig(kind="first", blocks=3),
    "every": RecomputeConfig(kind="every", every=3),
    "selective": RecomputeConfig(kind="selective"),
    "full-offload": RecomputeConfig(kind="full", offload=True),
    "every-offload": RecomputeConfig(kind="every", every=2, offload=True),
    "selective-offload": RecomputeConfig(kind="selective", offload=True),
}
QUICK = {("ulysses2", "selective"), ("ring2", "selective-offload"), ("tensor2", "every-offload")}


@pytest.fixture(scope="module")
def truth() -> tuple[list[Step], dict[str, Tensor]]:
    return on_one_process()


@pytest.mark.parametrize(
    ("mesh", "kind"),
    [
        pytest.param(mesh, kind, id=f"{mesh}-{kind}", marks=[] if (mesh, kind) in QUICK else [pytest.mark.slow])
        for mesh in MESHES
        for kind in KINDS
    ],
)
def test_gradients_equal_one_process(truth: tuple[list[Step], dict[str, Tensor]], mesh: str, kind: str) -> None:
    world, axes = MESHES[mesh]
    cfg = ParallelConfig(zero=3, mesh=MeshConfig(**axes), recompute=KINDS[kind], precision=FP64)
    for rank, found in enumerate(run_distributed(on_this_layout, world, cfg)):
        assert worst_error(found, truth) <= TOLERANCE, f"rank {rank}"


def bytes_sent(axes: dict[str, int], kinds: list[RecomputeConfig]) -> list[dict[str, int]]:
    """What one forward and backward of the toy sends along each axis of attention, for every kind."""
    device = torch.device("cpu")
    result = []
    for kind in kinds:
        cfg = ParallelConfig(zero=2, mesh=MeshConfig(**axes), recompute=kind, precision=FP64)
        mesh = meshes.build(cfg.mesh, dist.get_world_size(), device)
        with torch.device("meta"):
            model: Any = Toy()
        parallelize(model, cfg, mesh, device, fill)
        engine = build_engine(model, cfg, OptimConfig(kind="sgd"), mesh)
        sequence = SequenceParallel(mesh)
        x = sequence.shard(torch.ones(2, 9, 5))
        engine.backward(model(x, torch.ones(2, 3), context=sequence.context(0, 9)).sum(), last_microbatch=True)
        result.append({axis: mesh[axis].bytes_sent for axis in axes})
    return result


def test_selective_passes_nothing_around_the_ring_again() -> None:
    kinds = [RecomputeConfig(), KINDS["selective"], KINDS["full"]]
    for none, selective, full in run_distributed(bytes_sent, 2, {"ring": 2}, kinds):
        assert 0 < none["ring"] == selective["ring"] < full["ring"]


@pytest.mark.slow
def test_selective_exchanges_heads_again() -> None:
    """Queries, keys and values are not kept: with Ulysses their exchange runs again."""
    kinds = [RecomputeConfig(), KINDS["selective"], KINDS["full"]]
    for none, selective, full in run_distributed(bytes_sent, 2, {"ulysses": 2}, kinds):
        assert 0 < none["ulysses"] < selective["ulysses"] <= full["ulysses"]
