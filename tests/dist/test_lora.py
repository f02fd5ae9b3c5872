"""Adapters under any layout are those of one process: loss, every gradient, weights after steps; the base stays.

The reference is plain torch without any of our code for adapters: each adapted layer has a hook that adds its product.
fp64 and SGD, as in test_parity.py.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from acceleration import lora, plan, sharding, tensor_parallel
from acceleration import mesh as meshes
from acceleration.checkpoint import CheckpointManager
from acceleration.collectives import nbytes
from acceleration.config import LoraConfig, MeshConfig, OptimConfig, ParallelConfig, RecomputeConfig
from acceleration.engines import Engine, build_engine
from acceleration.mesh import COPIES, Mesh
from acceleration.parallelize import parallelize
from opensora.models import build_model
from opensora.train.step import loss_share
from tests.dist.harness import run_distributed
from tests.dist.problem import MODEL, batches, elements
from tests.dist.test_parity import CLIP, FP64, LR, STEPS, TOLERANCE, Step, assign, fill, preparation, relative
from tests.dist.test_parity import worst_error as worst_of_steps

BLOCKS = LoraConfig(rank=3, alpha=5.0)  # a rank that no number of processes divides
# Every kind of layer: cut by outputs, by inputs, joined again, held by all; inside blocks and outside.
EVERY = LoraConfig(
    rank=3,
    alpha=5.0,
    targets=(
        *BLOCKS.targets,
        "double_blocks.*.*_mod.lin",
        "single_blocks.*.modulation.lin",
        "*_in",
        "*_in.*",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ),
)
LATE = LoraConfig(rank=2, targets=("single_blocks.1.linear2",))  # most blocks see no gradient at all
Found = tuple[list[Step], dict[str, Tensor]]


def layers(model: nn.Module, cfg: LoraConfig) -> list[str]:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linears if any(plan.matches(name, pattern) for pattern in cfg.targets)]


def on_one_process(cfg: LoraConfig) -> Found:
    """The truth: hooks on a plain model."""
    model = build_model(MODEL).double().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill(name, parameter)
    adapters: dict[str, Tensor] = {}
    for name in layers(model, cfg):
        layer = model.get_submodule(name)
        a, b = (torch.empty(*shape, dtype=torch.float64) for shape in shapes(layer, cfg.rank))
        for kind, value in (("A", a), ("B", b)):
            fill(f"{name}.lora_{kind}.weight", value)
            adapters[f"{name}.lora_{kind}.weight"] = value.requires_grad_()
        layer.register_forward_hook(
            lambda _, args, out, a=a, b=b: out + (cfg.alpha or cfg.rank) / cfg.rank * F.linear(F.linear(args[0], a), b)
        )
    optimizer = torch.optim.SGD(adapters.values(), lr=LR)
    prepare = preparation(meshes.view({}))
    steps: list[Step] = []
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches(step):
            tokens = prepare(batch, step)  # type: ignore[arg-type]
            total = total + ((model(**tokens.inputs) - tokens.target.double()) ** 2).sum() / elements(step)
        total.backward()
        gradients = {name: p.grad.clone() for name, p in adapters.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(adapters.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((total.item(), norm.item(), gradients))
    return steps, {name: p.detach().clone() for name, p in adapters.items()}


def shapes(layer: Any, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (rank, layer.in_features), (layer.out_features, rank)


def build(cfg: ParallelConfig, adapters: LoraConfig, optim: OptimConfig) -> tuple[Mesh, Engine]:
    device = torch.device("cpu")
    mesh = meshes.build(cfg.mesh, dist.get_world_size(), device)
    with torch.device("meta"):
        model = build_model(MODEL)
    lora.apply(model, adapters)
    parallelize(model, cfg, mesh, device, fill)
    return mesh, build_engine(model, cfg, optim, mesh)


def whole(name: str, x: Tensor, model: nn.Module, mesh: Mesh) -> Tensor:
    return tensor_parallel.full(name, sharding.full(x.detach()), model, mesh["tensor"]).clone()


def backward(engine: Engine, mesh: Mesh, step: int) -> float:
    """The gradients of a step; its loss."""
    prepare = preparation(mesh)
    total = torch.zeros((), dtype=torch.float64)
    mine = assign(step, mesh.data_rank, mesh.data_degree)
    for index, batch in enumerate(mine):
        share = loss_share(engine.model, prepare(batch, step), elements(step))  # type: ignore[arg-type]
        engine.backward(share, last_microbatch=index == len(mine) - 1)
        total += share.detach()
    total *= mesh["tensor"].rank == 0  # along this axis all hold the same share
    dist.all_reduce(total)
    return total.item()


def on_this_layout(cfg: ParallelConfig, adapters: LoraConfig) -> Found:
    """Runs in every process of the group."""
    mesh, engine = build(cfg, adapters, OptimConfig(kind="sgd", lr=LR, clip_norm=CLIP))
    model, steps = engine.model, list[Step]()
    for step in range(STEPS):
        loss = backward(engine, mesh, step)
        gradients = {n: whole(n, p.grad, model, mesh) for n, p in model.named_parameters() if p.grad is not None}
        steps.append((loss, engine.step(step).item(), gradients))
    for name, parameter in model.named_parameters():
        if not lora.is_adapter(name):
            now = whole(name, parameter, model, mesh)
            before = torch.empty_like(now)
            fill(name, before)
            assert torch.equal(now, before), f"{name} is frozen, and has changed"
    return steps, dict(engine.full_weights())


def compare(found: list[Found], truth: Found) -> None:
    for rank, mine in enumerate(found):
        assert mine[1].keys() == truth[1].keys()
        assert worst_of_steps(mine, truth) <= TOLERANCE, f"rank {rank}"


@pytest.fixture(scope="module")
def truth() -> Found:
    return on_one_process(EVERY)


def test_every_matrix_of_the_reference_gets_a_gradient(truth: Found) -> None:
    """A parity test of gradients that are zero would prove nothing."""
    for name, gradient in truth[0][0][2].items():
        if not name.startswith("cond_in."):  # text to video knows no frame: its input is zero
            assert gradient.abs().max() > 0, name


AXES: dict[str, tuple[int, dict[str, int]]] = {
    "shard2": (2, {}),
    "shard3": (3, {}),
    "replicate2": (2, {"replicate": 2}),
    "ulysses2": (2, {"ulysses": 2}),
    "ring2": (2, {"ring": 2}),
    "tensor2": (2, {"tensor": 2}),
    "tensor4": (4, {"tensor": 4}),
    "shard2-tensor2": (4, {"tensor": 2}),
    "replicate2-ulysses2": (4, {"replicate": 2, "ulysses": 2}),
    "ring2-tensor2": (4, {"ring": 2, "tensor": 2}),
}
QUICK = {("shard3", 3, "full"), ("tensor2", 1, "none"), ("shard2-tensor2", 2, "full")}


def parameters() -> list[Any]:
    return [
        pytest.param(axes, zero, recompute, marks=[] if (axes, zero, recompute) in QUICK else [pytest.mark.slow])
        for axes, zero, recompute in itertools.product(AXES, (0, 1, 2, 3), ("none", "full"))
    ]


def layout(axes: str, zero: Any, recompute: Any = "none") -> tuple[int, ParallelConfig]:
    world, degrees = AXES[axes]
    recomputed = RecomputeConfig(kind=recompute)
    return world, ParallelConfig(zero=zero, mesh=MeshConfig(**degrees), recompute=recomputed, precision=FP64)


@pytest.mark.parametrize(("axes", "zero", "recompute"), parameters())
def test_layout_equals_one_process(truth: Found, axes: str, zero: int, recompute: str) -> None:
    world, cfg = layout(axes, zero, recompute)
    compare(run_distributed(on_this_layout, world, cfg, EVERY, timeout=100), truth)
