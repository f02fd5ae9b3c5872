"""The moving average under any sharding is that of one process, with uneven micro-batches weighted globally."""

from typing import Any

import pytest
import torch
from torch import Tensor

from acceleration.config import OptimConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.engines import build_engine
from acceleration.optim.optimizers import ema_decay_at
from acceleration.parallelize import parallelize
from acceleration.sharding import fsdp
from opensora.models.families import build_model
from tests.dist.harness import run_distributed
from tests.dist.layouts import Layout
from tests.dist.parity import TOLERANCE, fill, relative
from tests.dist.problem import MODEL, batches, elements
from tests.dist.test_lora import backward
from tests.dist.test_parity import CLIP, LR, preparation

STEPS = 5
OPTIM = OptimConfig(kind="sgd", lr=LR, clip_norm=CLIP, ema_decay=0.7)


def on_one_process() -> dict[str, Tensor]:
    """The average of plain torch, by its definition."""
    model = build_model(MODEL).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill(name, parameter)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    prepare = preparation(meshes.view({}))
    for step in range(STEPS):
        for batch in batches(step):
            tokens = prepare(batch, step)  # type: ignore[arg-type]
            (((model(**tokens.inputs) - tokens.targets["velocity"].double()) ** 2).sum() / elements(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.7, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach()
    return average


@pytest.fixture(scope="module")
def truth() -> dict[str, Tensor]:
    return on_one_process()


def on_this_layout(cfg: ParallelConfig) -> tuple[dict[str, Tensor], int]:
    """The whole average, and how many numbers of it this process holds."""
    device = torch.device("cpu")
    mesh = meshes.build(cfg.mesh, torch.distributed.get_world_size(), device)
    with torch.device("meta"):
        model = build_model(MODEL)
    parallelize(model, cfg, mesh, device, fill)
    engine = build_engine(model, cfg, OPTIM, mesh)
    for step in range(STEPS):
        backward(engine, mesh, step)
        engine.step(step)
    held = sum(fsdp.local(average).numel() for average in engine.ema.shadow.values())  # type: ignore[attr-defined]
    return dict(engine.full_weights("ema")), held


def cases() -> list[Any]:
    quick = [Layout(2, {"tensor": 2}, 1, "none"), Layout(3, {}, 3, "none")]
    slow = [
        Layout(1, {}, 0, "none"),
        Layout(2, {"replicate": 2}, 3, "none"),
        Layout(2, {"ulysses": 2}, 2, "full"),
        Layout(2, {}, 0, "none"),
        Layout(4, {"tensor": 2}, 3, "none"),
        Layout(4, {"ring": 2, "tensor": 2}, 2, "none"),
        Layout(4, {"replicate": 2, "ulysses": 2}, 1, "none"),
    ]
    return [pytest.param(layout, id=str(layout)) for layout in quick] + [
        pytest.param(layout, id=str(layout), marks=pytest.mark.slow) for layout in slow
    ]


@pytest.mark.parametrize("layout", cases())
def test_the_average_equals_one_process(truth: dict[str, Tensor], layout: Layout) -> None:
    results = run_distributed(on_this_layout, layout.world, layout.config, timeout=100)
    for average, _ in results:
        assert average.keys() == truth.keys()
        for name, value in truth.items():
            assert relative(average[name], value) <= TOLERANCE, name
    copies = layout.world if layout.zero == 0 else layout.mesh.get("replicate", 1)
    if "tensor" not in layout.mesh:  # what tensor parallelism does not cut is held by all along it
        assert sum(held for _, held in results) == copies * sum(value.numel() for value in truth.values())


def test_weights_move_far_enough_to_tell(truth: dict[str, Tensor]) -> None:
    """An average that had stayed at its start would be off by far more than the tolerance."""
    assert [round(ema_decay_at(step, OPTIM), 3) for step in range(3)] == [0.1, 0.182, 0.25]
    start = {name: torch.empty_like(value) for name, value in truth.items()}
    for name, value in start.items():
        fill(name, value)
        if name != "cond_in.weight":  # text to video knows no frame: its input is zero
            assert relative(value, truth[name]) > 1e3 * TOLERANCE, name
