"""Wan and HunyuanVideo compute on any layout what they compute on one process, and send what the formulas say: loss,
every gradient, the clipping norm, the weights after steps with SGD and AdamW, their average, and sampled latents."""

from pathlib import Path

import pytest
import torch

from tests.dist.chapters import Run
from tests.dist.compared import check_resumed, check_runs, check_samples, truth
from tests.dist.jobs import JOBS, MODELS, QUICK, axes

SLOW = [run for runs in JOBS.values() for run in runs if run not in QUICK]
PLAIN = [run for run in SLOW if not run.compiled and not run.packed]


@pytest.mark.parametrize("world", sorted({run.world for run in QUICK}))
def test_layouts_equal_one_process(world: int) -> None:
    check_runs([run for run in QUICK if run.world == world], MODELS, 110)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("world", sorted({run.world for run in SLOW}))
def test_every_layout_equals_one_process(model: str, world: int) -> None:
    runs = [run for run in SLOW if (run.model, run.world) == (model, world)]
    check_runs(runs, MODELS, 800) if runs else None


def test_two_processes_sample_as_one() -> None:
    wan = [Run("wan_i2v", 2, axes(tensor=2), 2), Run("wan_5b", 2, axes(ulysses=2), 0)]
    check_samples([*wan, Run("hunyuan", 2, axes(ring=2), 1)], MODELS, 110)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", sorted({run.world for run in PLAIN}))
def test_every_layout_samples_as_one_process(world: int) -> None:
    check_samples([run for run in PLAIN if run.world == world and not run.adapters], MODELS, 800)


@pytest.mark.parametrize("model", ["wan_t2v", pytest.param("hunyuan", marks=pytest.mark.slow)])
def test_saved_on_one_layout_and_resumed_on_another(model: str, tmp_path: Path) -> None:
    """Weights, moments and average after the last step are those of an unbroken run, and so is what is exported."""
    first, second = Run(model, 2, axes(tensor=2), 3, kind="adamw"), Run(model, 3, axes(ulysses=3), 1, kind="adamw")
    whole = check_resumed(MODELS[model], first, second, tmp_path)
    assert {name.split(".")[0] for name in whole} == {"model", "optimizer", "ema", "exported"}


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_gets_a_gradient(model: str) -> None:
    """A parity test of gradients that are zero would prove nothing."""
    outcome = truth(MODELS[model], "sgd")
    gradients = outcome.steps[0][2]
    assert outcome.weights.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
