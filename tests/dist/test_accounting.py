"""Bytes counted on every axis equal the bytes that the formulas predict, on every process, exactly."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from acceleration.accounting.comm_volume import step_bytes
from acceleration.accounting.model_profile import ModelProfile
from acceleration.accounting.profiling import profile_of
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import MeshConfig, OptimConfig, ParallelConfig, PrecisionConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from acceleration.engines import build_engine
from acceleration.parallelize import parallelize
from opensora.models.families import build_model
from opensora.models.mmdit import MMDiTConfig
from opensora.planner.meta_model import run_denoiser
from opensora.train.preparation import loss_share
from opensora.utils.rng import torch_generator
from tests.dist.harness import run_distributed
from tests.dist.problem import BUCKETS, MODEL, TEXT_TOKENS, FakeBatch, FakeText, batches, elements
from tests.dist.test_parity import preparation

UNFUSED = replace(MODEL, fused_qkv=False, depth_single_blocks=0, hidden_size=60, num_heads=5)  # the text ends unread
PRECISIONS = {
    "fp64": PrecisionConfig(compute="fp64", reduce="fp64", master="fp64"),
    "mixed": PrecisionConfig(compute="bf16", reduce="fp32", master="fp32"),
}


class Unmasked(FakeText):
    def encode(self, prompts: list[str]) -> Any:
        return replace(super().encode(prompts), mask=None)


def structure(model: MMDiTConfig) -> ModelProfile:
    with torch.device("meta"):
        return profile_of(build_model(model), run_denoiser)


def mine(step: int, rank: int, degree: int) -> list[tuple[FakeBatch, MicroBatch]]:
    """This data-parallel rank's micro-batches, and their sizes."""
    sized = [
        (batch, MicroBatch(samples=size, txt=TEXT_TOKENS, img=t * h * w, has_mask=True))
        for batch, (size, t, h, w) in zip(batches(step), BUCKETS, strict=True)
    ]
    found = sized[rank::degree]
    return found + [sized[-1]] * (-(-len(sized) // degree) - len(found))


def fill(name: str, tensor: torch.Tensor) -> None:
    tensor.copy_(torch.randn(tensor.shape, generator=torch_generator("weights", name)) * 0.1)


def count(cfg: ParallelConfig, model: MMDiTConfig, has_mask: bool) -> list[dict[str, dict[str, int]]]:
    """Runs in every process: {counted, predicted} of two steps."""
    device = torch.device("cpu")
    mesh = meshes.build(cfg.mesh, dist.get_world_size(), device)
    place = RankLayout(meshes.view({name: mesh[name].degree for name in meshes.AXES}, dist.get_rank()), cfg)
    shape = structure(model)
    with torch.device("meta"):
        net = build_model(model)
    parallelize(net, cfg, mesh, device, fill)
    engine = build_engine(net, cfg, OptimConfig(kind="sgd", lr=0.01), mesh)
    prepare = preparation(mesh)
    encoders = replace(prepare.encoders, text_encoder=FakeText() if has_mask else Unmasked())
    prepare = replace(prepare, encoders=encoders)
    found = []
    for step in range(2):
        for axis in mesh.axes.values():
            axis.bytes_sent = 0
        todo = mine(step, mesh.data_rank, mesh.data_degree)
        for index, (batch, _) in enumerate(todo):
            share = loss_share(engine.model, prepare(batch, step), elements(step))  # type: ignore[arg-type]
            engine.backward(share, last_microbatch=index == len(todo) - 1)
        engine.step(step)
        counted = {axis.name: axis.bytes_sent for axis in mesh.axes.values() if axis.bytes_sent}
        sizes = [replace(size, has_mask=has_mask) for _, size in todo]
        found.append({"counted": counted, "predicted": step_bytes(shape, place, sizes)})
    return found


def case(world: int, mesh: dict[str, int], zero: int, recompute: str = "none", *more: Any) -> Any:
    """(processes, mesh, ZeRO, recompute, precision, mask, model)."""
    precision, has_mask, model = (*more, *("fp64", True, MODEL)[len(more) :])
    name = "-".join(
        [str(world), *(f"{axis}{degree}" for axis, degree in mesh.items()), f"zero{zero}", recompute, precision]
        + ["mask" if has_mask else "nomask"]
        + (["unfused"] if model is UNFUSED else [])
    )
    return pytest.param(world, mesh, zero, recompute, precision, has_mask, model, id=name)


QUICK = [
    case(2, {}, 3, "full", "mixed"),
    case(3, {}, 2, "none", "mixed"),
    case(2, {"ulysses": 2}, 1, "first", "mixed"),
    case(2, {"ring": 2}, 3, "full", "mixed"),
    case(2, {"tensor": 2}, 0, "full", "mixed"),
    case(3, {"ulysses": 3}, 3, "none", "mixed"),  # 4 heads over 3
    case(4, {"ring": 2, "ulysses": 2}, 2, "full", "mixed"),
    case(4, {"replicate": 2, "tensor": 2}, 3, "none", "mixed"),
]
SLOW_MESHES: list[tuple[int, dict[str, int]]] = [
    (2, {}),
    (2, {"replicate": 2}),
    (3, {"ring": 3}),
    (4, {"ulysses": 4}),
    (4, {"replicate": 2, "ulysses": 2}),
    (4, {"tensor": 2, "ulysses": 2}),
    (4, {"tensor": 4}),
    (4, {"ring": 2, "tensor": 2}),
    (6, {"ring": 2, "ulysses": 3}),
    (8, {"ring": 2, "ulysses": 2, "tensor": 2}),
]
SLOW = [
    case(world, mesh, zero, recompute)
    for (world, mesh), (zero, recompute) in itertools.product(
        SLOW_MESHES, ((0, "none"), (1, "full"), (2, "first"), (3, "none"), (3, "full"))
    )
] + [
    case(4, {"ring": 2, "ulysses": 2}, 3, "full", "mixed", False),
    case(3, {"ulysses": 3}, 3, "full", "mixed", True, UNFUSED),
    case(2, {"ring": 2}, 1, "full", "fp64", False, UNFUSED),
    case(5, {"tensor": 5}, 3, "full", "mixed", True, UNFUSED),
]


@pytest.mark.parametrize(
    ("world", "mesh", "zero", "recompute", "precision", "mask", "model"),
    [*QUICK, *(pytest.param(*slow.values, id=slow.id, marks=pytest.mark.slow) for slow in SLOW)],
)
def test_counted_is_predicted(
    world: int, mesh: dict[str, int], zero: Any, recompute: Any, precision: str, mask: bool, model: Any
) -> None:
    cfg = ParallelConfig(
        zero=zero,
        mesh=MeshConfig(**mesh),
        recompute=RecomputeConfig(kind=recompute, blocks=3 if recompute == "first" else 0),
        precision=PRECISIONS[precision],
    )
    for rank, steps in enumerate(run_distributed(count, world, cfg, model, mask, timeout=100)):
        for found in steps:
            assert found["counted"] == found["predicted"], f"rank {rank}"
            assert all(axis in found["counted"] for axis, degree in mesh.items() if degree > 1 and axis != "replicate")
