"""Bytes counted on every axis equal the bytes that the formulas predict, on every process, exactly."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from acceleration import lora
from acceleration.accounting.comm_volume import step_bytes
from acceleration.accounting.model_profile import ModelProfile
from acceleration.accounting.profiling import profile_of
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import LoraConfig, MeshConfig, OptimConfig, ParallelConfig, PrecisionConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from acceleration.engines import build_engine
from acceleration.parallelize import parallelize
from opensora.datasets.loading.reader import PackedBatch
from opensora.models.families import build_model
from opensora.models.mmdit import FAMILY, MMDiTConfig
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


def structure(model: MMDiTConfig, adapters: LoraConfig = LoraConfig()) -> ModelProfile:  # noqa: B008
    with torch.device("meta"):
        return profile_of(built(model, adapters), run_denoiser)


def built(model: MMDiTConfig, adapters: LoraConfig) -> nn.Module:
    """On the default device."""
    net = build_model(model)
    if adapters.rank:
        lora.apply(net, adapters)
    return net


def mine(step: int, rank: int, degree: int) -> list[tuple[FakeBatch, MicroBatch]]:
    """This data-parallel rank's micro-batches, and their sizes."""
    sized = [
        (batch, MicroBatch(samples=size, txt=TEXT_TOKENS, img=t * h * w, has_mask=True))
        for batch, (size, t, h, w) in zip(batches(step), BUCKETS, strict=True)
    ]
    found = sized[rank::degree]
    return found + [sized[-1]] * (-(-len(sized) // degree) - len(found))


def packed(step: int, rank: int, degree: int) -> list[tuple[PackedBatch, MicroBatch]]:
    """The same of samples in two packs, each of several shapes."""
    every = [(batch, size.samples, size.img) for batch, size in mine(step, 0, 1)]
    found = []
    for part in (every[:3], every[3:]):
        count = sum(samples for _, samples, _ in part)
        img = sum(samples * tokens for _, samples, tokens in part)
        size = MicroBatch(samples=1, txt=count * TEXT_TOKENS, img=img, packed=count)
        found.append((PackedBatch(tuple(batch for batch, *_ in part)), size))  # type: ignore[arg-type]
    return found[rank::degree]


def fill(name: str, tensor: torch.Tensor) -> None:
    tensor.copy_(torch.randn(tensor.shape, generator=torch_generator("weights", name)) * 0.1)


def count(
    cfg: ParallelConfig,
    model: MMDiTConfig,
    has_mask: bool,
    adapters: LoraConfig = LoraConfig(),  # noqa: B008
    share_out: Callable[[int, int, int], Sequence[tuple[Any, MicroBatch]]] = mine,
) -> list[dict[str, dict[str, int]]]:
    """Runs in every process: {counted, predicted} of two steps."""
    device = torch.device("cpu")
    mesh = meshes.build(cfg.mesh, dist.get_world_size(), device)
    place = RankLayout(meshes.view({name: mesh[name].degree for name in meshes.AXES}, dist.get_rank()), cfg)
    shape = structure(model, adapters)
    with torch.device("meta"):
        net = built(model, adapters)
    streams = adapters.offload == "blocks"
    parallelize(net, cfg, mesh, device, fill, streams_frozen=streams)
    shape = shape.without_frozen() if streams else shape
    engine = build_engine(net, cfg, OptimConfig(kind="sgd", lr=0.01), mesh)
    prepare = preparation(mesh)
    encoders = replace(prepare.encoders, text_encoder=FakeText() if has_mask else Unmasked())
    prepare = replace(prepare, encoders=encoders)
    found = []
    for step in range(2):
        for axis in mesh.axes.values():
            axis.bytes_sent = 0
        todo = share_out(step, mesh.data_rank, mesh.data_degree)
        for index, (batch, _) in enumerate(todo):
            share = loss_share(engine.model, prepare(batch, step), elements(step))
            engine.backward(share, last_microbatch=index == len(todo) - 1)
        engine.step(step)
        counted = {axis.name: axis.bytes_sent for axis in mesh.axes.values() if axis.bytes_sent}
        sizes = [replace(size, has_mask=has_mask and not size.packed) for _, size in todo]
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


EVERY = LoraConfig(rank=3, alpha=5.0, targets=FAMILY.lora_targets)
FEW = replace(EVERY, targets=("double_blocks.1.*_attn.qkv", "single_blocks.0.linear2"))
# processes, mesh, ZeRO, recomputation, adapters, who shares out micro-batches
OTHERS = {
    "adapters": (2, {}, 3, "full", EVERY, mine),
    "packs": (2, {"ulysses": 2}, 2, "selective", LoraConfig(), packed),
    "adapters, zero 2": (2, {}, 2, "none", EVERY, mine),
    "adapters, tensor": (2, {"tensor": 2}, 3, "full", EVERY, mine),
    "adapters on a base that streams": (2, {}, 3, "full", replace(EVERY, offload="blocks"), mine),
    "adapters on a base that streams, tensor": (4, {"tensor": 2}, 2, "none", replace(EVERY, offload="blocks"), mine),
    "adapters in some, ulysses": (3, {"ulysses": 3}, 3, "full", FEW, mine),
    "adapters in some, tensor": (2, {"tensor": 2}, 1, "none", FEW, mine),
    "adapters in some, tensor, recomputed": (2, {"tensor": 2}, 2, "full", FEW, mine),
    "adapters, ring": (2, {"ring": 2}, 1, "selective", EVERY, mine),
    "adapters, copies": (4, {"replicate": 2, "tensor": 2}, 3, "none", EVERY, mine),
    "packs, tensor": (2, {"tensor": 2}, 3, "full", LoraConfig(), packed),
    "packs, tensor and ulysses": (4, {"tensor": 2, "ulysses": 2}, 1, "none", LoraConfig(), packed),
    "packs, shards": (2, {}, 3, "full", LoraConfig(), packed),
    "packs, adapters": (4, {"tensor": 2, "ulysses": 2}, 3, "selective", EVERY, packed),
}


@pytest.mark.parametrize(
    "name", [name if name in ("adapters", "packs") else pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]
)
def test_counted_is_predicted_of_adapters_and_packs(name: str) -> None:
    world, mesh, zero, kind, adapters, share_out = OTHERS[name]
    recompute: Any = RecomputeConfig(kind=kind)  # type: ignore[arg-type]
    cfg = ParallelConfig(zero=zero, mesh=MeshConfig(**mesh), recompute=recompute, precision=PRECISIONS["mixed"])  # type: ignore[arg-type]
    has_mask = share_out is mine  # padding is left out of packs
    for rank, steps in enumerate(run_distributed(count, world, cfg, MODEL, has_mask, adapters, share_out, timeout=100)):
        for found in steps:
            counted, predicted = found["counted"], found["predicted"]
            if "in some" in name:  # a bound: nothing goes backward below the first adapter
                assert all(counted[axis] <= predicted[axis] for axis in counted), f"rank {rank}"
            elif "streams" in name:  # close: adapters alone are sharded
                assert counted == {axis: pytest.approx(sent, rel=0.03) for axis, sent in predicted.items()}
            else:
                assert counted == predicted, f"rank {rank}"
