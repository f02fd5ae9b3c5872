"""Layouts that the planner proposes where ulysses does not divide the heads, and what it says that they cost."""

from dataclasses import replace
from functools import cache
from math import inf

import pytest

from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import MeshConfig, OptimConfig, ParallelConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.models.wan import SIZES
from opensora.planner.devices import DEVICES
from opensora.planner.forecast import EFFICIENCY, Forecaster
from opensora.planner.layout_forecast import Forecast
from opensora.planner.network import Network
from opensora.planner.search import Planner, layouts
from tests.conftest import ROOT

WORLD, H100 = 8, DEVICES["h100"]
STILL, CLIP = "{256px: {1: [1.0, 1]}}", "{480p: {81: [1.0, 1]}}"
LATENCY = 5e-5  # seconds of an exchange, such as preflight measures
UNEVEN, CUT_IN_TWO = {"ulysses": 8}, {"ring": 2, "ulysses": 4}


def config(buckets: str, micro_batches: int = 1) -> RunConfig:
    """Of Wan 1.3B, which has 12 heads, from features."""
    overrides = (f"data.buckets={buckets}", f"data.micro_batches={micro_batches}", "data.features=f", "lora={}")
    return load_config(RunConfig, ROOT / "configs" / "train" / "wan" / "t2v_1_3b.yaml", list(overrides))


@cache
def forecaster() -> Forecaster:
    return Forecaster(SIZES["t2v_1_3b"], OptimConfig(), device_type="cuda")


def place_of(degrees: dict[str, int], kind: str = "none") -> RankLayout:
    cfg = ParallelConfig(zero=3, mesh=MeshConfig(shard=1, **degrees), recompute=RecomputeConfig(kind=kind))  # type: ignore[arg-type]
    return RankLayout(meshes.view(degrees), cfg)


def fastest(cfg: RunConfig, *wanted: dict[str, int], latency: float = 0.0) -> list[Forecast]:
    """Of every one of these layouts, of those that are proposed; memory aside."""
    network = replace(Network.of_device(H100, WORLD), latency_within=latency)
    planner = Planner(cfg, WORLD, H100, device_type="cuda", network=network)
    found: list[Forecast] = []
    for degrees in wanted:
        proposed = [p for p in layouts(cfg, WORLD, H100.per_node) if matches(p, degrees)]
        found.append(min((planner.one(p, planner.shapes[-1], with_memory=False) for p in proposed), key=step_s))
    return found


def matches(parallel: ParallelConfig, degrees: dict[str, int]) -> bool:
    every = meshes.resolve(parallel.mesh, WORLD)
    return {axis: degree for axis, degree in every.items() if degree > 1} == degrees


def step_s(forecast: Forecast) -> float:
    return forecast.step_s


def test_heads_that_are_not_divided_are_proposed_and_none_without_a_head() -> None:
    proposed = [(p.mesh.tensor, p.mesh.ulysses) for p in layouts(config(STILL, 8), WORLD, H100.per_node)]
    assert set(proposed) == {(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)}
    assert {p.mesh.ulysses for p in layouts(config(STILL, 16), 16, 16)} == {1, 2, 4, 8}  # not 16


@pytest.mark.parametrize(
    ("degrees", "heads"), [({"ulysses": 8}, 2), ({"ulysses": 4}, 3), (CUT_IN_TWO, 3), ({"ulysses": 5}, 3)]
)
@pytest.mark.parametrize("kind", ["none", "full"])
def test_the_process_with_most_heads_decides(degrees: dict[str, int], heads: int, kind: str) -> None:
    """Products of tokens are shared evenly, those of attention among all tokens as its heads are; by hand, where bytes
    take no time. Text is read by each process's own queries."""
    img, txt, hidden, inner, depth = 4000, 512, 1536, 8960, 30
    ulysses, ring = degrees["ulysses"], degrees.get("ring", 1)
    among_all = depth * 4 * img**2 * hidden
    layers = 2 * img * (6 * hidden**2 + 2 * hidden * inner) + 2 * txt * 2 * hidden**2
    blocks = depth * (layers + 4 * img * txt * hidden) + among_all
    batch, again = MicroBatch(samples=1, txt=txt, img=img), int(kind == "full")
    whole = 3 * forecaster().forward_flops(batch) + again * blocks
    fair = whole - (3 + again) * among_all
    expected = fair / (ulysses * ring) + (3 + again) * among_all * heads / 12 / ring
    network = Network((ulysses * ring,), inf, inf)
    seconds = forecaster().seconds(place_of(degrees, kind), [batch], replace(H100, host_bandwidth=inf), network)
    assert seconds == pytest.approx(expected / (H100.flops * EFFICIENCY), rel=1e-9)


def test_where_uneven_heads_are_best_and_where_they_are_not() -> None:
    """One sample on eight devices. Of a still attention is little, and what a ring adds is more than to wait for two
    heads of twelve; of a long clip attention is most of the work. With two samples each of them has four devices."""
    uneven, in_two = fastest(config(STILL), UNEVEN, CUT_IN_TWO, latency=LATENCY)
    assert uneven.step_s < in_two.step_s
    uneven, in_two = fastest(config(CLIP), UNEVEN, CUT_IN_TWO, latency=LATENCY)
    assert uneven.step_s > 1.2 * in_two.step_s
    for buckets, most in ((STILL, 1.0), (CLIP, 1.2)):
        uneven, apart = fastest(config(buckets, 2), UNEVEN, {"shard": 2, "ulysses": 4}, latency=LATENCY)
        assert uneven.step_s > most * apart.step_s, buckets


def test_the_planner_itself_chooses() -> None:
    """Among all layouts, where every exchange takes its time."""
    chosen = []
    for buckets in (STILL, CLIP):
        network = replace(Network.of_device(H100, WORLD), latency_within=LATENCY)
        planner = Planner(config(buckets), WORLD, H100, device_type="cuda", network=network)
        chosen.append(planner.best(1)[0].degrees["ulysses"])
    assert chosen[0] == 8 and chosen[1] < 8


def test_sampling_waits_as_well() -> None:
    batch = MicroBatch(samples=1, txt=512, img=4000)
    waits, even = (forecaster().forward_flops(batch, place_of(degrees)) for degrees in (UNEVEN, CUT_IN_TWO))
    assert even == forecaster().forward_flops(batch)
    assert waits - even == 30 * 4 * 4000**2 * 1536 * (8 * 2 - 12) // 12
