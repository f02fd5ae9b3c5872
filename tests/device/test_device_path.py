"""Whole runs on a simulated GPU, with each option that a step has there: real numbers, no wait without a reason."""

import pytest
from torch import Tensor

from tests.device.faults import FAULTS
from tests.device.layouts import CASES, GUARD, WAITS, Case
from tests.device.problem import STEPS, Outcome
from tests.device.runs import on_both, unexpected, with_faults
from tests.dist.harness import run_distributed

TIMEOUT = 100


def cases() -> list[object]:
    return [pytest.param(case, id=name, marks=[] if case.quick else pytest.mark.slow) for name, case in CASES.items()]


def check(case: Case, found: Outcome, truth: Outcome) -> None:
    assert unexpected(found.waits) == []
    assert sum(wait.kind == "value" for wait in found.waits if wait.phase in ("step", "sample")) == 0
    reads = [wait for wait in found.waits if wait.phase == "step" and wait.site == GUARD]
    assert len(reads) == STEPS, "the host reads loss and norm together, once an update"
    for ours, true in ((found.losses, truth.losses), (found.norms, truth.norms)):
        assert all(abs(a - b) <= case.near * abs(b) for a, b in zip(ours, true, strict=True)), (ours, true)
    if case.changes.get("optim.kind") == "sgd":  # Adam takes the sign of what is rounding alone
        assert max(relative(found.weights[name], weight) for name, weight in truth.weights.items()) <= case.near
        assert truth.pixels is None or relative(found.pixels, truth.pixels) <= 1e-4
    assert found.pixels is None or found.pixels.isfinite().all()


def relative(found: Tensor | None, truth: Tensor) -> float:
    assert found is not None and found.shape == truth.shape
    return ((found.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1e-9)).item()


@pytest.mark.parametrize("case", cases())
def test_a_run_on_the_device_is_that_on_the_cpu(case: Case) -> None:
    """Steps, checkpoint, another engine that reads it, and samples."""
    for ((found, truth),) in run_distributed(on_both, case.world, [case], timeout=TIMEOUT):
        check(case, found, truth)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_reason_to_wait_is_met() -> None:
    """A reason that nothing needs any more would hide a new fault at the same place."""
    met = set()
    for world in (1, 2):
        chosen = [case for case in CASES.values() if case.world == world]
        for rank in run_distributed(on_both, world, chosen, timeout=500):
            met |= {(wait.phase, wait.site, wait.kind) for found, _ in rank for wait in found.waits}
    assert set(WAITS) <= met, set(WAITS) - met


@pytest.mark.parametrize("of_three", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2))])
def test_every_fault_is_noticed(of_three: int) -> None:
    faults = FAULTS[of_three::3]
    (noticed,) = run_distributed(with_faults, 1, [fault.name for fault in faults], timeout=TIMEOUT)
    passed = [fault.name for fault in faults if not any(fault.says in line for line in noticed[fault.name])]
    assert passed == [], {name: noticed[name] for name in passed}
