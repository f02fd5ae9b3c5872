"""DiT, Latte and PixArt compute on any layout what they compute on one process, and send what the formulas say: loss,
every gradient, the clipping norm and the weights after steps, in fp64."""

from functools import cache

import pytest

from tests.dist.chapters import ADAMW, MODELS, SGD, Run, on_one_process, on_these_layouts
from tests.dist.harness import run_distributed
from tests.dist.parity import TOLERANCE, Outcome, worst_error

ULYSSES, RING, TENSOR = (("ulysses", 2),), (("ring", 2),), (("tensor", 2),)
QUICK = [
    Run("dit", 2, ULYSSES, 3, "full"),
    Run("dit", 2, TENSOR, 1, "none", "adamw"),
    Run("latte", 2, ULYSSES, 2, "selective"),
    Run("latte", 2, TENSOR, 0),
    Run("pixart", 2, RING, 3, "none", "adamw"),
    Run("pixart_ms", 2, ULYSSES, 1),
    Run("pixart_kv", 2, TENSOR, 2, "full"),
    Run("dit_class", 4, (("ring", 2), ("ulysses", 2)), 2),
    Run("latte_class", 4, (("ulysses", 4),), 3, "full", "adamw"),
    Run("pixart_qk", 4, (("ulysses", 2), ("tensor", 2)), 3),
]
AXES: dict[int, list[tuple[tuple[str, int], ...]]] = {
    1: [()],
    2: [(), (("replicate", 2),), ULYSSES, RING, TENSOR],
    3: [(), (("ulysses", 3),), (("ring", 3),)],
    4: [
        (("ulysses", 4),),
        (("ring", 4),),
        (("tensor", 4),),
        (("ring", 2), ("ulysses", 2)),
        (("ring", 2), ("tensor", 2)),
        (("ulysses", 2), ("tensor", 2)),
        (("replicate", 2), ("ulysses", 2)),
    ],
    6: [(("ring", 2), ("ulysses", 3))],
}
_TURNS = [(0, "none", "adamw"), (1, "full", "sgd"), (2, "selective", "sgd"), (3, "every", "adamw"), (3, "full", "sgd")]


def _slow() -> list[Run]:
    """Every model on every mesh that it allows; ZeRO stages, recomputation and optimizers in turn."""
    found = []
    for model in MODELS:
        for world, every in AXES.items():
            for axes in every:
                zero, recompute, kind = _TURNS[len(found) % len(_TURNS)]
                whole = model == "pixart_kv" and {"ulysses", "ring"} & {axis for axis, _ in axes}
                if not whole:
                    found.append(Run(model, world, axes, zero, recompute, kind))
    return found


SLOW = _slow()


@cache
def truth(model: str, kind: str) -> Outcome:
    return on_one_process(MODELS[model], ADAMW if kind == "adamw" else SGD)


def check(runs: list[Run], timeout: float) -> None:
    for rank, found in enumerate(run_distributed(on_these_layouts, runs[0].world, runs, MODELS, timeout=timeout)):
        for run, outcome in zip(runs, found, strict=True):
            assert worst_error(outcome, truth(run.model, run.kind)) <= TOLERANCE, (str(run), rank)
            for counted, formula in outcome.traffic:
                assert counted == formula, (str(run), rank)
                cut = [axis for axis, _ in run.axes if axis in ("ulysses", "ring", "tensor")]
                assert all(counted.get(axis) for axis in cut), (str(run), rank)


@pytest.mark.parametrize("world", sorted({run.world for run in QUICK}))
def test_layouts_equal_one_process(world: int) -> None:
    check([run for run in QUICK if run.world == world], 100)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("world", AXES)
def test_every_layout_equals_one_process(model: str, world: int) -> None:
    runs = [run for run in SLOW if (run.model, run.world) == (model, world)]
    check(runs, 800) if runs else None


@pytest.mark.parametrize("model", MODELS)
def test_every_trained_parameter_gets_a_gradient(model: str) -> None:
    """A parity test of gradients that are zero would prove nothing; the null text is not trained."""
    outcome = truth(model, "sgd")
    gradients = outcome.steps[0][2]
    assert outcome.weights.keys() - gradients.keys() == {n for n in outcome.weights if n.endswith(".y_embedding")}
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
