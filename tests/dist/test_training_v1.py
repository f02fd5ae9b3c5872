"""Training as in Open-Sora 1.x with the factored model, frames that are given, losses of samples: any layout computes
what one process does, loss and every gradient in fp64 to 1e-10. Formulas and means are written out here."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import Mesh
from opensora.schedulers.base import Objective
from opensora.schedulers.iddpm import IDDPM, IDDPMConfig
from opensora.schedulers.rectified_flow_v1 import RectifiedFlowV1, RectifiedFlowV1Config
from opensora.train.preparation import Preparation, loss_share
from tests.dist.factored import BUCKETS, SGD, Run, assign, batches, build, plain_model
from tests.dist.factored import preparation as for_toy
from tests.dist.harness import run_distributed
from tests.dist.parity import Outcome, measured_steps, worst_error

OBJECTIVES: dict[str, Objective] = {
    "iddpm": IDDPM(IDDPMConfig(rescale_learned_sigmas=True)),
    "flow": RectifiedFlowV1(RectifiedFlowV1Config(sample_method="logit-normal")),
}
SAMPLES = sum(samples for samples, *_ in BUCKETS)


def preparation(mesh: Mesh, kind: str) -> Preparation:
    return replace(for_toy(mesh), objective=OBJECTIVES[kind], reduction="samples")


def loss_by_hand(kind: str, out: Tensor, targets: dict[str, Tensor], t: Tensor) -> Tensor:
    """Of every value (B, T, S, C)."""
    first, v = out.chunk(2, dim=-1)
    exact = {name: target.double() for name, target in targets.items()}
    if kind == "flow":
        return (first - exact["velocity"]) ** 2
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - beta, 0)
    step = t.long()
    assert (step > 0).all()  # the first step has another formula
    b, now, before = beta[step], abar[step], abar[step - 1]
    x0, x = exact["x_start"], exact["x_t"]

    def mean(start: Tensor) -> Tensor:
        return before.sqrt() * b / (1 - now) * start + (1 - b).sqrt() * (1 - before) / (1 - now) * x

    clean = (x - (1 - now).sqrt() * first.detach()) / now.sqrt()
    true = torch.distributions.Normal(mean(x0), (b * (1 - before) / (1 - now)).sqrt().expand_as(x))
    share = (v + 1) / 2
    scale = (0.5 * (share * b.log() + (1 - share) * (b * (1 - before) / (1 - now)).log())).exp()
    bits = torch.distributions.kl_divergence(true, torch.distributions.Normal(mean(clean), scale)) / math.log(2)
    return (first - exact["noise"]) ** 2 + bits


def on_one_process(kind: str) -> Outcome:
    model = plain_model()
    prepare, losses = preparation(meshes.view({}), kind), []
    for batch in batches(0):
        tokens = prepare(batch, 0)  # type: ignore[arg-type]
        every = loss_by_hand(kind, model(**tokens.inputs), tokens.targets, tokens.times)
        known = tokens.inputs["known"]
        losses += [one[~given].mean() for one, given in zip(every, known, strict=True)]
    assert len(losses) == SAMPLES
    loss = torch.stack(losses).mean()
    loss.backward()
    named = dict(model.named_parameters())
    gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    norm = torch.nn.utils.clip_grad_norm_(named.values(), SGD.clip_norm)
    with torch.no_grad():
        weights = {name: p - SGD.lr * p.grad if p.grad is not None else p for name, p in named.items()}
    return Outcome([(loss.item(), norm.item(), gradients)], {name: w.detach() for name, w in weights.items()})


def on_this_layout(run: Run, kind: str) -> Outcome:
    """Runs in every process of the group."""
    mesh, engine = build(run)
    prepare, mine = preparation(mesh, kind), assign(0, mesh)

    def backward(step: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for index, batch in enumerate(mine):
            share = loss_share(engine.model, prepare(batch, step), SAMPLES)  # type: ignore[arg-type]
            engine.backward(share, last_microbatch=index == len(mine) - 1)
            total += share.detach()
        return total

    return measured_steps(engine, mesh, 1, backward)


def on_these_layouts(cases: list[tuple[Run, str]]) -> list[Outcome]:
    return [on_this_layout(run, kind) for run, kind in cases]


def check(world: int, layouts: list[dict[str, int]], kinds: Any = tuple(OBJECTIVES)) -> None:
    cases = [(Run(world, mesh), kind) for mesh in layouts for kind in kinds]
    truths = {kind: on_one_process(kind) for kind in kinds}
    for found in run_distributed(on_these_layouts, world, cases, timeout=300):
        for (run, kind), outcome in zip(cases, found, strict=True):
            assert worst_error(outcome, truths[kind]) <= 1e-10, (str(run), kind)


def test_losses_of_samples_on_two_processes() -> None:
    check(2, [{"ulysses": 2}])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_losses_of_samples_on_other_layouts() -> None:
    check(2, [{"shard": 2}, {"tensor": 2}, {"ring": 2}])
    check(3, [{"ulysses": 3}, {"shard": 3}])
