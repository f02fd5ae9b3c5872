"""DiT, Latte and PixArt compute on any layout what they compute on one process, and send what the formulas say: loss,
every gradient, the clipping norm and the weights after steps, in fp64."""

from pathlib import Path

import pytest
import torch

from tests.dist.chapters import MODELS, Run, plain_model
from tests.dist.compared import check_resumed, check_runs, check_samples, truth

ULYSSES, RING, TENSOR = (("ulysses", 2),), (("ring", 2),), (("tensor", 2),)
QUICK = [
    Run("dit", 2, ULYSSES, 3, "full"),
    Run("dit", 2, TENSOR, 1, "none", "adamw"),
    Run("latte", 2, ULYSSES, 2, "selective"),
    Run("pixart", 2, RING, 3, "none", "adamw"),
    Run("pixart_kv", 2, TENSOR, 2, "full"),
    Run("pixart_ms", 3, (("ulysses", 3),), 1),
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


LORA = [
    Run("pixart", 2, TENSOR, 1, adapters=True),
    Run("latte", 2, ULYSSES, 3, "full", adapters=True),
    Run("dit", 4, (("ring", 2), ("ulysses", 2)), 2, adapters=True),
    Run("pixart_kv", 4, (("tensor", 2),), 3, "selective", adapters=True),
]

COMPILED = [
    Run("dit", 2, RING, 3, "full", compiled=True),
    Run("latte", 2, ULYSSES, 2, compiled=True),
    Run("pixart_qk", 2, TENSOR, 3, "selective", compiled=True),
]


@pytest.mark.parametrize("world", sorted({run.world for run in QUICK}))
def test_layouts_equal_one_process(world: int) -> None:
    check_runs([run for run in QUICK if run.world == world], MODELS, 100)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("world", AXES)
def test_every_layout_equals_one_process(model: str, world: int) -> None:
    runs = [run for run in SLOW if (run.model, run.world) == (model, world)]
    check_runs(runs, MODELS, 800) if runs else None


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("run", [*LORA, *COMPILED], ids=str)
def test_adapters_and_compiled_blocks(run: Run) -> None:
    check_runs([run], MODELS, 800)


def test_two_processes_sample_as_one() -> None:
    check_samples([Run("dit", 2, RING), Run("latte", 2, ULYSSES, 0), Run("pixart_ms", 2, TENSOR, 2)], MODELS, 100)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", AXES)
def test_every_layout_samples_as_one_process(world: int) -> None:
    check_samples([run for run in SLOW if run.world == world], MODELS, 800)


@pytest.mark.parametrize("model", [pytest.param("pixart_frozen", marks=pytest.mark.slow), "dit"])
def test_what_is_not_trained_is_saved_and_exported(model: str, tmp_path: Path) -> None:
    """A run that goes on from a checkpoint on another layout has the null text, and the frozen layers, of that; they
    have no moving average, and an export of the average has them as they are."""
    cfg = MODELS[model]
    first, second = Run(model, 2, ULYSSES, 3, kind="adamw"), Run(model, 2, TENSOR, 1, kind="adamw")
    found = check_resumed(cfg, first, second, tmp_path)
    started = dict(plain_model(cfg).named_parameters())
    frozen = {name for name, parameter in started.items() if not parameter.requires_grad}
    assert frozen and not {f"ema.{name}" for name in frozen} & found.keys()
    for name in frozen:
        for of in ("model", "exported"):
            assert torch.equal(found[f"{of}.{name}"], started[name]), name


@pytest.mark.parametrize("model", MODELS)
def test_every_trained_parameter_gets_a_gradient(model: str) -> None:
    """A parity test of gradients that are zero would prove nothing; the null text is not trained."""
    outcome = truth(MODELS[model], "sgd")
    gradients = outcome.steps[0][2]
    frozen = (".y_embedding", *[".cross_attn."] * (model == "pixart_frozen"))
    assert outcome.weights.keys() - gradients.keys() == {n for n in outcome.weights if any(x in n for x in frozen)}
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
