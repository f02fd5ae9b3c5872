"""A model that keeps time and space apart computes on any layout what it computes on one process, and sends what the
formulas say: loss, every gradient, the clipping norm and the weights after steps, in fp64."""

from pathlib import Path
from typing import Any

import pytest

from acceleration.config import CompileConfig
from tests.dist.factored import ADAMW, SGD, STEPS, Run, on_one_process, on_these_layouts, train_and_save
from tests.dist.harness import run_distributed
from tests.dist.layouts import RECOMPUTE
from tests.dist.parity import TOLERANCE, Outcome, check_traffic, relative, worst_error

COMPILED = {"compile": CompileConfig(enabled=True, backend="aot_eager")}


def recompute(kind: str) -> dict[str, Any]:
    return {"recompute": RECOMPUTE[kind]}


QUICK = [
    Run(1, {}, 0),
    Run(2, {"ulysses": 2}, 3, recompute("full")),
    Run(2, {"ring": 2}, 2),
    Run(2, {"tensor": 2}, 1, recompute("selective"), ADAMW),
    Run(2, {"ulysses": 2, "dynamic": True}, 2, recompute("first")),
    Run(3, {"ulysses": 3}, 2, recompute("selective")),
    Run(4, {"ulysses": 4}, 3, recompute("every")),
    Run(4, {"ring": 2, "ulysses": 2}, 3, recompute("full"), ADAMW),
]
LORA = [
    Run(2, {"ulysses": 2}, 3, recompute("full"), adapters=True),
    Run(4, {"ring": 2, "ulysses": 2}, 2, adapters=True),
    Run(4, {"ulysses": 2, "tensor": 2}, 3, adapters=True),
    Run(3, {"ulysses": 3, "dynamic": True}, 1, adapters=True),
]
AXES: dict[int, list[dict[str, int]]] = {
    1: [{}],
    2: [{}, {"replicate": 2}, {"ulysses": 2}, {"ring": 2}, {"tensor": 2}, {"ulysses": 2, "dynamic": True}],
    3: [{}, {"ulysses": 3}, {"ring": 3}, {"ulysses": 3, "dynamic": True}],
    4: [
        {},
        {"ulysses": 4},
        {"ring": 4},
        {"tensor": 4},
        {"ring": 2, "ulysses": 2},
        {"ring": 2, "tensor": 2},
        {"ulysses": 2, "tensor": 2},
        {"replicate": 2, "ulysses": 2},
        {"ulysses": 4, "dynamic": True},
        {"ulysses": 2, "tensor": 2, "dynamic": True},
    ],
    6: [{"ulysses": 6}, {"ring": 2, "ulysses": 3}],
    8: [{"ring": 2, "ulysses": 2, "tensor": 2}, {"ulysses": 8}],
}
SLOW = [
    Run(world, mesh, zero, recompute(kind), optim)
    for world, meshes in AXES.items()
    for mesh in meshes
    for zero, kind, optim in (
        (0, "none", ADAMW),
        (1, "full", SGD),
        (2, "offload", SGD),
        (3, "selective", ADAMW),
        (3, "every", SGD),
    )
] + [Run(4, {"ring": 2, "ulysses": 2}, 3, COMPILED | recompute("full")), Run(3, {"ulysses": 3}, 2, COMPILED)]


@pytest.fixture(scope="module")
def truths() -> dict[str, Outcome]:
    found = {optim.kind: on_one_process(optim) for optim in (SGD, ADAMW)}
    return found | {"lora": on_one_process(adapters=True)}


def check(truths: dict[str, Outcome], world: int, runs: list[Run], timeout: float) -> None:
    for rank, found in enumerate(run_distributed(on_these_layouts, world, runs, timeout=timeout)):
        for run, outcome in zip(runs, found, strict=True):
            truth = truths["lora" if run.adapters else run.optim.kind]
            assert worst_error(outcome, truth) <= TOLERANCE, (str(run), rank)
            check_traffic(outcome, run.mesh, (str(run), rank))


@pytest.mark.parametrize("world", sorted({run.world for run in QUICK}))
def test_layouts_equal_one_process(truths: dict[str, Outcome], world: int) -> None:
    check(truths, world, [run for run in QUICK if run.world == world], 100)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", dict.fromkeys(str(run).split("-zero")[0] for run in SLOW))
def test_every_layout_equals_one_process(truths: dict[str, Outcome], name: str) -> None:
    runs = [run for run in SLOW if str(run).split("-zero")[0] == name]
    check(truths, runs[0].world, runs, 500)


@pytest.mark.parametrize(
    "run", [run if run is LORA[0] else pytest.param(run, marks=pytest.mark.slow) for run in LORA], ids=str
)
def test_adapters(truths: dict[str, Outcome], run: Run) -> None:
    check(truths, run.world, [run], 100)


def test_saved_on_one_layout_and_resumed_on_another(tmp_path: Path) -> None:
    """Weights, moments and average after the last step are those of an unbroken run."""
    first, second = Run(3, {"ulysses": 3}, 3, optim=ADAMW), Run(2, {"ring": 2}, 1, optim=ADAMW)
    (truth,) = run_distributed(train_and_save, 1, Run(1, {}, 0, optim=ADAMW), tmp_path / "whole", 0, STEPS + 1)
    run_distributed(train_and_save, 3, first, tmp_path / "moved", 0, 1)
    found = run_distributed(train_and_save, 2, second, tmp_path / "moved", 1, STEPS + 1)[0]
    assert found.keys() == truth.keys()
    assert {name.split(".")[0] for name in truth} == {"model", "optimizer", "ema"}
    assert max(relative(found[name], truth[name]) for name in truth) <= TOLERANCE


def test_every_parameter_gets_a_gradient(truths: dict[str, Outcome]) -> None:
    """A parity test of gradients that are zero would prove nothing."""
    for name, gradient in truths["sgd"].steps[0][2].items():
        assert gradient.abs().max() > 0, name
