"""Any layout computes what one process computes: loss, every gradient, the clipping norm, the weights after steps.

The reference is plain torch on one process: no sharding, no wrapper, no engine. Everything is fp64 and the optimizer is
SGD: Adam would hide a gradient that is off by a factor.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from acceleration import mesh as meshes
from acceleration import sharding, tensor_parallel
from acceleration.config import OptimConfig, ParallelConfig
from acceleration.engines import build_engine
from acceleration.mesh import Mesh
from acceleration.parallelize import parallelize
from acceleration.sequence import SequenceParallel
from opensora.models import build_model
from opensora.schedulers.rectified_flow import RectifiedFlowConfig
from opensora.train.step import Preparation, loss_share
from opensora.utils.rng import torch_generator
from tests.dist.harness import run_distributed
from tests.dist.layouts import QUICK, Layout, every_layout
from tests.dist.problem import MODEL, FakeBatch, FakeText, PassThrough, batches, elements

STEPS = 3
LR, CLIP = 0.05, 0.3  # the norm of this problem is above the bound, so clipping acts
TOLERANCE = 1e-10

Step = tuple[float, float, dict[str, Tensor]]  # loss, gradient norm, gradients


def fill(name: str, tensor: Tensor) -> None:
    """Weights that are all alive: the model's own start at zero would hide most of the network."""
    tensor.copy_(torch.randn(tensor.shape, generator=torch_generator("weights", name), dtype=torch.float64) * 0.15)


def preparation(mesh: Mesh, device: torch.device | str = "cpu") -> Preparation:
    return Preparation(
        autoencoder=PassThrough(),
        text_encoder=FakeText(device),
        flow=RectifiedFlowConfig(),
        patch=MODEL.patch_size,
        cond_embed=MODEL.cond_embed,
        guidance_embed=MODEL.guidance_embed,
        sequence=SequenceParallel(mesh),
        seed=7,
        device=torch.device(device),
    )


def on_one_process() -> tuple[list[Step], dict[str, Tensor]]:
    """The truth, in plain torch."""
    model = build_model(MODEL).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill(name, parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    prepare = preparation(meshes.view({}))
    steps: list[Step] = []
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches(step):
            tokens = prepare(batch, step)  # type: ignore[arg-type]
            total = total + ((model(**tokens.inputs) - tokens.target.double()) ** 2).sum() / elements(step)
        total.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((total.item(), norm.item(), gradients))
    return steps, {name: p.detach().clone() for name, p in model.named_parameters()}


def assign(step: int, rank: int, degree: int) -> list[FakeBatch]:
    """Equally many micro-batches for every data-parallel rank; what is short is filled with weight 0."""
    every = batches(step)
    per_rank = -(-len(every) // degree)
    mine = every[rank::degree]
    return mine + [replace(every[-1], weight=0.0)] * (per_rank - len(mine))


def on_this_layout(cfg: ParallelConfig) -> tuple[list[Step], dict[str, Tensor]]:
    """Runs in every process of the group."""
    device = torch.device("cpu")
    mesh = meshes.build(cfg.mesh, dist.get_world_size(), device)
    with torch.device("meta"):
        model = build_model(MODEL)
    parallelize(model, cfg, mesh, device, fill)
    engine = build_engine(model, cfg, OptimConfig(kind="sgd", lr=LR, clip_norm=CLIP), mesh)
    prepare = preparation(mesh)
    steps: list[Step] = []
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        mine = assign(step, mesh.data_rank, mesh.data_degree)
        for index, batch in enumerate(mine):
            share = loss_share(engine.model, prepare(batch, step), elements(step))  # type: ignore[arg-type]
            engine.backward(share, last_microbatch=index == len(mine) - 1)
            total += share.detach()
        total *= mesh["tensor"].rank == 0  # along this axis all hold the same share
        dist.all_reduce(total)
        gradients = {
            name: tensor_parallel.full(name, sharding.full(p.grad), engine.model, mesh["tensor"]).clone()
            for name, p in engine.model.named_parameters()
            if p.grad is not None
        }
        norm = engine.step(step)
        steps.append((total.item(), norm.item(), gradients))
    return steps, dict(engine.full_weights())


def relative(found: Any, truth: Any) -> float:
    found, truth = torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(truth, dtype=torch.float64)
    return ((found - truth).abs().max() / truth.abs().max().clamp(min=1e-12)).item()


def errors(
    found: tuple[list[Step], dict[str, Tensor]], truth: tuple[list[Step], dict[str, Tensor]]
) -> dict[str, float]:
    """The largest relative errors of everything that is compared, by kind."""
    worst = {"weights": max(relative(found[1][name], truth[1][name]) for name in truth[1])}
    for (loss, norm, gradients), (true_loss, true_norm, true_gradients) in zip(found[0], truth[0], strict=True):
        assert gradients.keys() == true_gradients.keys()
        of_step = {
            "loss": relative(loss, true_loss),
            "norm": relative(norm, true_norm),
            "gradients": max(relative(gradients[name], true_gradients[name]) for name in true_gradients),
        }
        worst |= {kind: max(error, worst.get(kind, 0.0)) for kind, error in of_step.items()}
    return worst


def worst_error(found: tuple[list[Step], dict[str, Tensor]], truth: tuple[list[Step], dict[str, Tensor]]) -> float:
    """The largest relative error of anything that is compared."""
    return max(errors(found, truth).values())


@pytest.fixture(scope="module")
def truth() -> tuple[list[Step], dict[str, Tensor]]:
    return on_one_process()


def cases() -> list[Any]:
    return [
        pytest.param(layout, marks=[] if str(layout) in QUICK else [pytest.mark.slow], id=str(layout))
        for layout in every_layout()
    ]


@pytest.mark.parametrize("layout", cases())
def test_layout_equals_one_process(truth: tuple[list[Step], dict[str, Tensor]], layout: Layout) -> None:
    results = run_distributed(on_this_layout, layout.world, layout.config, timeout=100)
    for rank, found in enumerate(results):
        assert worst_error(found, truth) <= TOLERANCE, f"rank {rank}"


def test_every_parameter_gets_a_gradient(truth: tuple[list[Step], dict[str, Tensor]]) -> None:
    """A parity test of gradients that are zero would prove nothing."""
    for name, gradient in truth[0][0][2].items():
        if name != "cond_in.weight":  # text to video knows no frame: its input is zero, its bias is alive
            assert gradient.abs().max() > 0, name
