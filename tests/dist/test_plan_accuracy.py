"""The forecast of peak memory is within 10 % of what a step on gloo processes takes."""

import pytest

from benchmarks.plan_accuracy import CASES, Case, measure, predict
from tests.dist.harness import run_distributed
from tests.factored_family import ToyConfig

SLOW = [pytest.mark.slow, pytest.mark.timeout(900)]  # of a busy machine
QUICK = {1}  # two processes, ZeRO 2
TOY = ToyConfig(width=256, text_dim=256, depth=3)
FACTORED = [
    Case(model=TOY, zero=2, world=2, img=1024, frames=8),
    Case(model=TOY, zero=3, world=2, mesh={"ulysses": 2}, img=2048, frames=8),
    Case(model=TOY, zero=3, world=3, mesh={"ulysses": 3}, img=2100, frames=7, recompute="full", samples=2),
    Case(model=TOY, zero=2, world=2, mesh={"ring": 2}, img=2048, frames=8, recompute="first", batches=2),
    Case(model=TOY, zero=3, world=2, mesh={"tensor": 2}, img=1024, frames=4),
    Case(model=TOY, zero=1, world=2, mesh={"ulysses": 2}, img=1024, frames=1),
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=() if i in QUICK else SLOW) for i, case in enumerate(CASES)],
)
def test_peak_is_forecast(case: Case) -> None:
    measured = max(run_distributed(measure, case.world, case, timeout=400))
    assert predict(case) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=() if i == 1 else SLOW) for i, case in enumerate(FACTORED)],
)
def test_peak_of_a_factored_model_is_forecast(case: Case) -> None:
    """With blocks that run in turns, each where it is in that order."""
    measured = max(run_distributed(measure, case.world, case, timeout=400))
    assert predict(case) == pytest.approx(measured, rel=0.1)
