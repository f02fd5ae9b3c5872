"""The forecast of peak memory is within 10 % of what a step on gloo processes takes."""

import pytest

from benchmarks.plan_accuracy import CASES, Case, measure, predict
from tests.dist.harness import run_distributed

QUICK = {1}  # two processes, ZeRO 2


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=() if i in QUICK else pytest.mark.slow) for i, case in enumerate(CASES)],
)
def test_peak_is_forecast(case: Case) -> None:
    measured = max(run_distributed(measure, case.world, case, timeout=110))
    assert predict(case) == pytest.approx(measured, rel=0.1)
