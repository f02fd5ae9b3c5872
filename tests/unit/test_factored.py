"""A model that keeps time and space apart, without processes: its formulas, what accounting and the planner make of it,
and what they refuse."""

import math
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from acceleration import protocol, sequence
from acceleration.accounting.activation_memory import spread, timeline
from acceleration.accounting.comm_volume import step_bytes
from acceleration.accounting.model_profile import Count
from acceleration.accounting.profiling import profile_of
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.blocks import activation_checkpoint
from acceleration.config import MeshConfig, OptimConfig, ParallelConfig, PrecisionConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from acceleration.sequence import SequenceParallel
from acceleration.sequence.layout import exchanges_axes
from opensora.assembly.layout import check_layout
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.models.families import build_model, count_parameters
from opensora.models.mmdit import SIZES as MMDIT_SIZES
from opensora.planner.checks import Traffic
from opensora.planner.devices import DEVICES
from opensora.planner.forecast import Forecaster
from opensora.planner.meta_model import denoiser_inputs, run_denoiser, structure
from opensora.planner.search import Planner, layouts
from opensora.utils.errors import UserError
from opensora.utils.rng import torch_generator
from tests.factored_family import SINUSOID, ToyConfig, ToyFactored

ROOT = Path(__file__).resolve().parents[2]
TOY = ToyConfig()


def meta(cfg: Any) -> Any:
    with torch.device("meta"):
        return build_model(cfg)


# The toy's formulas once more, with nothing of this project: what layouts are compared with is the right thing.


def by_hand(w: dict[str, Tensor], given: dict[str, Tensor], heads: int, depth: int) -> Tensor:
    width = w["x_in.bias"].shape[0]
    batch, frames, places, _ = given["x"].shape

    def linear(name: str, x: Tensor) -> Tensor:
        out = x @ w[f"{name}.weight"].T
        return out + w[f"{name}.bias"] if f"{name}.bias" in w else out

    def waves(x: Tensor) -> Tensor:
        steps = 10000.0 ** (-torch.arange(SINUSOID // 2, dtype=x.dtype) / (SINUSOID // 2))
        return torch.cat([torch.cos(x[:, None] * steps), torch.sin(x[:, None] * steps)], -1)

    def embedded(name: str, x: Tensor) -> Tensor:
        hidden = linear(f"{name}.in_layer", x)
        return linear(f"{name}.out_layer", hidden * torch.sigmoid(hidden))

    def normed(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def scaled(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name]

    def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """(..., L, H, Dh) over (..., K, H, Dh), one product of numbers at a time as it is written in books."""
        scores = torch.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
        return torch.einsum("...hqk,...khd->...qhd", scores.exp() / scores.exp().sum(-1, keepdim=True), v)

    def turned(x: Tensor, at: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = at[..., None, None] * 100.0 ** (-torch.arange(half, dtype=x.dtype) * 2 / x.shape[-1])
        one, two = x[..., :half], x[..., half:]
        return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)

    more = embedded("fps_in", waves(given["fps"]))
    more = more + embedded("size_in", torch.cat([waves(given["size"][:, 0]), waves(given["size"][:, 1])], -1))
    vectors = [embedded("time_in", waves(1000 * t)) + more for t in (given["timestep"], 0 * given["timestep"])]
    sixes = [linear("time_block.1", v * torch.sigmoid(v)) for v in vectors]
    text = torch.where(given["dropped"][:, None, None], w["null_text"], given["y"])
    text = linear("text_in.2", F.gelu(linear("text_in.0", text), approximate="tanh"))
    mask = given["y_mask"] | given["dropped"][:, None]
    time, row, column = given["positions"].unbind(-1)
    quarter = width // 4
    steps = 100.0 ** (-torch.arange(quarter, dtype=row.dtype) / quarter)
    angles = torch.cat([row[..., None] * steps, column[..., None] * steps], -1)
    x = linear("x_in", given["x"]) + torch.cat([angles.sin(), angles.cos()], -1)

    def rows(table: Tensor, pair: list[Tensor], index: int) -> Tensor:
        noisy, clean = (table[index] + v.view(batch, -1, width)[:, index] for v in pair)
        return torch.where(given["known"][..., None], clean[:, None, None], noisy[:, None, None])

    def split(x: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (heads, -1)) for part in x.split(width, -1)]

    for index in range(depth):
        for kind in ("spatial", "temporal"):
            name = f"{kind}_blocks.{index}"
            shift, scale, gate, shift2, scale2, gate2 = (rows(w[f"{name}.table"], sixes, i) for i in range(6))
            q, k, v = split(linear(f"{name}.attention.qkv", normed(x) * (1 + scale) + shift))
            q, k = (
                scaled(q, f"{name}.attention.norm.query_norm.scale"),
                scaled(k, f"{name}.attention.norm.key_norm.scale"),
            )
            if kind == "spatial":  # (B, T, S, H, Dh): over places
                out = attended(q, k, v)
            else:  # over frames
                q, k, v = (part.transpose(1, 2) for part in (turned(q, time), turned(k, time), v))
                out = attended(q, k, v).transpose(1, 2)
            x = x + gate * linear(f"{name}.attention.proj", out.flatten(-2))
            (q,), (k, v) = split(linear(f"{name}.cross.q", x)), split(linear(f"{name}.cross.kv", text))
            out = attended(q.flatten(1, 2), k, v, mask).reshape(batch, frames, places, width)
            x = x + linear(f"{name}.cross.proj", out)
            hidden = F.gelu(linear(f"{name}.mlp.0", normed(x) * (1 + scale2) + shift2), approximate="tanh")
            x = x + gate2 * linear(f"{name}.mlp.2", hidden)
    shift, scale = (rows(w["final_table"], [v.repeat(1, 2) for v in vectors], i) for i in range(2))
    return linear("final", normed(x) * (1 + scale) + shift)


def test_the_toy_is_its_formulas() -> None:
    model = build_model(TOY).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch_generator(name), dtype=torch.float64) * 0.2)
    generator = torch_generator("inputs")

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    given = {
        "x": draw(2, 5, 7, 16),
        "positions": torch.randint(0, 9, (2, 5, 7, 3), generator=generator).double(),
        "timestep": torch.tensor([0.3, 0.9], dtype=torch.float64),
        "y": draw(2, 6, 12),
        "y_mask": torch.arange(6) < torch.tensor([[2], [6]]),
        "dropped": torch.tensor([True, False]),
        "fps": torch.tensor([8.0, 24.0], dtype=torch.float64),
        "size": torch.tensor([[32.0, 48.0], [16.0, 64.0]], dtype=torch.float64),
        "known": torch.rand(2, 5, 1, generator=generator).expand(2, 5, 7) < 0.4,
    }
    found, wanted = model(**given), by_hand(dict(model.named_parameters()), given, TOY.heads, TOY.depth)
    assert given["known"].any() and found.abs().max() > 0.1
    assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()


# What accounting finds.


def test_the_profile_states_slots_switches_and_order() -> None:
    found = structure(TOY, True)
    assert found.is_factored and not found.cuts_text
    assert found.count == count_parameters(TOY) and found.like == (0, 1, 0, 1)
    once, outside, inside = Count.of({(): 1}), ("frames", "places"), ("frames_inside", "places_inside")
    space, cross = found.blocks[0].attentions
    time, _ = found.blocks[1].attentions
    assert (space.axis, space.batch, space.queries) == ("space", Count.of({inside[0]: 1}), Count.of({inside[1]: 1}))
    assert (time.axis, time.batch, time.queries) == ("time", Count.of({"places": 1}), Count.of({"frames": 1}))
    assert (cross.batch, cross.queries, cross.keys) == (once, Count.of({inside: 1}), Count.of({"txt": 1}))
    assert [slot.is_masked for slot in (space, time, cross)] == [False, False, True]
    switches = [(s.whole, s.values, s.dtype, s.trains, s.reruns) for s in found.blocks[0].switches]
    assert switches == [
        ("space", TOY.width, torch.bfloat16, True, True),
        ("space", 1, torch.bool, False, True),
        ("time", TOY.width, torch.bfloat16, True, False),  # a recomputed block is done before it
    ]
    assert {layer.rows for layer in found.blocks[0].layers} == {Count.of({inside: 1}), Count.of({"txt": 1})}
    assert {layer.rows for layer in found.rest.layers} == {once, Count.of({outside: 1}), Count.of({"txt": 1})}
    assert len(structure(TOY).blocks[0].switches) == 2  # no frame is given, no mask is exchanged


SHAPES = [
    MicroBatch(samples=2, txt=5, img=35, frames=5, has_mask=True),
    MicroBatch(samples=3, txt=9, img=15, frames=1),
    MicroBatch(samples=1, txt=1, img=240, frames=12, has_mask=True),
]


@pytest.mark.parametrize("batch", SHAPES)
def test_operations_are_those_that_torch_counts(batch: MicroBatch) -> None:
    for cfg in (TOY, MMDIT_SIZES["debug"]):
        model = meta(cfg)
        given = batch if cfg is TOY else replace(batch, frames=None)
        with FlopCounterMode(display=False) as counter:
            model(**denoiser_inputs(cfg, given, SequenceParallel(meshes.view({}))))
        assert Forecaster(cfg, OptimConfig(), device_type="cpu").forward_flops(given) == counter.get_total_flops()


LAYOUTS = [
    ({"ulysses": 3}, "none", "bf16"),
    ({"ulysses": 7}, "full", "fp64"),  # more than heads, and than most shapes' frames
    ({"ring": 4, "ulysses": 2, "tensor": 2}, "full", "fp64"),
    ({"ring": 2, "ulysses": 4}, "first", "fp32"),
    ({"tensor": 4}, "every", "bf16"),
    ({"ulysses": 4, "tensor": 4}, "full", "bf16"),  # one head each
]


@pytest.mark.parametrize(("degrees", "kind", "precision"), LAYOUTS)
def test_layouts_of_any_size_count_on_the_meta_device_what_is_predicted(
    degrees: dict[str, int], kind: Any, precision: Any
) -> None:
    """What tests/dist/test_factored.py shows with processes, for as many as one likes."""
    recompute = RecomputeConfig(kind=kind, blocks=3 if kind == "first" else 0)
    types = PrecisionConfig(compute=precision)
    parallel = ParallelConfig(zero=3, mesh=MeshConfig(shard=1, **degrees), recompute=recompute, precision=types)
    world = prod(degrees.values())
    for batch, rank, known in zip(SHAPES, (0, world // 2, world - 1), (True, False, True), strict=True):
        mesh, model = meshes.view(degrees, rank), meta(TOY)
        spread(model, parallel, mesh, "cpu")
        model(**denoiser_inputs(TOY, batch, SequenceParallel(mesh), known=known)).sum().backward()
        place = RankLayout(meshes.view(degrees, rank), parallel)
        predicted, once = (step_bytes(structure(TOY, known), place, batches) for batches in ([batch], []))
        for axis in degrees:
            assert mesh[axis].bytes_sent == predicted.get(axis, 0) - once.get(axis, 0), (axis, batch, rank)


def test_frames_are_exchanged_where_there_are_enough() -> None:
    """The rule: as many frames as processes, or too few heads to do it the other way."""
    assert [exchanges_axes(frames, 4, 3) for frames in (1, 2, 3, 4, 30)] == [False, False, True, True, True]
    assert exchanges_axes(1, 2, 3) and not exchanges_axes(1, 3, 3)
    assert not exchanges_axes(30, 4, 1)
    context = SequenceParallel(meshes.view({"ulysses": 4, "tensor": 2})).factored_context(3, 10, 4)
    assert context is not None and context.switches  # two heads are left of four


class Positions(nn.Module):
    """Hands a switch what is kept exact, and attention the last word of its block."""

    block_lists = ("blocks",)
    attention_cores = {"blocks.*.core": "space"}  # noqa: RUF012
    axis_switches = {"blocks.*.to_space": "space", "blocks.*.to_time": "time"}  # noqa: RUF012
    tensor_shared = ()

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_space, self.to_time, self.core = (sequence_identity() for _ in range(3))
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, positions: Tensor, context: Any) -> Tensor:
            x, positions = self.to_space(x, context), self.to_space(positions, context)
            h = (self.linear(x) + positions.to(x)).flatten(0, 1).unflatten(-1, (2, 2))
            return self.to_time(self.core(h, h, h, context=context).flatten(2).unflatten(0, x.shape[:2]), context)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Positions.Block() for _ in range(2))

    def forward(self, x: Tensor, positions: Tensor, context: Any) -> Tensor:
        x = x.to(self.blocks[0].linear.weight)
        for block in self.blocks:
            x = block(x, positions, context)
        return x

    def tensor_plan(self) -> dict[str, Any]:
        return {}

    def init_parameter_(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """None are drawn."""


def sequence_identity() -> nn.Module:
    class Identity(nn.Module):
        def forward(self, x: Tensor, *rest: Any, context: Any = None) -> Tensor:
            return x

    return Identity()


def run_positions(model: nn.Module, *, txt: int, frames: int, places: int) -> Tensor:
    x = torch.zeros(1, frames, places, 4, device="meta", requires_grad=True)
    return model(x, torch.zeros(1, frames, places, 4, device="meta"), None)


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp64"])
def test_what_is_kept_exact_is_counted_as_such(precision: Any) -> None:
    with torch.device("meta"):
        found = profile_of(Positions(), run_positions)
    assert [s.dtype for s in found.blocks[0].switches] == [torch.bfloat16, torch.float32, torch.bfloat16]
    parallel = ParallelConfig(zero=0, mesh=MeshConfig(shard=1, ulysses=2), precision=PrecisionConfig(compute=precision))
    mesh, batch = meshes.view({"ulysses": 2}), MicroBatch(samples=1, txt=0, img=35, frames=5)
    with torch.device("meta"):
        model = Positions()
    spread(model, parallel, mesh, "cpu")
    context, dtype = (
        SequenceParallel(mesh).factored_context(5, 7, 2),
        getattr(torch, {"bf16": "bfloat16"}.get(precision, f"float{precision[2:]}")),
    )
    exact = torch.promote_types(dtype, torch.float32)
    x = torch.zeros(1, 5, 4, 4, device="meta", dtype=dtype, requires_grad=True)
    model(x, torch.zeros(1, 5, 4, 4, device="meta", dtype=exact), context).sum().backward()
    assert mesh["ulysses"].bytes_sent == step_bytes(found, RankLayout(mesh, parallel), [batch])["ulysses"]


# What is refused.


class Backwards(ToyFactored):
    """States its lists one after the other, and runs them in turns."""

    block_lists = ("spatial_blocks", "temporal_blocks")  # type: ignore[assignment]


def test_an_order_that_is_not_the_stated_one_is_refused() -> None:
    with torch.device("meta"):
        model = Backwards(TOY)
    with pytest.raises(ValueError, match=r"Backwards.block_lists: blocks must run once each, in the order"):
        profile_of(model, run_denoiser)
    mesh = SequenceParallel(meshes.view({}))
    with pytest.raises(AssertionError, match="another order"):
        timeline(model, lambda: model(**denoiser_inputs(TOY, SHAPES[0], mesh)).sum())


class Squares(ToyFactored):
    """A layer runs over every pair of places."""

    def forward(self, x: Tensor, *args: Any, **inputs: Any) -> Tensor:
        self.x_in(x[:, :, :, None].expand(-1, -1, -1, x.shape[2], -1))
        return super().forward(x, *args, **inputs)


def test_counts_that_are_no_polynomial_are_refused() -> None:
    with torch.device("meta"):
        model = Squares(TOY)
    with pytest.raises(ValueError, match=r"Linear: its calls are no polynomial"):
        profile_of(model, run_denoiser)


def test_slots_that_would_attend_to_a_part_are_refused() -> None:
    mesh = meshes.view({"ulysses": 2})
    for change, words in (
        ({"axis_switches": {}}, "axis_switches: attention along space needs a switch"),
        ({"axis_switches": {"spatial_blocks.*.to_space": "space"}}, "needs a switch to space and one to time"),
        ({"axis_switches": {"spatial_blocks.*.to_space": "place"}}, "must be space or time"),
        (
            {"attention_cores": {"spatial_blocks.*.attention.core": "height"}},
            "must be one of joint, space, time, window, cross",
        ),
    ):
        model = meta(TOY)
        for name, value in change.items():
            setattr(model, name, value)
        with pytest.raises(ValueError, match=words):
            sequence.fill_slots(model, mesh)


# Blocks that run in turns.


def test_blocks_are_counted_in_the_order_in_which_they_run() -> None:
    model = meta(ToyConfig(depth=3))
    names = protocol.block_names(model)
    assert names[:3] == ["spatial_blocks.0", "temporal_blocks.0", "spatial_blocks.1"] and len(names) == 6
    assert protocol.block_lists(model) == ("spatial_blocks", "temporal_blocks")
    model.temporal_blocks = nn.ModuleList(model.temporal_blocks[:1])  # lists of other lengths
    assert protocol.block_names(model) == [names[0], names[1], names[2], names[4]]
    model = meta(ToyConfig(depth=3))
    activation_checkpoint.apply(model, RecomputeConfig(kind="first", blocks=3))
    again = [name for name in names if "forward" in vars(model.get_submodule(name))]
    assert again == names[:3]


def test_timelines_follow_the_order() -> None:
    """Each block of a deep model as in the short one, of its own kind and place."""
    forecaster = Forecaster(ToyConfig(depth=4), OptimConfig(), device_type="cpu", known=True)
    assert forecaster._stand_ins == [0, 1, 2, 3, 2, 3, 4, 5]
    place = RankLayout(meshes.view({}), ParallelConfig(zero=0, precision=PrecisionConfig(compute="fp32")))
    whole = meta(ToyConfig(depth=4))
    spread(whole, place.cfg, place.mesh, "cpu")
    sequence_parallel = SequenceParallel(place.mesh)

    def loss() -> Tensor:
        return (
            whole(**denoiser_inputs(ToyConfig(depth=4), SHAPES[0], sequence_parallel, known=True))
            .float()
            .square()
            .sum()
        )

    exact, short = timeline(whole, loss), forecaster._micro_batch(place, SHAPES[0], False, True)
    for a, b in zip((*exact.forward, *exact.backward), (*short.forward, *short.backward), strict=True):
        assert (a.peak - a.start, a.end - a.start) == (b.peak - b.start, b.end - b.start)


@pytest.mark.parametrize("frames", [1, 33])
def test_interpolation_is_close_to_running_the_shape(frames: int) -> None:
    forecaster = Forecaster(replace(TOY, width=128), OptimConfig(), device_type="cuda", known=True)
    for kind, mesh in (("none", {"ulysses": 4}), ("full", {"ring": 2, "tensor": 2})):
        cfg = ParallelConfig(zero=3, mesh=MeshConfig(**mesh), recompute=RecomputeConfig(kind=kind))  # type: ignore[arg-type]
        place = RankLayout(meshes.view(meshes.resolve(cfg.mesh, 8)), cfg)
        batch = MicroBatch(samples=3, txt=300, img=frames * 640, frames=frames, has_mask=True)
        exact, quick = (forecaster.memory(place, batch, exact=exact).total for exact in (True, False))
        assert quick == pytest.approx(exact, rel=0.03), (kind, mesh)


# The planner, from a configuration.


def config(*overrides: str) -> RunConfig:
    base = ["data.table=t.csv", "model={kind: toy_factored, channels: 24, text_dim: 128}", "parallel.mesh.ulysses=1"]
    objective = ["objective={kind: toy_gaussian_flow}", "conditioning.masks={random: 0.5}", "lora={}"]
    buckets = "data.buckets={32px: {1: [1.0, 48], 9: [1.0, 8]}}"
    return load_config(RunConfig, ROOT / "configs" / "train" / "demo.yaml", [*base, *objective, buckets, *overrides])


def test_the_planner_plans_it() -> None:
    cfg = config("data.micro_batches=8")
    planner = Planner(cfg, 12, DEVICES["h100"], device_type="cuda")
    assert [shape.batch.frames for shape in planner.shapes] != [None, None]
    degrees = {parallel.mesh.ulysses for parallel in layouts(cfg, 12, DEVICES["h100"].per_node)}
    assert {3, 6} <= degrees  # which divide no 4 heads
    best = planner.best(3)
    assert len(best) == 3 and all(f.flops > 0 and f.memory.activations > 0 for f in best)


def test_any_number_of_processes_shares_a_sample() -> None:
    for degree in (3, 5, 8):
        check_layout(MeshConfig(shard=1, ulysses=degree), degree, TOY)
    with pytest.raises(UserError, match=r"tensor=3: does not divide the 4 heads"):
        check_layout(MeshConfig(shard=1, tensor=3), 3, TOY)


def test_a_run_forecasts_its_own_bytes() -> None:
    """Masks of known frames are exchanged if the run gives any."""
    mesh = meshes.view({"ulysses": 2})
    sent = []
    for masks in ("{random: 0.5}", "{}"):
        cfg = config(f"conditioning.masks={masks}", "parallel.mesh.ulysses=2")
        traffic = Traffic(cfg, mesh, lambda step: ())
        assert traffic._structure is structure(cfg.model, masks != "{}")
        batch = MicroBatch(samples=1, txt=8, img=35, frames=5)
        sent.append(step_bytes(traffic._structure, RankLayout(mesh, cfg.parallel), [batch])["ulysses"])
    blocks, again = TOY.depth, 1 + (cfg.parallel.recompute.kind == "full")
    assert sent[0] - sent[1] == blocks * again * (5 - 3) * 4  # a byte for every frame and place that leaves
