"""The planner knows every option: whatever configuration is valid has a forecast, and options move it the right way."""

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import OptimConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from opensora.cli.forecast import main
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.models.mmdit import SIZES
from opensora.planner.devices import DEVICES
from opensora.planner.forecast import Forecaster
from opensora.planner.search import Planner, check_own
from opensora.train.validate import planned_clips
from opensora.utils.errors import UserError
from tests.conftest import ROOT

DEMO = ROOT / "configs" / "train" / "demo.yaml"
BASE = [
    *("data.table=t.csv", "data.micro_batches=8", "parallel.mesh.dynamic=false", "parallel.mesh.ulysses=1"),
    *(
        "parallel.recompute.kind=none",
        "model.depth=2",
        "model.depth_single_blocks=3",
        "data.buckets={32px: {9: [1, 32]}}",
    ),
]
CLIP = '{resolution: 32px, aspect_ratio: "1:1", num_frames: 9, cache: {kind: teacache}}'
# Everything that changes memory or time. Values of one key, of which one is drawn.
OPTIONS: dict[str, list[Any]] = {
    "parallel.engine": ["native", "native", "native", "deepspeed", "colossalai"],
    "parallel.zero": [0, 1, 2, 3],
    "parallel.mesh.replicate": [1, 2],
    "parallel.mesh.ulysses": [1, 2],
    "parallel.mesh.ring": [1, 1, 2],
    "parallel.mesh.tensor": [1, 1, 2],
    "parallel.mesh.dynamic": ["false", "false", "true"],
    "parallel.recompute.kind": ["none", "full", "every", "selective"],
    "parallel.recompute.offload": ["false", "true"],
    "parallel.offload": ["none", "optimizer", "parameters"],
    "parallel.prefetch": [0, 2],
    "parallel.compile.enabled": ["false", "true"],
    "parallel.precision.compute": ["bf16", "fp32"],
    "parallel.precision.reduce": ["fp32", "bf16"],
    "lora.rank": [0, 0, 4],
    "lora.offload": ["none", "blocks"],
    "optim.kind": ["adamw", "sgd"],
    "optim.ema_decay": [0, 0.9],
    "data.tokens_per_sequence": [0, 0, 512],
    "conditioning.references": ["{}", "{i2v_head: 1.0, v2v_tail: 1.0}"],
    "model.cond_embed": ["false", "true", "true"],
    "validate": [
        "{}",
        "{every: 5, table: held_out.csv, samples: 3}",
        f"{{every: 5, prompts: [a, b], sampling: {CLIP}}}",
        f"{{every: 5, table: held_out.csv, prompts: [a], sampling: {CLIP}, use_ema: false}}",
    ],
}
WORLDS = (1, 2, 4, 8)


def config(*overrides: str) -> RunConfig:
    return load_config(RunConfig, DEMO, [*BASE, "train.init_from=base", "data.balance_group=2", *overrides])


def forecast(world: int, *overrides: str, device: str = "cuda") -> Any:
    cfg = config(*overrides)
    planner = Planner(cfg, world, DEVICES["rtx4090"], device_type=device, clips=planned_clips(cfg))
    return planner.one(planner.cfg.parallel, planner.shapes[-1])


@cache
def peak(world: int, *overrides: str) -> int:
    return forecast(world, *overrides).peak


def drawn(rng: random.Random) -> tuple[int, list[str]]:
    """A number of processes and overrides; most of the keys stay as they are, so that many are valid."""
    keys = rng.sample(sorted(OPTIONS), rng.randint(3, 9))
    return rng.choice(WORLDS), [f"{key}={rng.choice(OPTIONS[key])}" for key in keys]


def valid(world: int, overrides: list[str]) -> bool:
    try:
        return check_own(config(*overrides), world) is None
    except UserError:
        return False


def fuzz(seed: int, count: int) -> set[str]:
    """Forecast so many valid configurations; the overrides that were among them."""
    rng, seen, done = random.Random(seed), set[str](), 0
    while done < count:
        world, overrides = drawn(rng)
        if not valid(world, overrides):
            continue
        found = forecast(world, *overrides)
        assert 0 < found.memory.total <= found.peak and found.step_s > 0 and found.flops > 0, overrides
        assert found.validation is None or (found.validation.every == 5 and found.validation.seconds > 0), overrides
        assert min(vars(found.memory).values()) >= 0 and min(found.sent.values(), default=0) >= 0, overrides
        seen.update(overrides)
        done += 1
    return seen


def test_any_valid_configuration_has_a_forecast() -> None:
    fuzz(seed=0, count=2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_do() -> None:
    seen = fuzz(seed=1, count=250)
    missing = {f"{key}={value}" for key, values in OPTIONS.items() for value in values} - seen
    assert not missing


LORA = ("lora.rank=4",)
STREAMED = (*LORA, "lora.offload=blocks")
FULL = ("parallel.recompute.kind=full",)
ON_HOST = ("parallel.offload=optimizer",)
# Every pair: the first takes more memory.
MORE: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "adapters": (1, (), LORA),
    "frozen blocks stream": (1, LORA, STREAMED),
    "optimizer on the host": (1, (), ON_HOST),
    "parameters on the host": (1, ON_HOST, ("parallel.offload=parameters",)),
    "recomputation": (1, (), FULL),
    "what recomputed blocks keep": (1, FULL, (*FULL, "parallel.recompute.offload=true")),
    "average": (2, ("optim.ema_decay=0.9",), ("optim.ema_decay=0",)),
    "moments": (2, (), ("optim.kind=sgd",)),
    "prefetch": (2, ("parallel.zero=3", "parallel.prefetch=2"), ("parallel.zero=3",)),
    "packs": (1, ("data.tokens_per_sequence=2048",), ("data.tokens_per_sequence=512",)),
    **{
        f"{engine} zero {zero}": (
            4,
            (f"parallel.engine={engine}", f"parallel.zero={zero}"),
            (f"parallel.engine={engine}", f"parallel.zero={zero + 1}"),
        )
        for engine in ("native", "deepspeed", "colossalai")
        for zero in (1, 2)
        if engine == "native" or zero == 1
    },
}


QUICK = ("adapters", "frozen blocks stream", "parameters on the host")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MORE]
)
def test_what_takes_less_memory(name: str) -> None:
    world, more, less = MORE[name]
    assert peak(world, *more) > peak(world, *less)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed", "colossalai"])
def test_stages_of_other_engines(engine: Any) -> None:
    """Of a model beside which bundles of exchanges are small."""
    forecaster = Forecaster(SIZES["11b"], OptimConfig(ema_decay=0.9), device_type="cuda")

    def total(zero: Any, world: int, **more: Any) -> int:
        place = RankLayout(meshes.view({"shard": world}), ParallelConfig(engine=engine, zero=zero, **more))
        return forecaster.memory(place, MicroBatch(samples=1, txt=512, img=2048), exact=False).total

    stages = [total(zero, 16) for zero in (1, 2, 3)]
    assert stages == sorted(stages, reverse=True)
    for zero in (1, 2, 3):
        assert total(zero, 32) < total(zero, 16) and total(zero, 16, offload="optimizer") < total(zero, 16)


def test_what_takes_time() -> None:
    """Adapters take two thirds of the operations; what passes the bus of a GPU takes time where it is slower."""
    full, adapters = forecast(1), forecast(1, *LORA)
    assert 0.6 * full.flops < adapters.flops < 0.8 * full.flops
    slow = replace(DEVICES["rtx4090"], host_bandwidth=1e3)
    planner = Planner(config(*STREAMED), 1, slow, device_type="cuda")
    assert planner.one(planner.cfg.parallel, planner.shapes[-1]).step_s > 10 * adapters.step_s


def test_references_are_coded_as_well() -> None:
    """By an autoencoder of convolutions, whose clips and stills take time."""
    more = ("model.cond_embed=true", "vae={kind: flux2d}", "model.in_channels=16")
    plain, given = (forecast(1, *more, f"conditioning.references={kinds}") for kinds in ("{}", "{i2v_head: 1.0}"))
    assert given.encode_s == pytest.approx(plain.encode_s * 10 / 9, rel=1e-3)  # one frame more than nine
    assert given.encoding >= plain.encoding and given.memory.total >= plain.memory.total


def test_the_command_knows_them(capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(DEMO), "--world", "1", "--top", "1", *BASE, "data.balance_group=2", "train.init_from=base"]
    assert main([*words, "lora.rank=4", "lora.offload=blocks", "data.tokens_per_sequence=2048"]) == 0
    assert "of state: autoencoder" in capsys.readouterr().out
