"""Limits of tests on machines that do other things too."""

import subprocess

import pytest

from tests import patience as module
from tests.patience import MOST, patience, slowness


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A machine whose measurements the test chooses; ``asked`` counts them."""
    found = {"start_s": 0.3, "load": 0.0, "now": 1000.0, "asked": 0.0}

    def start_s() -> float:
        found["asked"] += 1
        return found["start_s"]

    monkeypatch.setattr(module, "_measured", (-1e9, 1.0))
    monkeypatch.setattr(module, "start_s", start_s)
    monkeypatch.setattr(module.os, "getloadavg", lambda: (found["load"], 0.0, 0.0))
    monkeypatch.setattr(module.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(module.time, "monotonic", lambda: found["now"])
    return found


@pytest.mark.parametrize(
    ("start_s", "load", "times"),
    [
        (0.01, 0.0, 1.0),  # a faster machine has no less
        (0.3, 4.0, 1.0),
        (0.9, 0.0, 3.0),
        (0.9, 20.0, 5.0),  # more processes want to run than a single start shows
        (60.0, 0.0, MOST),
        (0.3, 4000.0, MOST),
    ],
)
def test_a_limit_grows_with_the_machine(machine: dict[str, float], start_s: float, load: float, times: float) -> None:
    machine.update(start_s=start_s, load=load)
    assert patience(60) == pytest.approx(60 * times)


def test_a_measurement_counts_for_a_while_and_not_for_ever(machine: dict[str, float]) -> None:
    assert patience(1) == patience(1) == 1.0 and machine["asked"] == 1
    machine.update(now=machine["now"] + 60, start_s=0.6)
    assert patience(1) == pytest.approx(2.0) and machine["asked"] == 2


def test_a_start_that_hangs_counts_as_the_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_measured", (-1e9, 1.0))
    monkeypatch.setattr(module, "_PROGRAM", ["sleep", "100"])
    monkeypatch.setattr(module, "_REFERENCE_S", 0.05)
    assert slowness() == MOST


def test_a_system_without_a_load_average_is_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> tuple[float, float, float]:
        raise OSError

    monkeypatch.setattr(module.os, "getloadavg", refuse)
    assert module.waiting() == 1.0


def test_the_measurement_is_one_of_this_machine() -> None:
    begun = subprocess.run(module._PROGRAM, capture_output=True, check=False)
    assert begun.returncode == 0 and module.start_s() > 0.0
    assert 1.0 <= slowness() <= MOST
