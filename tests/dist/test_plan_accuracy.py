"""The forecast of peak memory is within 10 % of what a step on gloo processes takes."""

from typing import Any

import pytest

from benchmarks.plan_accuracy import CASES, Case, measure, predict
from opensora.models.dit import DiTConfig
from opensora.models.families import describe
from opensora.models.hunyuan_video import HunyuanVideoConfig
from opensora.models.latte import LatteConfig
from opensora.models.pixart import PixArtConfig, PixArtMSConfig
from opensora.models.stdit import STDiT2Config, STDiT3Config, STDiTConfig
from opensora.models.wan import WanConfig
from tests.dist.harness import run_distributed
from tests.factored_family import ToyConfig

SLOW = [pytest.mark.slow, pytest.mark.timeout(900)]  # of a busy machine
QUICK = {1}  # two processes, ZeRO 2
TOY = ToyConfig(width=256, text_dim=256, depth=3)
_WIDE: dict[str, Any] = {"hidden_size": 288, "num_heads": 6, "caption_channels": 256, "depth": 3}
FAMILY = {
    "dit": DiTConfig(**_WIDE),
    "latte": LatteConfig(**_WIDE | {"depth": 4}),
    "pixart": PixArtConfig(**_WIDE),
    "pixart_ms": PixArtMSConfig(**_WIDE),
    "stdit": STDiTConfig(**_WIDE),
    "stdit2": STDiT2Config(**_WIDE),
    "stdit3": STDiT3Config(**_WIDE),
    "windows": STDiT3Config(**_WIDE, kernel_size=(8, 8, -1), use_spatial_rope=True, cond_embed=True),
}
_WAN: dict[str, Any] = {"hidden_size": 288, "num_heads": 6, "ffn_dim": 1152, "text_dim": 256, "depth": 3}
FAMILY |= {
    "wan": WanConfig(**_WAN),
    "wan_i2v": WanConfig(**_WAN, references="clip", image_dim=128),
    "hunyuan_video": HunyuanVideoConfig(
        hidden_size=288, num_heads=6, axes_dim=(16, 16, 16), depth=2, depth_single_blocks=3, context_in_dim=256,
        vec_in_dim=64,
    ),
}  # fmt: skip
TRIES = 4
FACTORED = [
    Case(model=TOY, zero=2, world=2, img=1024, frames=8),
    Case(model=TOY, zero=3, world=2, mesh={"ulysses": 2}, img=2048, frames=8),
    Case(model=TOY, zero=3, world=3, mesh={"ulysses": 3}, img=2100, frames=7, recompute="full", samples=2),
    Case(model=TOY, zero=2, world=2, mesh={"ring": 2}, img=2048, frames=8, recompute="first", batches=2),
    Case(model=TOY, zero=3, world=2, mesh={"tensor": 2}, img=1024, frames=4),
    Case(model=TOY, zero=1, world=2, mesh={"ulysses": 2}, img=1024, frames=1),
]


def of_family() -> list[Any]:
    """Every model of the family on one and on two processes that share clips in two ways."""
    found = []
    for name, model in FAMILY.items():
        frames = None if describe(model).token_axes == "joint" else 8
        layouts: list[dict[str, Any]] = [
            {"zero": 2, "world": 2},
            {"zero": 3, "world": 2, "mesh": {"ulysses": 2}, "recompute": "full"},
            {"zero": 3, "world": 2, "mesh": {"tensor": 2}},
        ]
        for layout in layouts:
            case = Case(model=model, img=1024, frames=frames, picture=33 if name == "wan_i2v" else 0, **layout)
            found.append(pytest.param(case, id=f"{name} {case}", marks=SLOW))
    return found


def check(case: Case) -> None:
    """The forecast is that of a run in which gathers of weights come in time. On a busy CPU one of two processes is
    late, and what it gathered lies beside what was to be freed before: then the peak is looked at again."""
    for _ in range(TRIES):
        measured = max(run_distributed(measure, case.world, case, timeout=400))
        if predict(case) == pytest.approx(measured, rel=0.1):
            return
        assert case.world > 1 and measured > predict(case), f"{measured} bytes, forecast {predict(case)}"
    pytest.fail(f"{TRIES} times more than forecast: {measured} bytes, forecast {predict(case)}")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=() if i in QUICK else SLOW) for i, case in enumerate(CASES)],
)
def test_peak_is_forecast(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=() if i == 1 else SLOW) for i, case in enumerate(FACTORED)],
)
def test_peak_of_a_factored_model_is_forecast(case: Case) -> None:
    """With blocks that run in turns, each where it is in that order."""
    check(case)


@pytest.mark.parametrize("case", of_family())
def test_peak_of_the_family_is_forecast(case: Case) -> None:
    check(case)
