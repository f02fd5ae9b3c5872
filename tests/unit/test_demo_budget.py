"""The demo fills the time it is given on fast and slow machines alike."""

import csv
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


def test_the_demo_begins_with_what_comes_with_the_package(
    budget: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clips of prompts, a still of the model's own, and a clip that goes on from just this still."""
    monkeypatch.setitem(sys.modules, "budget", budget)
    spec = importlib.util.spec_from_file_location("demo", FILE.with_name("demo.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    still = tmp_path / "pretrained/still/image_32px" / f"{module.STILL['name']}.png"
    lines: list[list[str]] = []

    def command(words: list[object]) -> None:
        lines.append([str(word) for word in words])
        folder = next(word.removeprefix("save_dir=") for word in lines[-1] if word.startswith("save_dir="))
        assert Path(folder).is_relative_to(tmp_path)
        if "sampling.num_frames=1" in lines[-1]:
            still.parent.mkdir(parents=True)
            still.touch()

    demo = module.Demo(tmp_path)
    monkeypatch.setattr(demo, "command", command)
    demo.sample_pretrained()
    assert all("configs/sample/shapes.yaml" in line for line in lines) and len(lines) == 3
    assert f"prompt_csv={module.PRETRAINED_PROMPTS}" in lines[0] and (module.ROOT / module.PRETRAINED_PROMPTS).is_file()
    table = tmp_path / "pretrained/i2v.csv"
    assert {"cond_type=i2v_head", f"prompt_csv={table}"} < set(lines[2])
    with table.open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["ref"] == str(still) and {row[name] for name in ("colour", "shape", "direction")} < set(
        row["text"].split()
    )
    assert set(module.STILL["text"].split()) < set(row["text"].split())
    assert demo.pretrained_s > 0
