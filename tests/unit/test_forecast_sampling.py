"""The forecast of sampling, and of sampling and losses while a run trains: turns, weights on the device, bounds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opensora.cli import forecast
from opensora.config.load import load_config
from opensora.config.run import RunConfig, SampleConfig
from opensora.inference.find import source_of
from opensora.inference.memory import job_of, memory_of
from opensora.models.image import IMAGE_ENCODERS, ClipVisionConfig
from opensora.planner.devices import DEVICES
from opensora.planner.encoder_memory import frozen_bytes, image_flops
from opensora.planner.forecast import EFFICIENCY
from opensora.planner.layout_forecast import Forecast, ValidationForecast
from opensora.planner.sampling_forecast import SamplingForecast
from opensora.planner.search import Planner
from opensora.train.validate import planned_clips
from opensora.utils.errors import UserError
from tests.conftest import ROOT

GIB = 2**30
SMALL = {"kind": "mmdit", "size": "debug", "in_channels": 64, "context_in_dim": 256, "vec_in_dim": 256}
JOB: dict[str, Any] = {
    "weights": "nowhere.safetensors",
    "model": {**SMALL, "depth": 4, "depth_single_blocks": 8},
    "vae": {"kind": "dct", "channels": 16},
    "text": {"kind": "bytes"},
    "sampling": {"resolution": "64px", "num_frames": 9, "num_steps": 20},
    "parallel": {"zero": 3},
}
STILL = {"still": {"weights": "none.safetensors", "model": {**SMALL, "guidance_embed": True, "cond_embed": False}}}
STILL["still"] |= {"vae": {"kind": "flux2d"}, "resolution": "256px"}
STILL["still"]["model"] = {**STILL["still"]["model"], "in_channels": 64}  # type: ignore[dict-item]
T5 = "{kind: t5_clip, t5_path: a, clip_path: b}"
TURNS = ["text encoder", "denoiser", "autoencoder"]


def sampled(*overrides: str, world: int = 1, **more: Any) -> SamplingForecast:
    job = load_config(SampleConfig, {**JOB, **more}, list(overrides))
    return memory_of(job, source_of(job), world, DEVICES["rtx4090"])


def test_weights_are_those_on_the_device() -> None:
    """With offload=blocks two blocks and what is outside of them, of weights that CPU memory keeps whole."""
    none, models, blocks = (sampled(f"offload={way}") for way in ("none", "models", "blocks"))
    assert none.kept["denoiser"] == blocks.kept["denoiser"] == none.weights["denoiser"] == models.weights["denoiser"]
    assert blocks.weights["denoiser"] < 0.5 * none.weights["denoiser"]
    for found in (none, models, blocks):
        assert all(found.weights[turn] <= found.turns[turn] for turn in TURNS)
    deeper = {**JOB["model"], "depth_single_blocks": 16}
    assert sampled("offload=blocks", model=deeper).weights["denoiser"] == blocks.weights["denoiser"]
    assert sampled("offload=blocks", "parallel.zero=2").turns == blocks.turns  # which blocks is whatever zero says
    assert sampled("offload=blocks", world=2).weights["denoiser"] == blocks.weights["denoiser"]  # gathered there


def test_what_comes_from_cpu_memory_takes_time() -> None:
    slow = replace(DEVICES["rtx4090"], host_bandwidth=1e6)
    job = load_config(SampleConfig, JOB, ["offload=blocks"])
    streamed, whole = (memory_of(replace(job, offload=way), source_of(job), 1, slow) for way in ("blocks", "models"))
    passes = 2 * 20
    assert streamed.seconds["denoiser"] > 0.8 * passes * streamed.kept["denoiser"] / 1e6
    assert whole.seconds["denoiser"] == pytest.approx(2 * whole.kept["denoiser"] / 1e6, rel=0.01)


def test_what_was_gathered_stays_below_zero_3() -> None:
    two, three = sampled("parallel.zero=2"), sampled()
    assert two.turns["autoencoder"] - three.turns["autoencoder"] == two.kept["denoiser"]


def test_a_second_expert_stays_where_there_is_room() -> None:
    """Beside the first in every turn; with offload, or on a device without room for both, it waits in CPU memory."""
    low = {"low_noise": {"weights": "low.safetensors", "boundary": 0.9}}
    one, two = sampled(), sampled(**low)
    assert two.turns["text encoder"] - one.turns["text encoder"] == one.weights["denoiser"] > 0
    assert two.weights["denoiser for low noise"] == two.weights["denoiser"] == one.weights["denoiser"]
    moved, alone = sampled("offload=models", **low), sampled("offload=models")
    assert moved.peak == alone.peak and moved.turns["denoiser for low noise"] == alone.turns["denoiser"]
    job = load_config(SampleConfig, {**JOB, **low})
    small = replace(DEVICES["rtx4090"], memory=two.peak - 1)
    tight = memory_of(job, source_of(job), 1, small)
    assert tight.peak == one.peak and tight.kept["denoiser for low noise"] == one.kept["denoiser"]


def test_stills_have_turns_of_their_own() -> None:
    """And clips go on from them: three passes, and a reference to code."""
    job = load_config(SampleConfig, {**JOB, **STILL})
    found, plain = sampled(**STILL), sampled()
    assert list(found.turns) == [*(f"still {turn}" for turn in TURNS), *TURNS]
    assert found.weights["still denoiser"] > 0 and found.weights["still autoencoder"] == 84_000_000 * 2
    assert found.seconds["denoiser"] == pytest.approx(1.5 * plain.seconds["denoiser"], rel=0.01)
    one = job_of(replace(job, cond_type="i2v_head", still=None), source_of(job))
    assert (one.passes, one.known_frames) == (3, 1)
    assert found.turns["denoiser"] < plain.turns["denoiser"] + found.weights["still denoiser"]  # which is gone by then
    small, large = (sampled(**STILL, world=1, vae=JOB["vae"]), sampled("still.resolution=1024px", **STILL))
    assert large.turns["still denoiser"] > small.turns["still denoiser"]
    assert large.turns["denoiser"] == small.turns["denoiser"]


def test_a_text_encoder_of_the_stills_alone_stays_beside_the_clips() -> None:
    shared, own = sampled(f"text={T5}", **STILL), sampled(f"still.text={T5}", **STILL)
    assert own.turns["denoiser"] - sampled(**STILL).turns["denoiser"] == own.weights["still text encoder"] > 9 * GIB
    assert shared.turns["still denoiser"] > 9 * GIB
    moved = sampled(f"still.text={T5}", "offload=models", **STILL)
    assert moved.turns["denoiser"] < GIB


@pytest.mark.parametrize("kind", ["first_block", "teacache", "dbcache", "magcache", "pyramid_attention"])
def test_step_caches_take_memory_and_their_time_is_a_bound(kind: str) -> None:
    more = {"magcache": ", ratios: [1.0]", "dbcache": ", first_blocks: 2"}.get(kind, "")
    plain, cached = sampled(), sampled(f"sampling.cache={{kind: {kind}{more}}}")
    assert cached.turns["denoiser"] > plain.turns["denoiser"]
    assert cached.seconds == plain.seconds
    assert (plain.bounds, cached.bounds) == (frozenset(), {"denoiser"})


def test_passes_of_oscillating_guidance() -> None:
    """On in the first ten steps and in every even one: 30 of 40 passes."""
    plain, on_and_off = sampled(), sampled("sampling.text_osci=true")
    assert on_and_off.seconds["denoiser"] == pytest.approx(plain.seconds["denoiser"] * 35 / 40)
    assert on_and_off.turns == plain.turns


def test_the_command_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sample.yaml"
    path.write_text(json.dumps({**JOB, **STILL}))
    words = [str(path), "--world", "1", "--device", "rtx4090", "sampling.cache.kind=teacache"]
    assert forecast.main(words) == 0
    said = capsys.readouterr().out
    assert "still autoencoder" in said and "weights: of the model whose turn it is, on the device" in said
    assert "denoiser: at most " in said and said.endswith(" s, as if cache.kind=teacache reused nothing\n")
    assert forecast.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds_at_most"] == ["denoiser"] and found["turns_gib"].keys() == found["weights_gib"].keys()


def test_the_command_knows_two_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seconds are those of all steps, in the line of the first."""
    path = tmp_path / "sample.yaml"
    path.write_text(json.dumps({**JOB, "low_noise": {"weights": "low.safetensors", "boundary": 0.9}}))
    assert forecast.main([str(path), "--world", "1", "--device", "rtx4090"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first, second = (
        next(line for line in lines if line.startswith(name)) for name in ("denoiser  ", "denoiser for low")
    )
    assert len(first.split()) == 4 and len(second.split()) == 6  # a name of four words, and no seconds
    assert lines[-1] == "seconds of denoiser: of all steps, whichever of the two makes them"


DEMO = ROOT / "configs" / "train" / "demo.yaml"
RUN = [
    *("data.table=t.csv", "data.micro_batches=8", "parallel.mesh.dynamic=false", "parallel.mesh.ulysses=1"),
    *("model.depth=2", "model.depth_single_blocks=3", "data.buckets={32px: {1: [1, 64], 9: [1, 16]}}"),
]
TABLE = ["validate.every=5", "validate.table=held_out.csv", "validate.samples=32"]
CLIPS = [
    *("validate.every=5", "validate.prompts=[a, b, c]", "validate.sampling.num_frames=9"),
    *("validate.sampling.resolution=32px", "validate.sampling.aspect_ratio=1:1"),
]


def trained(*overrides: str, world: int = 1) -> Forecast:
    cfg = load_config(RunConfig, DEMO, [*RUN, *overrides])
    planner = Planner(cfg, world, DEVICES["rtx4090"], device_type="cuda", clips=planned_clips(cfg))
    return planner.one(cfg.parallel, planner.shapes[-1])


def test_rounds_of_validation() -> None:
    assert trained().validation is None
    loss, clips, both = (trained(*options).validation for options in (TABLE, CLIPS, TABLE + CLIPS))
    assert loss and clips and both and both.every == 5
    assert loss.held_out > 0 == loss.clips and clips.clips > 0 == clips.held_out
    assert (both.held_out, both.clips) == (loss.held_out, clips.clips)
    assert both.seconds == pytest.approx(loss.held_out_s + clips.clips_s)
    more = trained(*TABLE, "validate.bins=10").validation
    assert more and more.held_out == loss.held_out and 1.5 * loss.held_out_s < more.held_out_s <= 2 * loss.held_out_s
    few = trained(*CLIPS, "validate.batch_size=1").validation
    assert few and few.clips < clips.clips and few.clips_s == pytest.approx(clips.clips_s)
    two = trained(*TABLE, world=2).validation
    assert two and two.held_out_s == pytest.approx(loss.held_out_s / 2)
    packed = trained(*TABLE, "data.tokens_per_sequence=256", "data.balance_group=2").validation
    assert packed and packed.held_out > 0.9 * loss.held_out  # held-out clips are never packed


def test_rounds_of_validation_encode_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image encoder that visits the device is there while held-out clips and prompts are encoded; it takes time."""
    wan = "{kind: wan, size: debug, in_channels: 24, text_dim: 128, references: clip, image_dim: 1280}"
    common = [*RUN[:4], RUN[-1], *TABLE, *CLIPS, f"model={wan}", "conditioning.masks={}"]

    def found(at: str) -> ValidationForecast:
        cfg = load_config(RunConfig, DEMO, [*common, f"image_encoder={{kind: clip_vision, path: x, {at}}}"])
        planner = Planner(cfg, 1, DEVICES["rtx4090"], device_type="cuda", clips=planned_clips(cfg))
        made = planner.one(cfg.parallel, planner.shapes[-1]).validation
        assert made is not None
        return made

    elsewhere, visiting = found("device: cpu"), found("offload: true")
    weights = IMAGE_ENCODERS["clip_vision"].parameters * 2
    assert min(visiting.held_out - elsewhere.held_out, visiting.clips - elsewhere.clips) > 0.8 * weights
    one = image_flops(ClipVisionConfig(), 32) / (DEVICES["rtx4090"].flops * EFFICIENCY)  # of all held-out clips
    larger = IMAGE_ENCODERS["clip_vision"]._replace(parameters=weights)
    monkeypatch.setitem(IMAGE_ENCODERS, "clip_vision", larger)
    assert found("device: cpu").held_out_s - elsewhere.held_out_s == pytest.approx(one)


def test_a_round_that_does_not_fit() -> None:
    """Clips far larger than what is trained on: they decide, and the message says so."""
    large = [*CLIPS, "validate.sampling.resolution=512px", "validate.sampling.num_frames=33"]
    found = trained(*large)
    assert found.validation and found.peak == found.validation.clips > 2 * found.memory.total
    cfg = load_config(RunConfig, DEMO, [*RUN, *large])
    room = (found.memory.total + found.peak) // 2
    device = replace(DEVICES["rtx4090"], memory=room)
    with pytest.raises(UserError, match=r"a round of validation needs .*; lower validate\.batch_size or the size in "):
        Planner(cfg, 1, device, device_type="cuda", clips=planned_clips(cfg)).best(1)
    assert Planner(load_config(RunConfig, DEMO, RUN), 1, device, device_type="cuda").best(1)


def test_encoders_that_nobody_needs() -> None:
    """Features are stored: nothing is encoded, but where validation encodes."""
    base = ["vae={kind: flux2d}", "model.in_channels=64", "model.patch_size=2"]
    stored = [*base, "data.features=stored"]
    cfgs = [load_config(RunConfig, DEMO, [*RUN, *words]) for words in (base, stored, [*stored, *TABLE])]
    assert [frozen_bytes(cfg) > 0 for cfg in cfgs] == [True, False, True]


def test_the_command_says_what_a_round_takes(capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(DEMO), "--world", "1", "--top", "1", *RUN, *TABLE, *CLIPS]
    assert forecast.main(words) == 0
    said = capsys.readouterr().out
    assert "while validating, every 5 steps: at most held-out loss " in said and "; clips of prompts " in said
    with pytest.raises(UserError, match=r"^validate\.prompt_csv=nowhere\.csv: "):
        forecast.main([*words, "validate.prompts=[]", "validate.prompt_csv=nowhere.csv"])
