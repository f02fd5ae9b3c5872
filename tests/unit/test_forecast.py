"""The planner: operations, memory, layouts that fit, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from acceleration.accounting.comm_volume import step_bytes
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import MeshConfig, OptimConfig, ParallelConfig, PrecisionConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from opensora.cli.forecast import main
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.datasets.buckets.bucket import Bucket
from opensora.datasets.plan.batch_plan import MicroBatch as PlannedBatch
from opensora.datasets.plan.batch_plan import PackedSequence
from opensora.models.mmdit import SIZES
from opensora.planner.checks import Traffic, check_memory
from opensora.planner.devices import DEVICES
from opensora.planner.forecast import Forecaster, micro_batch_of_clip
from opensora.planner.meta_model import structure
from opensora.planner.search import Planner
from opensora.train.setup import has_formulas
from opensora.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
CLIP, NO_DYNAMIC = Bucket("32px", 9, 32, 32, 2), "parallel.mesh.dynamic=false"


@pytest.mark.parametrize("img", [8316, 76032])
def test_operations_of_the_11b_model(img: int) -> None:
    """2 * 6.455e9 N + 4 N^2 * 3072 * 57, and what is outside of the blocks' token streams."""
    forecaster = Forecaster(SIZES["11b"], OptimConfig(), device_type="cuda")
    tokens = 512 + img
    formula = 2 * 6.455e9 * tokens + 4 * tokens**2 * 3072 * 57
    assert forecaster.forward_flops(MicroBatch(samples=1, txt=512, img=img)) == pytest.approx(formula, rel=5e-4)


def test_memory_falls_with_every_process_and_every_stage() -> None:
    forecaster = Forecaster(SIZES["debug"], OptimConfig(ema_decay=0.9), device_type="cuda")

    def total(zero: int, mesh: dict[str, int], world: int) -> int:
        cfg = ParallelConfig(zero=zero, mesh=MeshConfig(**mesh))  # type: ignore[arg-type]
        place = RankLayout(meshes.view(meshes.resolve(cfg.mesh, world)), cfg)
        return forecaster.memory(place, MicroBatch(samples=2, txt=64, img=960)).total

    stages = [total(zero, {}, 4) for zero in (0, 1, 2, 3)]
    assert stages == sorted(stages, reverse=True)
    worlds = [total(3, {"ulysses": n}, n) for n in (1, 2, 4)]
    assert worlds == sorted(worlds, reverse=True) and worlds[2] < 0.4 * worlds[0]


def test_interpolation_is_close_to_running_the_shape() -> None:
    forecaster = Forecaster(
        replace(SIZES["debug"], hidden_size=128, axes_dim=(8, 12, 12)), OptimConfig(), device_type="cuda"
    )
    cases = [({}, None), ({"ulysses": 4}, None), ({"ring": 2, "tensor": 2}, None)]
    cases += [({"ulysses": 4}, degree) for degree in (1, 2, 4)]  # processes that cut a sample
    for kind, degree in cases:
        cfg = ParallelConfig(zero=3, mesh=MeshConfig(**kind))
        place = RankLayout(meshes.view(meshes.resolve(cfg.mesh, 8)), cfg)
        batch = MicroBatch(samples=3, txt=512, img=8316, degree=degree)
        exact, quick = (forecaster.memory(place, batch, exact=exact).total for exact in (True, False))
        assert quick == pytest.approx(exact, rel=0.02)


def config(*overrides: str) -> RunConfig:
    return load_config(RunConfig, ROOT / "configs" / "train" / "demo.yaml", ["data.table=t.csv", *overrides])


def test_layouts_that_fit_are_ranked() -> None:
    cfg = config("data.micro_batches=8")
    best = Planner(cfg, 4, DEVICES["h100"], device_type="cuda").best(5)
    assert len(best) == 5 and [f.step_s for f in best] == sorted(f.step_s for f in best)
    for forecast in best:
        assert forecast.batches * forecast.degrees["shard"] * forecast.degrees["replicate"] == 8


def test_a_world_of_thousands_starts_no_process(capsys: pytest.CaptureFixture[str]) -> None:
    demo = str(ROOT / "configs" / "train" / "demo.yaml")
    assert (
        main(
            [
                demo,
                "--world",
                "4096",
                "--json",
                "--top",
                "3",
                "data.micro_batches=4096",
                "data.buckets={32px: {1: [1.0, 48]}}",
            ]
        )
        == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert plan["own"][0]["peak_gib"] < plan["room_gib"] and len(plan["best"]) == 3
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("gib", "words"),
    [("0.005", "weights, optimizer and gradients alone"), ("0.2", "lower its batch size in data.buckets")],
)
def test_nothing_fits(gib: str, words: str) -> None:
    demo = str(ROOT / "configs" / "train" / "demo.yaml")
    small = "data.buckets={32px: {1: [1.0, 48000]}}"
    with pytest.raises(UserError, match=words):
        main([demo, "--world", "2", "--memory-gib", gib, "--json", "data.table=t.csv", small])


def test_a_run_that_cannot_fit_is_refused() -> None:
    stage1 = load_config(RunConfig, ROOT / "configs" / "train" / "stage1.yaml", [])
    check_memory(stage1, 8, 80 * GIB)
    check_memory(stage1, 2, None)  # unknown: never refused
    with pytest.raises(UserError, match=r"parallel.mesh: a process of 2 needs .* start more processes"):
        check_memory(stage1, 2, 80 * GIB)
    whole = replace(stage1, parallel=replace(stage1.parallel, zero=1))
    check_memory(whole, 32, 80 * GIB)
    with pytest.raises(UserError, match=r"parallel.zero=0: .* set parallel.zero=3"):
        check_memory(replace(stage1, parallel=replace(stage1.parallel, zero=0)), 64, 80 * GIB)


def test_the_bound_is_below_the_forecast() -> None:
    forecaster = Forecaster(SIZES["debug"], OptimConfig(), device_type="cuda")
    for zero in (0, 1, 2, 3):
        cfg = ParallelConfig(zero=zero, precision=PrecisionConfig(compute="fp32"))  # type: ignore[arg-type]
        place = RankLayout(meshes.view({"shard": 4}), cfg)
        assert forecaster.state(place).total <= forecaster.memory(place, MicroBatch(samples=1, txt=1, img=1)).total


def test_what_runs_again_takes_time_and_gives_memory() -> None:
    """Selective keeps attention: between none and full in both."""
    planner = Planner(config("parallel.mesh.ulysses=1"), 1, DEVICES["h100"], device_type="cuda")
    shape = planner.shapes[-1]
    kinds = {"none": {}, "every": {"every": 2}, "selective": {}, "full": {}}
    found = {
        kind: planner.one(replace(planner.cfg.parallel, recompute=RecomputeConfig(kind=kind, **more)), shape)  # type: ignore[arg-type]
        for kind, more in kinds.items()
    }
    seconds = {kind: forecast.step_s for kind, forecast in found.items()}
    memory = {kind: forecast.memory.total for kind, forecast in found.items()}
    assert seconds["none"] < seconds["every"] < seconds["full"]
    assert seconds["none"] < seconds["selective"] < seconds["full"]
    assert memory["none"] > memory["every"] > memory["full"]
    assert memory["none"] > memory["selective"] > memory["full"]


def test_bytes_of_packs_and_of_adapters() -> None:
    """Of a pack all tokens together; of a base that streams the adapters alone are moved by sharding."""
    mesh = meshes.view({"ulysses": 2})
    packs = config("data.tokens_per_sequence=128", "data.balance_group=2", "parallel.mesh.ulysses=2", NO_DYNAMIC)
    pack = PackedSequence((PlannedBatch(Bucket("32px", 1, 32, 32, 4), (1, 2, 3), 0), PlannedBatch(CLIP, (7, 9), 0)))
    assert has_formulas(packs)
    found = Traffic(packs, mesh, lambda step, _: [pack]).of_step(0)
    still, clip = micro_batch_of_clip(packs, 1, (32, 32)), micro_batch_of_clip(packs, 9, (32, 32))
    whole = MicroBatch(samples=1, txt=5 * still.txt, img=3 * still.img + 2 * clip.img, packed=5)
    assert found == step_bytes(structure(packs.model), RankLayout(mesh, packs.parallel), [whole])
    assert not has_formulas(replace(packs, text=replace(packs.text, mask=True)))  # padding is left out
    sent = {}
    for offload in ("none", "blocks"):
        adapted = config("lora.rank=4", f"lora.offload={offload}", "train.init_from=base", "parallel.mesh.ulysses=2")
        assert has_formulas(adapted) == (offload == "none")
        assert not has_formulas(replace(adapted, lora=replace(adapted.lora, targets=("double_blocks.0.*",))))
        sent[offload] = Traffic(adapted, mesh, lambda step, _: [PlannedBatch(CLIP, (7, 9), 0)]).of_step(0)
    assert sent["blocks"]["fsdp"] < 0.2 * sent["none"]["fsdp"]
    assert sent["blocks"]["ulysses"] == sent["none"]["ulysses"]
