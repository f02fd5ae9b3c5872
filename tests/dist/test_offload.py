"""What is kept in CPU memory, gathered ahead, or reduced in another type gives the same steps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.checkpoint import CheckpointManager
from acceleration.config import MeshConfig, OptimConfig, ParallelConfig, PrecisionConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from acceleration.engines import build_engine
from acceleration.parallelize import parallelize
from acceleration.sharding import fsdp
from opensora.models.families import build_model
from opensora.train.preparation import loss_share
from tests.dist.harness import run_distributed
from tests.dist.layouts import FP64
from tests.dist.parity import TOLERANCE, Step, fill, worst_error
from tests.dist.problem import MODEL, elements
from tests.dist.test_checkpoint import OPTIM, build, everything, run_steps
from tests.dist.test_parity import assign, on_one_process, on_this_layout, preparation
from tests.dist.toy import Toy

SETTINGS: tuple[dict[str, Any], ...] = (
    {"offload": "optimizer"},
    {"offload": "parameters", "prefetch": 2, "recompute": RecomputeConfig(kind="full")},
)


@pytest.fixture(scope="module")
def truth() -> tuple[list[Step], dict[str, Tensor]]:
    return on_one_process()


def on_these_layouts(layouts: list[ParallelConfig]) -> list[tuple[list[Step], dict[str, Tensor]]]:
    return [on_this_layout(cfg) for cfg in layouts]


@pytest.mark.parametrize(
    ("world", "mesh", "zero"),
    [
        (2, {}, 3),
        pytest.param(2, {"tensor": 2}, 1, marks=pytest.mark.slow),
        pytest.param(4, {"replicate": 2, "ulysses": 2}, 3, marks=pytest.mark.slow),
        pytest.param(4, {"tensor": 2}, 2, marks=pytest.mark.slow),
        pytest.param(3, {}, 2, marks=pytest.mark.slow),
        pytest.param(2, {}, 0, marks=pytest.mark.slow),
    ],
)
def test_every_setting_equals_one_process(
    truth: tuple[list[Step], dict[str, Tensor]], world: int, mesh: dict[str, int], zero: Any
) -> None:
    """SGD, clipped: offload and prefetch change where and when, not what."""
    base = ParallelConfig(zero=zero, mesh=MeshConfig(**mesh), precision=FP64)
    layouts = [replace(base, **setting) for setting in SETTINGS]
    for rank, found in enumerate(run_distributed(on_these_layouts, world, layouts)):
        for setting, result in zip(SETTINGS, found, strict=True):
            assert worst_error(result, truth) <= TOLERANCE, (rank, setting)


def save_and_swap(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Two steps with Adam, a checkpoint, two more; then from the checkpoint again with the other offload."""
    every = {kind: ParallelConfig(zero=2, precision=FP64, offload=kind) for kind in ("none", "optimizer")}  # type: ignore[arg-type]
    states: dict[str, dict[str, Tensor]] = {}
    for kind, cfg in every.items():
        mesh, engine = build(cfg)
        manager = CheckpointManager(folder / kind, keep=0)
        if kind == "optimizer":
            engine.state_dict()  # asked for before the first step, it must not become one
        run_steps(engine, mesh, 0, 2)
        manager.save(2, engine.state_dict(), {})
        run_steps(engine, mesh, 2, 4)
        states[kind] = everything(engine, mesh["tensor"])
    for saved, loaded in (("none", "optimizer"), ("optimizer", "none")):
        mesh, engine = build(every[loaded])
        state = engine.state_dict()
        CheckpointManager(folder / saved, keep=0).load(folder / saved / "step-00000002", state)
        engine.load_state_dict(state)
        run_steps(engine, mesh, 2, 4)
        states[f"{saved} -> {loaded}"] = everything(engine, mesh["tensor"])
    return states


def test_adam_average_and_checkpoints_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    assert OPTIM.kind == "adamw" and OPTIM.ema_decay
    states = run_distributed(save_and_swap, 2, tmp_path)[0]
    wanted = states.pop("none")
    assert {name.split(".")[0] for name in wanted} == {"model", "optimizer", "ema"}
    for way, found in states.items():
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(found[name], value), (way, name)


def gathers_before_each_block(ahead: list[int]) -> list[tuple[list[int], list[int]]]:
    """For every setting of prefetch: all-gathers begun before block i runs, in forward and in backward order."""
    device = torch.device("cpu")
    begun: list[int] = [0]
    original = fsdp._AllGather.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        begun[0] += 1
        return original(self, *args, **kwargs)

    fsdp._AllGather.__call__ = counted  # type: ignore[method-assign]
    found = []
    for count in ahead:
        cfg = ParallelConfig(zero=3, precision=FP64, prefetch=count)
        mesh = meshes.build(cfg.mesh, dist.get_world_size(), device)
        with torch.device("meta"):
            model = Toy(depth=5)
        parallelize(model, cfg, mesh, device, lambda name, tensor: None)
        forward: list[int] = []
        backward: list[int] = []
        for block in model.blocks:
            block.core.register_forward_hook(lambda *_, log=forward: log.append(begun[0]))
            block.core.register_full_backward_hook(lambda *_, log=backward: log.append(begun[0]))
        begun[0] = 0
        out = model(torch.randn(1, 4, 5, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64))
        begun[0] = 0
        out.sum().backward()
        found.append((forward, backward))
    return found


def test_blocks_are_gathered_as_far_ahead_as_asked() -> None:
    (plain, plain_back), (one, one_back), (two, two_back) = run_distributed(gathers_before_each_block, 2, [0, 1, 2])[0]
    assert plain == [2, 3, 4, 5, 6]  # the root, and every block as it comes
    assert one == [3, 4, 5, 6, 6] and two == [4, 5, 6, 6, 6]
    assert plain_back == one_back == [3, 4, 5, 6, 6]  # FSDP2 gathers one ahead in backward by itself
    assert two_back == [4, 5, 6, 6, 6]


def gradients_in(precisions: list[PrecisionConfig]) -> list[dict[str, Tensor]]:
    """Gradients of one step, of weights that bf16 can hold: what differs is how they are reduced."""
    device = torch.device("cpu")
    found = []
    for precision in precisions:
        cfg = ParallelConfig(zero=3, precision=precision)
        mesh = meshes.build(cfg.mesh, dist.get_world_size(), device)
        with torch.device("meta"):
            model = build_model(MODEL)

        def round_(name: str, tensor: Tensor) -> None:
            fill(name, tensor)
            tensor.copy_(tensor.bfloat16())

        parallelize(model, cfg, mesh, device, round_)
        engine = build_engine(model, cfg, OptimConfig(kind="sgd"), mesh)
        prepare = preparation(mesh)
        mine = assign(0, mesh.data_rank, mesh.data_degree)
        for index, batch in enumerate(mine):
            share = loss_share(engine.model, prepare(batch, 0), elements(0))  # type: ignore[arg-type]
            engine.backward(share, last_microbatch=index == len(mine) - 1)
        named = engine.model.named_parameters()
        found.append({name: fsdp.full(p.grad).double().clone() for name, p in named if p.grad is not None})
    return found


def test_reducing_in_fp32_keeps_what_bf16_loses() -> None:
    """Two bf16 gradients summed: in fp32 to 2^-24 of their size, in bf16 to 2^-9 (8 bits of mantissa, rounded)."""
    exact, fp32, bf16 = run_distributed(
        gradients_in,
        2,
        [
            PrecisionConfig(compute="bf16", reduce="fp64", master="fp64"),
            PrecisionConfig(compute="bf16", reduce="fp32", master="fp32"),
            PrecisionConfig(compute="bf16", reduce="bf16", master="fp32"),
        ],
    )[0]

    def error(found: dict[str, Tensor]) -> float:
        difference = sum((found[name] - exact[name]).square().sum() for name in exact)
        return float((difference / sum(value.square().sum() for value in exact.values())) ** 0.5)

    assert error(fp32) <= 2**-23
    assert 2**-12 <= error(bf16) <= 2**-7


def norm_of_uneven_pieces() -> tuple[float, float]:
    """The norm of a sharded tensor as it is, and after the move that offloaded gradients make."""
    devices = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(5 * 3, dtype=torch.float64).view(5, 3) + 1
    placed = torch.distributed.tensor.distribute_tensor(whole, devices, [torch.distributed.tensor.Shard(0)])
    norm = torch.linalg.vector_norm(placed)
    assert torch.equal(fsdp.to_mesh_device(placed).full_tensor(), whole)
    return fsdp.to_mesh_device(norm).full_tensor().item(), torch.linalg.vector_norm(whole).item()


def test_the_norm_survives_the_move_to_the_device() -> None:
    for moved, whole in run_distributed(norm_of_uneven_pieces, 3):
        assert moved == pytest.approx(whole, rel=1e-12)
