"""Wan and HunyuanVideo compute on any layout what they compute on one process, and send what the formulas say: loss,
every gradient, the clipping norm, the weights after steps with SGD and AdamW, their average, and sampled latents."""

from functools import cache
from pathlib import Path

import pytest
import torch

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
from tests.dist.jobs import JOBS, MODELS, QUICK, axes
from tests.dist.parity import TOLERANCE, Outcome, relative, worst_error

SLOW = [run for runs in JOBS.values() for run in runs if run not in QUICK]
PLAIN = [run for run in SLOW if not run.compiled and not run.packed]


@cache
def truth(model: str, kind: str, adapters: bool = False) -> Outcome:
    return on_one_process(MODELS[model], ADAMW if kind == "adamw" else SGD, adapters=adapters)


def check(runs: list[Run], timeout: float) -> None:
    for rank, found in enumerate(run_distributed(on_these_layouts, runs[0].world, runs, MODELS, timeout=timeout)):
        for run, outcome in zip(runs, found, strict=True):
            assert worst_error(outcome, truth(run.model, run.kind, run.adapters)) <= TOLERANCE, (str(run), rank)
            for counted, formula in outcome.traffic:
                assert counted == formula, (str(run), rank)
                cut = [axis for axis, _ in run.axes if axis in ("ulysses", "ring", "tensor")]
                assert all(counted.get(axis) for axis in cut), (str(run), rank)


@pytest.mark.parametrize("world", sorted({run.world for run in QUICK}))
def test_layouts_equal_one_process(world: int) -> None:
    check([run for run in QUICK if run.world == world], 110)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("world", sorted({run.world for run in SLOW}))
def test_every_layout_equals_one_process(model: str, world: int) -> None:
    runs = [run for run in SLOW if (run.model, run.world) == (model, world)]
    check(runs, 800) if runs else None


def check_samples(runs: list[Run], timeout: float) -> None:
    for found in run_distributed(sampled_on_these_layouts, runs[0].world, runs, MODELS, timeout=timeout):
        for run, samples in zip(runs, found, strict=True):
            for sample, whole in zip(samples, sampled(MODELS[run.model]), strict=True):
                assert relative(sample, whole) <= TOLERANCE, str(run)


def test_two_processes_sample_as_one() -> None:
    hunyuan = Run("hunyuan", 2, axes(ring=2), 1)
    check_samples([Run("wan_i2v", 2, axes(tensor=2), 2), Run("wan_5b", 2, axes(ulysses=2), 0), hunyuan], 110)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", sorted({run.world for run in PLAIN}))
def test_every_layout_samples_as_one_process(world: int) -> None:
    check_samples([run for run in PLAIN if run.world == world and not run.adapters], 800)


@pytest.mark.parametrize("model", ["wan_t2v", pytest.param("hunyuan", marks=pytest.mark.slow)])
def test_saved_on_one_layout_and_resumed_on_another(model: str, tmp_path: Path) -> None:
    """Weights, moments and average after the last step are those of an unbroken run, and so is what is exported."""
    cfg = MODELS[model]
    first, second = Run(model, 2, axes(tensor=2), 3, kind="adamw"), Run(model, 3, axes(ulysses=3), 1, kind="adamw")
    (whole,) = run_distributed(train_and_save, 1, Run(model, 1, (), 0, kind="adamw"), cfg, tmp_path / "whole", 0, 2)
    run_distributed(train_and_save, 2, first, cfg, tmp_path / "moved", 0, 1)
    found = run_distributed(train_and_save, 3, second, cfg, tmp_path / "moved", 1, 2)[0]
    assert {name.removeprefix("exported.") for name in found if name.startswith("exported.")} == {
        name for name, _ in plain_model(cfg).named_parameters()
    }
    assert found.keys() == whole.keys()
    assert {name.split(".")[0] for name in whole} == {"model", "optimizer", "ema", "exported"}
    assert max(relative(found[name], whole[name]) for name in whole) <= TOLERANCE


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_gets_a_gradient(model: str) -> None:
    """A parity test of gradients that are zero would prove nothing."""
    outcome = truth(model, "sgd")
    gradients = outcome.steps[0][2]
    assert outcome.weights.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
