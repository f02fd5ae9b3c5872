"""Runs in a process of their own: on the simulated device, and on the CPU beside it."""

from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

from tests.device import problem
from tests.device.faults import FAULTS, UNSEEN, Fault
from tests.device.layouts import WAITS, Case
from tests.device.problem import Outcome
from tests.device.simulated import CUDA, Ledger, Wait, simulated_cuda


def on_device(case: Case) -> Outcome:
    """The case on the simulated device."""
    with simulated_cuda() as ledger:
        found = problem.run(problem.config(case.changes), CUDA, ledger.enter, case.sampled)
    found.waits, found.operators = ledger.waits, ledger.operators
    return found


def on_both(cases: list[Case]) -> list[tuple[Outcome, Outcome]]:
    """(on the device, on the CPU) of every case. The device comes first: torch counts devices once."""
    found = [on_device(case) for case in cases]
    truth = [problem.run(problem.config(on_cpu(case)), problem.CPU, lambda phase: None, case.sampled) for case in cases]
    return list(zip(found, truth, strict=True))


def on_cpu(case: Case) -> dict[str, Any]:
    """The case's keys as a CPU can run them: with the plain mathematics in place of a kernel of CUDA."""
    return {key: "math" if value in ("cuda", "cudnn") else value for key, value in case.changes.items()}


def unexpected(waits: list[Wait]) -> list[str]:
    """Waits in steps and in sampling that nobody has given a reason for; what a test asks for itself is left out."""
    odd = [w for w in waits if w.phase in ("step", "sample") and (w.phase, w.site, w.kind) not in WAITS]
    return sorted({f"{w.phase}: {w.site} waits: {w.kind} ({w.operator})" for w in odd if _is_of_the_run(w)})


def _is_of_the_run(wait: Wait) -> bool:
    return not wait.site.startswith("tests/device/problem.py")


def with_faults(names: list[str]) -> dict[str, list[str]]:
    """Fault -> what was noticed: errors, or waits without a reason; nothing where it passed."""
    return {fault.name: _noticed(fault) for fault in (*FAULTS, *UNSEEN) if fault.name in names}


def _noticed(fault: Fault) -> list[str]:
    with simulated_cuda() as ledger, ExitStack() as stack:
        for target, name, make in fault.patches:
            stack.enter_context(mock.patch.object(target, name, make(getattr(target, name))))
        try:
            _short_run(fault, ledger)
        except (RuntimeError, TypeError, NotImplementedError, ValueError) as error:
            return [f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"]
    return unexpected(ledger.waits)


def _short_run(fault: Fault, ledger: Ledger) -> None:
    trainer = problem.build(problem.config(fault.changes), CUDA)
    ledger.enter("step")
    problem.one_step(trainer, 0)
    ledger.enter("sample")
    with torch.no_grad():
        problem.sample(trainer)
    ledger.enter("end")
