"""Adapters under any layout are those of one process: loss, every gradient, weights after steps; the base stays.

The reference is plain torch without any of our code for adapters: each adapted layer has a hook that adds its product.
fp64 and SGD, as in test_parity.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from acceleration import lora, protocol
from acceleration.checkpoint import CheckpointManager, tensor_shards
from acceleration.config import LoraConfig, OptimConfig, ParallelConfig, PrecisionConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed.collectives import nbytes
from acceleration.distributed.mesh import REPLICATE, Mesh
from acceleration.engines import Engine, build_engine
from acceleration.parallelize import parallelize
from acceleration.sharding import fsdp, tensor_parallel
from opensora.models.families import build_model
from opensora.models.mmdit import FAMILY
from opensora.train.preparation import loss_share
from tests.dist.harness import run_distributed
from tests.dist.layouts import MESHES, Layout
from tests.dist.parity import TOLERANCE, Outcome, Step, fill, measured_steps, relative, worst_error
from tests.dist.problem import MODEL, batches, elements
from tests.dist.test_parity import CLIP, LR, STEPS, assign, preparation

BLOCKS = LoraConfig(rank=3, alpha=5.0, targets=FAMILY.lora_targets)  # a rank that no number of processes divides
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


def layers(model: nn.Module, cfg: LoraConfig) -> list[str]:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linears if any(protocol.matches(name, pattern) for pattern in cfg.targets)]


def on_one_process(cfg: LoraConfig) -> Outcome:
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
            total = total + ((model(**tokens.inputs) - tokens.targets["velocity"].double()) ** 2).sum() / elements(step)
        total.backward()
        gradients = {name: p.grad.clone() for name, p in adapters.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(adapters.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((total.item(), norm.item(), gradients))
    return Outcome(steps, {name: p.detach().clone() for name, p in adapters.items()})


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
    return tensor_parallel.full(name, fsdp.full(x.detach()), model, mesh["tensor"]).clone()


def backward(engine: Engine, mesh: Mesh, step: int) -> Tensor:
    """The gradients of a step; this process's share of its loss."""
    prepare = preparation(mesh)
    total = torch.zeros((), dtype=torch.float64)
    mine = assign(step, mesh.data_rank, mesh.data_degree)
    for index, batch in enumerate(mine):
        share = loss_share(engine.model, prepare(batch, step), elements(step))  # type: ignore[arg-type]
        engine.backward(share, last_microbatch=index == len(mine) - 1)
        total += share.detach()
    return total


def on_this_layout(cfg: ParallelConfig, adapters: LoraConfig) -> Outcome:
    """Runs in every process of the group."""
    mesh, engine = build(cfg, adapters, OptimConfig(kind="sgd", lr=LR, clip_norm=CLIP))
    outcome = measured_steps(engine, mesh, STEPS, lambda step: backward(engine, mesh, step))
    for name, parameter in engine.model.named_parameters():
        if not lora.is_adapter(name):
            now = whole(name, parameter, engine.model, mesh)
            before = torch.empty_like(now)
            fill(name, before)
            assert torch.equal(now, before), f"{name} is frozen, and has changed"
    return outcome


def compare(found: list[Outcome], truth: Outcome) -> None:
    for rank, mine in enumerate(found):
        assert mine.weights.keys() == truth.weights.keys()
        assert worst_error(mine, truth) <= TOLERANCE, f"rank {rank}"


@pytest.fixture(scope="module")
def truth() -> Outcome:
    return on_one_process(EVERY)


def test_every_matrix_of_the_reference_gets_a_gradient(truth: Outcome) -> None:
    """A parity test of gradients that are zero would prove nothing."""
    for name, gradient in truth.steps[0][2].items():
        if not name.startswith("cond_in."):  # text to video knows no frame: its input is zero
            assert gradient.abs().max() > 0, name


QUICK = {"3-none-zero3-full", "2-tensor2-zero1-none", "4-ulysses2-tensor2-zero2-full"}


def cases() -> list[Any]:
    """One process to four, every mesh of test_parity.py, every ZeRO stage, without and with recomputation."""
    layouts = [
        Layout(world, mesh, zero, kind)
        for world in (1, 2, 3, 4)
        for mesh in MESHES[world]
        for zero in range(4)
        for kind in ("none", "full")
    ]
    assert {str(layout) for layout in layouts} >= QUICK
    marks = {layout: [] if str(layout) in QUICK else [pytest.mark.slow] for layout in map(str, layouts)}
    return [pytest.param(layout, marks=marks[str(layout)], id=str(layout)) for layout in layouts]


@pytest.mark.parametrize("layout", cases())
def test_layout_equals_one_process(truth: Outcome, layout: Layout) -> None:
    compare(run_distributed(on_this_layout, layout.world, layout.config, EVERY, timeout=100), truth)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_base_in_cpu_memory_trains_the_same_adapters(truth: Outcome, world: int) -> None:
    """Blocks are gathered from there one ahead, as docs/parallel.md says for a base that is too large."""
    cfg = replace(Layout(world, {}, 3, "full").config, offload="parameters", prefetch=1)
    compare(run_distributed(on_this_layout, world, cfg, EVERY, timeout=100), truth)


# Which gradients arrive: the first blocks' inputs need none, whole blocks train nothing, one layer does.
@pytest.mark.parametrize(("zero", "recompute"), [(3, "full"), pytest.param(2, "none", marks=pytest.mark.slow)])
def test_blocks_without_adapters_are_passed_by(zero: int, recompute: str) -> None:
    layout = Layout(2, {}, zero, recompute)
    compare(run_distributed(on_this_layout, 2, layout.config, LATE), on_one_process(LATE))


def what_is_kept(cfg: ParallelConfig) -> dict[str, Any]:
    """Bytes and names after a step with AdamW and an average."""
    mesh, engine = build(cfg, BLOCKS, OptimConfig(lr=1e-3, ema_decay=0.9))
    backward(engine, mesh, 0)
    reduced = mesh[REPLICATE].bytes_sent
    graded = {name for name, p in engine.model.named_parameters() if p.grad is not None}
    engine.step(0)
    state = engine.state_dict()
    return {
        "graded": graded,
        "reduced": reduced,
        "adapters": sum(nbytes(p) for name, p in engine.model.named_parameters() if lora.is_adapter(name)),
        "names": {name for name, _ in engine.model.named_parameters() if lora.is_adapter(name)},
        "model": set(state["model"]),
        "ema": set(state["ema"]),
        "optimizer": {key[6:].rpartition(".")[0] for key in state["optimizer"] if key.startswith("state.")},
    }


def test_frozen_weights_have_no_gradient_no_state_and_no_traffic() -> None:
    """Two whole copies: all that they send are the adapters' gradients, which an all-reduce sends once."""
    kept = run_distributed(what_is_kept, 2, Layout(2, {}, 0, "none").config)[0]
    assert kept["reduced"] == kept["adapters"] > 0
    for where in ("graded", "model", "ema", "optimizer"):
        assert kept[where] == kept["names"], where


def in_bf16(cfg: ParallelConfig, frozen: str) -> tuple[dict[str, Tensor], int]:
    """Adapters after two steps, and the bytes of weights held; ``frozen`` is the type that the base is kept in."""
    with mock.patch.object(fsdp, "DTYPES", fsdp.DTYPES | {"bf16": fsdp.DTYPES[frozen]}):
        mesh, engine = build(cfg, BLOCKS, OptimConfig(lr=1e-2))
    for step in range(2):
        backward(engine, mesh, step)
        engine.step(step)
    held = sum(nbytes(fsdp.local(p)) for p in engine.model.parameters())
    return dict(engine.full_weights()), held


def test_frozen_weights_in_compute_type_change_no_number() -> None:
    """The base as fp32 that is cast for every use, and as bf16: the same bit for bit, in little more than half."""
    cfg = replace(Layout(1, {}, 3, "none").config, precision=PrecisionConfig())
    (wide, more), (narrow, less) = (run_distributed(in_bf16, 1, cfg, frozen)[0] for frozen in ("fp32", "bf16"))
    assert all(torch.equal(narrow[name], wide[name]) for name in wide)
    assert all(tensor.dtype == torch.float32 for tensor in narrow.values())
    trained = sum(nbytes(tensor) for tensor in narrow.values())
    assert less - trained == (more - trained) // 2


OPTIM = OptimConfig(lr=1e-2, clip_norm=CLIP, ema_decay=0.9)


def train(engine: Engine, mesh: Mesh, start: int, stop: int) -> dict[str, Tensor]:
    """All state after the updates, as whole tensors."""
    for step in range(start, stop):
        backward(engine, mesh, step)
        engine.step(step)
    state = engine.state_dict()
    flat = {f"{part}.{name}": value for part, values in state.items() for name, value in values.items()}
    return {
        n: tensor_shards.whole(value, mesh["tensor"]).clone()
        for n, value in flat.items()
        if isinstance(value, Tensor | tensor_shards.TensorShards)
    }


def resumed(cfg: ParallelConfig, folder: Path) -> dict[str, Tensor]:
    mesh, engine = build(cfg, BLOCKS, OPTIM)
    state = engine.state_dict()
    CheckpointManager(folder, keep=0).load(folder / "step-00000002", state)
    engine.load_state_dict(state)
    return train(engine, mesh, 2, 4)


def broken_and_whole(cfg: ParallelConfig, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    mesh, engine = build(cfg, BLOCKS, OPTIM)
    train(engine, mesh, 0, 2)
    CheckpointManager(folder, keep=0).save(2, engine.state_dict(), {})
    whole = train(engine, mesh, 2, 4)
    return resumed(cfg, folder), whole


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """Bitwise on the same layout; to rounding on another, out of tensor parallelism."""
    same, truth = run_distributed(broken_and_whole, 2, Layout(2, {"tensor": 2}, 1, "none").config, tmp_path)[0]
    other = run_distributed(resumed, 2, Layout(2, {}, 3, "none").config, tmp_path)[0]
    assert truth.keys() == same.keys() == other.keys()
    for name, value in truth.items():
        assert torch.equal(same[name], value), name
        assert relative(other[name], value) <= TOLERANCE, name


def merged(cfg: ParallelConfig, scale: float) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Whole weights after merging, and the first micro-batch's velocity before and after."""
    mesh, engine = build(cfg, EVERY, OptimConfig(kind="sgd"))
    model = engine.model.requires_grad_(False)
    inputs = preparation(mesh)(batches(0)[0], 0).inputs  # type: ignore[arg-type]
    before = model(**inputs)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    fsdp.merge_adapters(model, scale)
    after = model(**inputs)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    weights = {name: whole(name, p, model, mesh) for name, p in model.named_parameters() if not lora.is_adapter(name)}
    return weights, before, after


@pytest.mark.parametrize(
    "layout",
    [
        Layout(2, {"tensor": 2}, 3, "none"),
        pytest.param(Layout(3, {}, 2, "none"), marks=pytest.mark.slow),
        pytest.param(Layout(4, {"tensor": 2}, 3, "none"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_merged_weights_compute_what_weights_with_adapters_compute(layout: Layout) -> None:
    model = build_model(MODEL).double()
    for weights, before, after in run_distributed(merged, layout.world, layout.config, 1.0):
        assert relative(after, before) <= TOLERANCE
        for name, parameter in model.named_parameters():
            value = torch.empty_like(parameter.detach())
            fill(name, value)
            layer = name.removesuffix(".weight")
            if layer in layers(model, EVERY):
                a, b = (torch.empty(s, dtype=torch.float64) for s in shapes(model.get_submodule(layer), EVERY.rank))
                fill(f"{layer}.lora_A.weight", a)
                fill(f"{layer}.lora_B.weight", b)
                value += 5 / 3 * b @ a
            assert relative(weights[name], value) <= TOLERANCE, name
