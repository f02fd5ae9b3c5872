"""STDiT, STDiT2 and STDiT3 compute on any layout what they compute on one process, and send what the formulas say:
loss, every gradient, the clipping norm and the weights after steps, in fp64."""

from functools import cache
from typing import Any

import pytest

from acceleration.config import CompileConfig
from tests.dist.harness import run_distributed
from tests.dist.layouts import RECOMPUTE
from tests.dist.parity import TOLERANCE, Outcome, check_traffic, worst_error
from tests.dist.stdit import ADAMW, MODELS, SGD, Run, on_one_process, on_these_layouts

COMPILED: dict[str, Any] = {"compile": CompileConfig(enabled=True, backend="aot_eager")}


def recompute(kind: str) -> dict[str, Any]:
    return {"recompute": RECOMPUTE[kind]}


QUICK = [
    Run("stdit3", 2, {"ulysses": 2}, 3, recompute("full")),
    Run("windows", 2, {"ulysses": 2}, 2, recompute("selective"), ADAMW),
    Run("windows", 2, {"ring": 2}, 3),
    Run("given", 2, {"ulysses": 2}, 3, recompute("full"), ADAMW),
    Run("stdit", 2, {"tensor": 2}, 1),
]
LORA = [
    Run("stdit", 2, {"ulysses": 2}, 3, recompute("full"), adapters=True),
    Run("stdit3", 4, {"ulysses": 2, "tensor": 2}, 2, adapters=True),
    Run("windows", 2, {"ulysses": 2}, 3, recompute("selective"), adapters=True),
    Run("windows", 4, {"ring": 2, "ulysses": 2}, 1, adapters=True),
]
AXES: dict[int, list[dict[str, int]]] = {
    1: [{}],
    2: [{}, {"replicate": 2}, {"ulysses": 2}, {"ring": 2}, {"tensor": 2}, {"ulysses": 2, "dynamic": True}],
    3: [{"ulysses": 3}, {"ring": 3}],
    4: [
        {"ulysses": 4},
        {"ring": 4},
        {"tensor": 4},
        {"ring": 2, "ulysses": 2},
        {"ulysses": 2, "tensor": 2},
        {"replicate": 2, "ulysses": 2},
        {"ulysses": 4, "dynamic": True},
    ],
    6: [{"ulysses": 6}, {"ring": 2, "ulysses": 3}],
}
_TURNS = [
    (0, recompute("none"), ADAMW),
    (1, recompute("full"), SGD),
    (2, recompute("offload"), SGD),
    (3, recompute("selective"), ADAMW),
    (3, recompute("every"), SGD),
]


def _slow() -> list[Run]:
    """Every model on every mesh; ZeRO stages, recomputation and optimizers in turn."""
    found: list[Run] = []
    for model in ("stdit", "stdit2", "stdit3", "windows", "given"):
        for world, every in AXES.items():
            for mesh in every:
                zero, options, optim = _TURNS[len(found) % len(_TURNS)]
                found.append(Run(model, world, mesh, zero, options, optim))
        found.append(Run(model, 3, {"ulysses": 3}, 2, recompute("first")))
        found.append(Run(model, 2, {"ulysses": 2}, 3, COMPILED | recompute("full")))
        found.append(Run(model, 4, {"ring": 2, "ulysses": 2}, 2, COMPILED))
    found.append(Run("skips", 2, {"ulysses": 2}, 3, recompute("full"), ADAMW))
    return [*found, Run("frozen", 2, {"ulysses": 2}, 3, recompute("full"), ADAMW), Run("frozen", 2, {"tensor": 2}, 1)]


SLOW = _slow()


@cache
def truth(model: str, kind: str, adapters: bool) -> Outcome:
    return on_one_process(MODELS[model], ADAMW if kind == "adamw" else SGD, adapters=adapters)


def check(runs: list[Run], timeout: float) -> None:
    for rank, found in enumerate(run_distributed(on_these_layouts, runs[0].world, runs, timeout=timeout)):
        for run, outcome in zip(runs, found, strict=True):
            expected = truth(run.model, run.optim.kind, run.adapters)
            assert all(gradient.any() for gradient in expected.steps[0][2].values())  # zeros would prove nothing
            assert worst_error(outcome, expected) <= TOLERANCE, (str(run), rank)
            check_traffic(outcome, run.mesh, (str(run), rank))


@pytest.mark.parametrize("world", sorted({run.world for run in QUICK}))
def test_layouts_equal_one_process(world: int) -> None:
    check([run for run in QUICK if run.world == world], 100)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", dict.fromkeys(run.model for run in SLOW))
@pytest.mark.parametrize("world", AXES)
def test_every_layout_equals_one_process(model: str, world: int) -> None:
    runs = [run for run in SLOW if (run.model, run.world) == (model, world)]
    check(runs, 800) if runs else None


@pytest.mark.slow
@pytest.mark.parametrize("run", LORA, ids=str)
def test_adapters(run: Run) -> None:
    check([run], 100)
