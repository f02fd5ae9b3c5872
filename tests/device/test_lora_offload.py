"""``lora.offload=blocks``: the same losses, gradients and adapters bit for bit, and no more bytes than forecast.

The device is simulated, and every byte that is on it is counted: weights are most of them where clips are short, and
activations take as much where they are long. Attention runs the fused operators of a GPU there, which hold no scores;
root-mean-square norms are several operators, in the measurement as in the forecast.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from acceleration.accounting.rank_layout import RankLayout
from acceleration.config import OptimConfig
from acceleration.distributed import mesh as meshes
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.models import hunyuan_video, wan
from opensora.planner.forecast import Forecaster
from opensora.train.setup import check
from opensora.utils.errors import UserError
from tests.conftest import ROOT
from tests.device.lora import FEW, FP64, LORA, Case, both
from tests.dist.harness import run_distributed

SGD = OptimConfig(kind="sgd", lr=1e-3, clip_norm=0.5)
SLOW = [pytest.mark.slow, pytest.mark.timeout(900)]
QUICK = (1, Case(recompute="full", batches=1))
MORE: list[tuple[int, Case]] = [
    (1, Case(recompute="full")),
    (1, Case()),
    (1, Case(precision=FP64, recompute="selective", optim=SGD)),
    (1, Case(adapters=FEW, optim=SGD)),
    (2, Case(precision=FP64, zero=2, mesh=(("ulysses", 2),))),
    (2, Case(zero=3, recompute="full")),
    (2, Case(zero=1, optim=SGD)),
    (2, Case(adapters=FEW, zero=0, recompute="full")),
    (1, Case(img=150, recompute="full", batches=1)),
    (1, Case(img=150, batches=1)),
    (2, Case(precision=FP64, zero=1, mesh=(("tensor", 2),))),
]
WAN = wan.WanConfig(in_channels=8, hidden_size=96, num_heads=4, depth=4, ffn_dim=288, text_dim=12)
HUNYUAN = hunyuan_video.HunyuanVideoConfig(
    in_channels=8, hidden_size=96, num_heads=4, mlp_ratio=3.0, depth=3, depth_single_blocks=3, depth_refiner_blocks=1,
    axes_dim=(8, 8, 8), context_in_dim=12, vec_in_dim=12,
)  # fmt: skip
OF_WAN = Case(model=WAN, adapters=replace(LORA, targets=wan.FAMILY.lora_targets))
OF_HUNYUAN = Case(model=HUNYUAN, adapters=replace(LORA, targets=hunyuan_video.FAMILY.lora_targets))
WITH_PICTURE = replace(WAN, image_dim=10, references="clip")
OTHER_FAMILIES: list[tuple[int, Case]] = [
    (1, replace(OF_WAN, recompute="full", batches=1)),
    (1, replace(OF_WAN, model=WITH_PICTURE, picture=5)),
    (1, replace(OF_WAN, img=150, recompute="selective")),
    (2, replace(OF_WAN, precision=FP64, zero=2, mesh=(("ulysses", 2),))),
    (2, replace(OF_WAN, precision=FP64, zero=1, mesh=(("tensor", 2),))),
    (1, replace(OF_HUNYUAN, recompute="full")),
    (2, replace(OF_HUNYUAN, precision=FP64, mesh=(("tensor", 2),))),
]


def forecast(case: Case, world: int) -> int:
    """Bytes of the process that needs most."""
    forecaster = Forecaster(case.model, case.optim, device_type="cuda", adapters=case.adapters)
    degrees = meshes.resolve(case.parallel.mesh, world)
    places = (RankLayout(meshes.view(degrees, rank), case.parallel) for rank in range(world))
    return max(forecaster.memory(place, case.batch, batches=case.batches).total for place in places)


DEFAULT = (QUICK, OTHER_FAMILIES[0])
OTHERS = (*MORE, *OTHER_FAMILIES[1:])


@pytest.mark.parametrize(("world", "case"), [*DEFAULT, *(pytest.param(*row, marks=SLOW) for row in OTHERS)], ids=str)
def test_the_same_numbers_and_no_more_bytes_than_forecast(world: int, case: Case) -> None:
    found = run_distributed(both, world, case, 2, timeout=110 if (world, case) in DEFAULT else 800)
    limits = {}
    for way in ("none", "blocks"):
        adapters: Any = replace(case.adapters, offload=way)
        limits[way] = forecast(replace(case, adapters=adapters), world)
        peak = max(one[way].peak for one in found)
        print(f"{world} {case.zero} {case.recompute} {way}: {peak} of {limits[way]} forecast")
        assert 0.95 * limits[way] < peak <= 1.05 * limits[way]
    for one in found:
        plain, streamed = one["none"], one["blocks"]
        assert plain.losses == streamed.losses and plain.gradients
        assert all(map(torch.equal, plain.gradients, streamed.gradients))
        assert all(torch.equal(value, streamed.adapters[name]) for name, value in plain.adapters.items())
        assert streamed.peak < plain.peak and streamed.between < plain.between
    assert limits["blocks"] < limits["none"]


RUN = [ROOT / "configs" / "train" / "lora" / "stage1.yaml", ["lora.offload=blocks"]]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.rank=0"], r"^lora\.offload=blocks: streams frozen weights, and with rank=0 all are trained; use "),
        (["lora.offload=block"], r"^lora\.offload='block': did you mean blocks\?"),
        (["parallel.offload=parameters"], r"^parallel\.offload=parameters: must be none or optimizer with lora\.off"),
        (["parallel.engine=deepspeed"], r"^lora\.rank=32: allowed with parallel\.engine=native only"),
    ],
)
def test_what_does_not_fit_together_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(RunConfig, RUN[0], [*RUN[1], *overrides])


def test_without_a_gpu_it_is_refused() -> None:
    cfg = load_config(RunConfig, RUN[0], RUN[1])
    with pytest.raises(
        UserError, match=r"^lora\.offload=blocks: needs a GPU, and this machine shows none; use lora\.o"
    ):
        check(cfg, 1)
