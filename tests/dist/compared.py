"""Runs of ``tests/dist/chapters.py`` on layouts, against the same on one process."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.dist.chapters import (
    ADAMW,
    SGD,
    Run,
    on_one_process,
    on_these_layouts,
    plain_model,
    sampled,
    sampled_on_these_layouts,
    train_and_save,
)
from tests.dist.harness import run_distributed
from tests.dist.parity import TOLERANCE, Outcome, check_traffic, relative, worst_error


@cache
def truth(cfg: Any, kind: str, adapters: bool = False) -> Outcome:
    """The run of a model on one process, with an optimizer of this kind."""
    return on_one_process(cfg, ADAMW if kind == "adamw" else SGD, adapters=adapters)


def check_runs(runs: list[Run], models: Mapping[str, Any], timeout: float) -> None:
    """Losses, gradients, norms, weights and averages are those of one process, and bytes those of the formulas.

    Args:
        runs: all of one number of processes.
    """
    for rank, found in enumerate(run_distributed(on_these_layouts, runs[0].world, runs, models, timeout=timeout)):
        for run, outcome in zip(runs, found, strict=True):
            one = truth(models[run.model], run.kind, run.adapters)
            assert worst_error(outcome, one) <= TOLERANCE, (str(run), rank)
            check_traffic(outcome, dict(run.axes), (str(run), rank))


def check_samples(runs: list[Run], models: Mapping[str, Any], timeout: float) -> None:
    """Latents after steps of sampling are those of one process."""
    for found in run_distributed(sampled_on_these_layouts, runs[0].world, runs, models, timeout=timeout):
        for run, samples in zip(runs, found, strict=True):
            for sample, whole in zip(samples, sampled(models[run.model]), strict=True):
                assert relative(sample, whole) <= TOLERANCE, str(run)


def check_resumed(cfg: Any, first: Run, second: Run, folder: Path) -> dict[str, Tensor]:
    """A step on one layout, saved, and a step on another: weights, moments and average are those of two steps on one
    process, and what is exported has the model's names. Returns all of it by ``part.name``."""
    alone = Run(first.model, 1, (), 0, kind=first.kind)
    (whole,) = run_distributed(train_and_save, 1, alone, cfg, folder / "whole", 0, 2)
    run_distributed(train_and_save, first.world, first, cfg, folder / "moved", 0, 1)
    found: dict[str, Tensor] = run_distributed(train_and_save, second.world, second, cfg, folder / "moved", 1, 2)[0]
    exported = {name.removeprefix("exported.") for name in found if name.startswith("exported.")}
    assert exported == {name for name, _ in plain_model(cfg).named_parameters()}
    assert found.keys() == whole.keys()
    assert max(relative(found[name], whole[name]) for name in whole) <= TOLERANCE
    return found
