"""On a CUDA device: activations that wait in pinned memory, kept attention, compiled blocks."""

import pytest
import torch
from torch import Tensor

from acceleration.config import CompileConfig, OptimConfig, ParallelConfig, PrecisionConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from acceleration.engines import build_engine
from acceleration.parallelize import parallelize
from opensora.models.families import build_model
from opensora.train.preparation import loss_share
from tests.dist.layouts import FP64
from tests.dist.parity import fill, relative
from tests.dist.problem import MODEL, batches, elements
from tests.dist.test_parity import preparation
from tests.gpu.test_cuda import group

__all__ = ["group"]  # the fixture of one process over nccl

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
KINDS = [
    RecomputeConfig(kind="selective"),
    RecomputeConfig(kind="full", offload=True),
    RecomputeConfig(kind="every", every=2, offload=True),
    RecomputeConfig(kind="selective", offload=True),
]


def gradients(recompute: RecomputeConfig, precision: PrecisionConfig, compiled: bool = False) -> dict[str, Tensor]:
    device = torch.device("cuda", 0)
    # The fused CUDA kernels know no fp64.
    attention = "math" if precision.compute == "fp64" else "auto"
    cfg = ParallelConfig(
        zero=3,
        attention=attention,  # type: ignore[arg-type]
        recompute=recompute,
        compile=CompileConfig(enabled=compiled),
        precision=precision,
    )
    mesh = meshes.build(cfg.mesh, 1, device)
    with torch.device("meta"):
        model = build_model(MODEL)
    parallelize(model, cfg, mesh, device, fill)
    engine = build_engine(model, cfg, OptimConfig(kind="sgd", lr=0.1), mesh)
    prepare = preparation(mesh, device)
    every = batches(0)
    for index, batch in enumerate(every):
        share = loss_share(engine.model, prepare(batch, 0), elements(0))  # type: ignore[arg-type]
        engine.backward(share, last_microbatch=index == len(every) - 1)
    named = engine.model.named_parameters()
    return {name: p.grad.full_tensor().double().cpu() for name, p in named if p.grad is not None}  # type: ignore[attr-defined]


@pytest.mark.parametrize("recompute", KINDS, ids=str)
def test_kinds_of_recomputation_agree(recompute: RecomputeConfig) -> None:
    truth, found = gradients(RecomputeConfig(), FP64), gradients(recompute, FP64)
    assert max(relative(found[name], truth[name]) for name in truth if name != "cond_in.weight") <= 1e-10


@pytest.mark.parametrize("recompute", [RecomputeConfig(), *KINDS], ids=str)
def test_compiled_blocks_agree(recompute: RecomputeConfig) -> None:
    same = PrecisionConfig(compute="fp32", reduce="fp32", master="fp32")
    truth, found = gradients(RecomputeConfig(), same), gradients(recompute, same, compiled=True)
    assert max(relative(found[name], truth[name]) for name in truth if name != "cond_in.weight") <= 1e-3
