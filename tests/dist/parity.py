"""What parity tests compare: some steps of training as a process saw them, and how far two of these are apart."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.distributed.mesh import Mesh
from acceleration.engines import Engine
from acceleration.sharding import fsdp, tensor_parallel
from opensora.utils.rng import torch_generator

TOLERANCE = 1e-10
AVERAGE = "average of "

Step = tuple[float, float, dict[str, Tensor]]  # loss, gradient norm, gradients
Bytes = dict[str, int]  # axis -> bytes that a process sent in a step


@dataclass(frozen=True)
class Outcome:
    """Some steps as one process saw them."""

    steps: list[Step]
    weights: dict[str, Tensor]  # afterwards, whole; a moving average of them under AVERAGE and the name
    traffic: list[tuple[Bytes, Bytes]] = field(default_factory=list)  # (counted, predicted) of every step


def fill(name: str, tensor: Tensor) -> None:
    """Weights that are all alive: the model's own start at zero would hide most of the network."""
    tensor.copy_(torch.randn(tensor.shape, generator=torch_generator("weights", name), dtype=torch.float64) * 0.15)


def measured_steps(
    engine: Engine,
    mesh: Mesh,
    steps: int,
    backward: Callable[[int], Tensor],
    predicted: Callable[[int], Bytes] | None = None,
    *,
    average: bool = False,
) -> Outcome:
    """``steps`` steps on a layout, in every process of the group.

    Args:
        backward: makes the gradients of a step; returns this process's share of its loss.
        predicted: what formulas say that this process sends in a step; None where they know nothing of it.
        average: look at the moving average of the weights, too.
    """
    outcome = Outcome([], {})
    for step in range(steps):
        for axis in mesh.axes.values():
            axis.bytes_sent = 0
        total = backward(step) * (mesh["tensor"].rank == 0)  # along this axis all hold the same share
        dist.all_reduce(total)
        gradients = whole_gradients(engine, mesh)
        norm = engine.step(step)
        outcome.steps.append((total.item(), norm.item(), gradients))
        if predicted is not None:
            outcome.traffic.append((dict(mesh.bytes_sent()), predicted(step)))
    outcome.weights.update(engine.full_weights())
    if average:
        outcome.weights.update((AVERAGE + name, value.clone()) for name, value in engine.full_weights("ema"))
    return outcome


def check_traffic(outcome: Outcome, degrees: Mapping[str, int], where: object) -> None:
    """Bytes that were counted are those of the formulas, and something went along every axis that cuts a sample."""
    cut = [axis for axis in ("ulysses", "ring", "tensor") if degrees.get(axis, 1) > 1]
    for counted, formula in outcome.traffic:
        assert counted == formula, where
        assert all(counted.get(axis) for axis in cut), where


def average_by_hand(
    before: Mapping[str, Tensor], trained: Mapping[str, Tensor], step: int, most: float
) -> dict[str, Tensor]:
    """The moving average after a step, which forgets its start sooner while it is young."""
    kept = min(most, (1 + step) / (10 + step))
    return {name: kept * before[name] + (1 - kept) * weight.detach() for name, weight in trained.items()}


def whole_gradients(engine: Engine, mesh: Mesh) -> dict[str, Tensor]:
    """Of all parameters that have one; looking at them is no part of a step, so that its bytes do not count."""
    counted = {axis.name: axis.bytes_sent for axis in mesh.axes.values()}
    gradients = {
        name: tensor_parallel.full(name, fsdp.full(p.grad), engine.model, mesh["tensor"]).clone()
        for name, p in engine.model.named_parameters()
        if p.grad is not None
    }
    for axis in mesh.axes.values():
        axis.bytes_sent = counted[axis.name]
    return gradients


def relative(found: Any, truth: Any) -> float:
    found, truth = torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(truth, dtype=torch.float64)
    return ((found - truth).abs().max() / truth.abs().max().clamp(min=1e-12)).item()


def errors(found: Outcome, truth: Outcome) -> dict[str, float]:
    """The largest relative errors of everything that is compared, by kind."""
    worst = {"weights": max(relative(found.weights[name], value) for name, value in truth.weights.items())}
    for (loss, norm, gradients), (true_loss, true_norm, true_gradients) in zip(found.steps, truth.steps, strict=True):
        assert gradients.keys() == true_gradients.keys()
        of_step = {
            "loss": relative(loss, true_loss),
            "norm": relative(norm, true_norm),
            "gradients": max(relative(gradients[name], true_gradients[name]) for name in true_gradients),
        }
        worst |= {kind: max(error, worst.get(kind, 0.0)) for kind, error in of_step.items()}
    return worst


def worst_error(found: Outcome, truth: Outcome) -> float:
    """The largest relative error of anything that is compared."""
    return max(errors(found, truth).values())


class Sampled(NamedTuple):
    """What a process made of a call of the pipeline, and what it sent for it over each axis."""

    latents: Tensor
    counted: Bytes
    predicted: Bytes


SamplingCase = tuple[dict[str, int], int, tuple[str, ...]]  # degrees of the mesh, ZeRO, names of calls


def check_sampled(
    cases: list[SamplingCase], results: list[list[dict[str, Sampled]]], truths: dict[str, Tensor]
) -> None:
    """``results``, of every process, for every case, by call, must be ``truths``, and the bytes those of formulas."""
    for rank, found in enumerate(results):
        for case, calls in zip(cases, found, strict=True):
            axes = [axis for axis in case[0] if axis not in ("replicate", "shard")]
            for name, (latents, counted, formula) in calls.items():
                assert latents.dtype == torch.float64
                assert relative(latents, truths[name]) <= TOLERANCE, (case, rank, name)
                assert counted == formula, (case, rank, name)
                assert all(axis in counted for axis in axes), (case, rank, name)
