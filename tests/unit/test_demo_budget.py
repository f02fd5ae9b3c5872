"""The demo fills the time it is given on fast and slow machines alike."""

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).resolve().parents[2] / "launch" / "budget.py"


@pytest.fixture(scope="module")
def budget() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_budget", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_machines_of_all_speeds_end_in_time(budget: ModuleType) -> None:
    draw = random.Random(0)
    for _ in range(500):
        minutes = draw.uniform(4, 60)
        speed = draw.uniform(0.02, 1.5)
        first = budget.Speed(draw.uniform(2, 15), speed * draw.uniform(1, 3))
        second = budget.Speed(draw.uniform(2, 15), speed)
        schedule = budget.lay_out(60 * minutes, first, second)
        assert 0 < schedule.first < schedule.total
        training = schedule.first * first.step_s + (schedule.total - schedule.first) * second.step_s
        took = first.start_s + 2 * second.start_s + budget.SAMPLING_STEPS * second.step_s + training
        assert took <= 60 * minutes or schedule.total == budget.FEWEST_STEPS
        assert took >= 0.9 * 60 * minutes - 15 or schedule.total == budget.FEWEST_STEPS, (took, minutes)


def test_no_time_left_still_trains_a_little(budget: ModuleType) -> None:
    slow = budget.Speed(30.0, 20.0)
    assert budget.lay_out(60, slow, slow).total == budget.FEWEST_STEPS
    assert budget.fits(-5, slow) > 0


def test_speed_is_read_from_the_last_line(budget: ModuleType) -> None:
    speed = budget.measure(lambda: "noise\n" + json.dumps({"step_s": 0.0}) + "\n", steps=5)
    assert speed.step_s == 0.0 and 0 <= speed.start_s < 60
