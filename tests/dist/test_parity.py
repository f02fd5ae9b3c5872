"""Any layout computes what one process computes: loss, every gradient, the clipping norm, the weights after steps.

The reference is plain torch on one process: no sharding, no wrapper, no engine. Everything is fp64 and the optimizer is
SGD: Adam would hide a gradient that is off by a factor.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.accounting.comm_volume import step_bytes
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import OptimConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import Mesh
from acceleration.engines import build_engine
from acceleration.parallelize import parallelize
from acceleration.sequence import SequenceParallel
from opensora.assembly.encoders import Encoders
from opensora.assembly.token_layout import token_layout
from opensora.conditioning import ConditioningConfig
from opensora.datasets.loading.reader import PackedBatch
from opensora.models.families import build_model
from opensora.planner.meta_model import structure
from opensora.schedulers.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from opensora.train.preparation import Preparation, loss_share
from tests.dist.harness import run_distributed
from tests.dist.layouts import QUICK, Layout, every_layout
from tests.dist.parity import TOLERANCE, Bytes, Outcome, Step, fill, measured_steps, worst_error
from tests.dist.problem import MODEL, TEXT_TOKENS, FakeBatch, FakeText, PassThrough, batches, elements

CPU = torch.device("cpu")
STEPS = 3
LR, CLIP = 0.05, 0.3  # the norm of this problem is above the bound, so clipping acts


def preparation(mesh: Mesh, device: torch.device | str = "cpu") -> Preparation:
    whole = Preparation(
        encoders=Encoders(autoencoder=PassThrough(), text_encoder=FakeText(device), device=torch.device(device)),
        objective=RectifiedFlow(RectifiedFlowConfig()),
        conditioning=ConditioningConfig(),
        model=MODEL,
        layout=token_layout(MODEL, SequenceParallel(mesh)),
        seed=7,
    )
    by_degree = {
        d: replace(whole, layout=token_layout(MODEL, SequenceParallel(mesh.submesh(d)))) for d in mesh.subgroups
    }
    return replace(whole, by_degree=by_degree)


def on_one_process() -> Outcome:
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
            total = total + ((model(**tokens.inputs) - tokens.targets["velocity"].double()) ** 2).sum() / elements(step)
        total.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((total.item(), norm.item(), gradients))
    return Outcome(steps, {name: p.detach().clone() for name, p in model.named_parameters()})


def assign(step: int, rank: int, degree: int) -> list[FakeBatch]:
    """Equally many micro-batches for every data-parallel rank; what is short is filled with weight 0."""
    every = batches(step)
    per_rank = -(-len(every) // degree)
    mine = every[rank::degree]
    return mine + [replace(every[-1], weight=0.0)] * (per_rank - len(mine))


def dealt(step: int, mesh: Mesh) -> list[FakeBatch]:
    """This process's micro-batches, all shared by all that can."""
    return assign(step, mesh.data_rank, mesh.data_degree)


def on_this_layout(cfg: ParallelConfig, dealt: Callable[[int, Mesh], list[FakeBatch]] = dealt) -> Outcome:
    """Runs in every process of the group."""
    mesh = meshes.build(cfg.mesh, dist.get_world_size(), CPU)
    with torch.device("meta"):
        model = build_model(MODEL)
    parallelize(model, cfg, mesh, CPU, fill)
    engine = build_engine(model, cfg, OptimConfig(kind="sgd", lr=LR, clip_norm=CLIP), mesh)
    prepare = preparation(mesh)

    def backward(step: int) -> Tensor:
        mine, total = dealt(step, mesh), torch.zeros((), dtype=torch.float64)
        for index, batch in enumerate(mine):
            share = loss_share(engine.model, prepare(batch, step), elements(step))  # type: ignore[arg-type]
            engine.backward(share, last_microbatch=index == len(mine) - 1)
            total += share.detach()
        return total

    return measured_steps(engine, mesh, STEPS, backward, lambda step: predicted(cfg, mesh, dealt(step, mesh), step))


def predicted(cfg: ParallelConfig, mesh: Mesh, mine: list[Any], step: int) -> Bytes:
    """What the formulas say of a step in which this process has these micro-batches."""
    place = RankLayout(meshes.view({name: mesh[name].degree for name in meshes.AXES}, dist.get_rank()), cfg)
    return step_bytes(structure(MODEL), place, [sizes(batch, step) for batch in mine])


def sizes(batch: FakeBatch | PackedBatch, step: int) -> MicroBatch:
    """As formulas see it."""
    if isinstance(batch, PackedBatch):  # one sequence, without masked text
        img = sum(part.pixels.numel() // MODEL.in_channels for part in batch.parts)  # type: ignore[union-attr]
        tokens = preparation(meshes.view({}))(batch, step)
        return MicroBatch(samples=1, txt=tokens.inputs["txt"].shape[1], img=img)
    img = math.prod(batch.pixels.shape[2:])
    return MicroBatch(samples=len(batch.sample_ids), txt=TEXT_TOKENS, img=img, has_mask=True, degree=batch.degree)


@pytest.fixture(scope="module")
def truth() -> Outcome:
    return on_one_process()


def cases() -> list[Any]:
    return [
        pytest.param(layout, marks=[] if str(layout) in QUICK else [pytest.mark.slow], id=str(layout))
        for layout in every_layout()
    ]


@pytest.mark.parametrize("layout", cases())
def test_layout_equals_one_process(truth: Outcome, layout: Layout) -> None:
    results = run_distributed(on_this_layout, layout.world, layout.config, timeout=100)
    for rank, found in enumerate(results):
        assert worst_error(found, truth) <= TOLERANCE, f"rank {rank}"
        for counted, formula in found.traffic:
            assert counted == formula, f"rank {rank}"


def test_every_parameter_gets_a_gradient(truth: Outcome) -> None:
    """A parity test of gradients that are zero would prove nothing."""
    for name, gradient in truth.steps[0][2].items():
        if name != "cond_in.weight":  # text to video knows no frame: its input is zero, its bias is alive
            assert gradient.abs().max() > 0, name
