"""On a CUDA device the same code computes what it computes on the CPU. Needs no omegaconf, PyAV or diffusers."""

import os

import pytest
import torch
from torch import Tensor

from acceleration.config import MeshConfig, OptimConfig, ParallelConfig, PrecisionConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed import runtime
from acceleration.engines import build_engine
from acceleration.parallelize import parallelize
from opensora.models.families import build_model
from opensora.train.preparation import loss_share
from tests.dist.parity import fill, relative
from tests.dist.problem import MODEL, batches, elements
from tests.dist.test_parity import on_one_process, preparation

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module", autouse=True)
def group():  # type: ignore[no-untyped-def]
    """A group of one over nccl, as a plain ``python scripts/diffusion/train.py`` starts it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    yield runtime.start(60)
    runtime.stop()


def gradients_on_cuda(precision: PrecisionConfig, zero: int, recompute: str) -> tuple[float, dict[str, Tensor]]:
    device = torch.device("cuda", 0)
    cfg = ParallelConfig(
        zero=zero,  # type: ignore[arg-type]
        mesh=MeshConfig(),
        recompute=RecomputeConfig(kind=recompute),  # type: ignore[arg-type]
        precision=precision,
    )
    mesh = meshes.build(cfg.mesh, 1, device)
    with torch.device("meta"):
        model = build_model(MODEL)
    parallelize(model, cfg, mesh, device, fill)
    engine = build_engine(model, cfg, OptimConfig(kind="sgd", lr=0.1), mesh)
    prepare = preparation(mesh, device)
    every = batches(0)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for index, batch in enumerate(every):
        share = loss_share(engine.model, prepare(batch, 0), elements(0))  # type: ignore[arg-type]
        engine.backward(share, last_microbatch=index == len(every) - 1)
        total += share.detach()
    named = engine.model.named_parameters()
    return total.item(), {name: p.grad.full_tensor().double().cpu() for name, p in named if p.grad is not None}  # type: ignore[attr-defined]


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp64", 1e-10), ("fp32", 1e-4)])
def test_gradients_equal_the_cpu(zero: int, recompute: str, dtype: str, tolerance: float) -> None:
    same = PrecisionConfig(compute=dtype, reduce=dtype, master=dtype)  # type: ignore[arg-type]
    (true_loss, _, truth), *_ = on_one_process().steps
    loss, found = gradients_on_cuda(same, zero, recompute)
    assert relative(loss, true_loss) <= tolerance
    assert max(relative(found[name], truth[name]) for name in truth if name != "cond_in.weight") <= tolerance


def test_bf16_is_close() -> None:
    (true_loss, _, _), *_ = on_one_process().steps
    loss, found = gradients_on_cuda(PrecisionConfig(), zero=3, recompute="full")
    assert relative(loss, true_loss) <= 2e-2
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


def weights_after_steps(offload: str) -> dict[str, Tensor]:
    """Three steps of AdamW with an average and a bound on the norm, in fp32."""
    device, fp32 = torch.device("cuda", 0), PrecisionConfig(compute="fp32", reduce="fp32", master="fp32")
    cfg = ParallelConfig(zero=3, precision=fp32, offload=offload, prefetch=1)  # type: ignore[arg-type]
    mesh = meshes.build(cfg.mesh, 1, device)
    with torch.device("meta"):
        model = build_model(MODEL)
    parallelize(model, cfg, mesh, device, fill)
    engine = build_engine(model, cfg, OptimConfig(lr=1e-3, clip_norm=0.3, ema_decay=0.9), mesh)
    prepare = preparation(mesh, device)
    for step in range(3):
        for index, batch in enumerate(batches(step)):
            share = loss_share(engine.model, prepare(batch, step), elements(step))  # type: ignore[arg-type]
            engine.backward(share, last_microbatch=index == len(batches(step)) - 1)
        engine.step(step)
    held = {"optimizer": engine.ema.shadow, "parameters": dict(engine.master_params())}.get(offload, {})  # type: ignore[attr-defined]
    assert all(tensor.device.type == "cpu" for tensor in held.values())
    return dict(engine.full_weights("ema"))


@pytest.mark.parametrize("offload", ["optimizer", "parameters"])
def test_offloaded_steps_equal_those_on_the_device(offload: str) -> None:
    truth, found = weights_after_steps("none"), weights_after_steps(offload)
    assert max(relative(found[name], truth[name]) for name in truth) <= 1e-5
