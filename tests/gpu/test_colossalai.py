"""ColossalAI itself on a GPU (requirements-colossalai.txt). Not run yet."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from acceleration.checkpoint import CheckpointManager
from acceleration.config import OptimConfig, ParallelConfig, PrecisionConfig
from acceleration.distributed import runtime
from acceleration.distributed.mesh import build as build_mesh
from acceleration.engines import build_engine
from acceleration.parallelize import parallelize
from opensora.models.families import build_model
from opensora.train.preparation import loss_share
from tests.dist.parity import fill, relative
from tests.dist.problem import MODEL, batches, elements
from tests.dist.test_parity import CLIP, LR, STEPS, on_one_process, preparation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("colossalai") is None, reason="needs colossalai: requirements-colossalai.txt"),
]


@pytest.fixture(scope="module", autouse=True)
def group():  # type: ignore[no-untyped-def]
    """A group of one over nccl."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    yield runtime.start(60)
    runtime.stop()


def build(zero: Any, compute: Any, optim: OptimConfig) -> tuple[Any, Any]:
    device = torch.device("cuda", 0)
    cfg = ParallelConfig(engine="colossalai", zero=zero, precision=PrecisionConfig(compute=compute))
    mesh = build_mesh(cfg.mesh, 1, device)
    with torch.device("meta"):
        model = build_model(MODEL)
    parallelize(model, cfg, mesh, device, fill)
    return mesh, build_engine(model, cfg, optim, mesh)


@pytest.mark.parametrize(
    ("zero", "compute", "near"),
    [(0, "fp32", 1e-4), (1, "fp32", 1e-4), (2, "fp32", 1e-4), (1, "bf16", 2e-2), (2, "bf16", 2e-2), (3, "bf16", 2e-2)],
)
def test_equals_the_cpu(zero: int, compute: str, near: float) -> None:
    """Loss, norm and weights of three updates, and what a checkpoint would hold. Gemini steps with Adam only."""
    optim = OptimConfig(kind="adamw" if zero == 3 else "sgd", lr=LR, eps=1e-8, clip_norm=CLIP)
    mesh, engine = build(zero, compute, optim)
    prepare = preparation(mesh, "cuda")
    steps, weights = on_one_process()
    for step in range(1 if zero == 3 else STEPS):
        total = torch.zeros((), dtype=torch.float64, device="cuda")
        every = batches(step)
        for index, batch in enumerate(every):
            share = loss_share(engine.model, prepare(batch, step), elements(step))  # type: ignore[arg-type]
            engine.backward(share, last_microbatch=index == len(every) - 1)
            total += share.detach()
        norm = engine.step(step)
        assert relative(total.item(), steps[step][0]) <= near
        assert relative(norm.item(), steps[step][1]) <= near
    if zero < 3:
        found = dict(engine.full_weights())
        assert max(relative(found[name], weights[name]) for name in weights) <= near


@pytest.mark.parametrize(("zero", "compute"), [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "bf16")])
def test_a_checkpoint_comes_back(zero: int, compute: str, tmp_path: Path) -> None:
    optim = OptimConfig(lr=1e-3, eps=1e-8, ema_decay=0.9)
    mesh, engine = build(zero, compute, optim)
    share = loss_share(engine.model, preparation(mesh, "cuda")(batches(0)[0], 0), elements(0))  # type: ignore[arg-type]
    engine.backward(share, last_microbatch=True)
    engine.step(0)
    manager = CheckpointManager(tmp_path, keep=0)
    path = manager.save(1, engine.state_dict(), {})
    saved = {(which, name): w.clone() for which in ("live", "ema") for name, w in engine.full_weights(which)}
    _, other = build(zero, compute, optim)
    state = other.state_dict()
    manager.load(path, state)
    other.load_state_dict(state)
    assert all(torch.equal(w, saved[which, n]) for which in ("live", "ema") for n, w in other.full_weights(which))
