"""Known frames as a clip with grey ones, and in the place of noise along a flow: what training gives a Wan, and what
sampling makes, against loops that are written out."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from acceleration.distributed.mesh import view
from acceleration.sequence import SequenceParallel
from opensora.assembly.encoders import Encoders
from opensora.assembly.reference_codes import code_clip, stored_name
from opensora.assembly.token_layout import token_layout
from opensora.conditioning import ConditioningConfig, DropoutConfig
from opensora.conditioning.frames import draw_known
from opensora.conditioning.references import draw_kind, kinds_of, parts_of
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.datasets.buckets.bucket import Bucket
from opensora.datasets.loading.feature_store import StoredFeatures
from opensora.datasets.loading.reader import Batch
from opensora.inference.pipeline import build_api, build_sampler
from opensora.inference.references import check_references
from opensora.models.base import AutoencoderShape
from opensora.models.wan import WanConfig
from opensora.sampling.options import SamplingOption
from opensora.schedulers.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from opensora.schedulers.rectified_flow_v1 import RectifiedFlowV1Config
from opensora.train.preparation import Preparation, Tokens, loss_share
from opensora.utils.errors import UserError
from tests.dist.problem import FakeText
from tests.wan_clips import (
    CLIP,
    GRID,
    IN_PLACE,
    NEGATIVES,
    OPTION,
    PLAIN,
    PROMPTS,
    SEEDS,
    Means,
    by_hand,
    clip_by_hand,
    components,
    filled_model,
    known_by_hand,
    packed,
)

SHAPE = AutoencoderShape(4, (4, 8, 8), True)
WHOLE = DropoutConfig(text=0.0, pooled=0.0)


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


class Drawing(Means):
    """Draws its latents, but for what is coded by the mode."""

    samples = True

    def encode(self, pixels: Tensor, run: Any = None, draw: Any = None) -> Tensor:
        mode = super().encode(pixels)
        return mode if draw is None else mode + draw(tuple(mode.shape[1:])).to(mode)


def preparation(model: WanConfig, conditioning: ConditioningConfig, **more: Any) -> Preparation:
    return Preparation(
        encoders=Encoders(autoencoder=Drawing(), text_encoder=FakeText(), device=torch.device("cpu")),
        objective=RectifiedFlow(RectifiedFlowConfig()),
        conditioning=conditioning,
        model=model,
        layout=token_layout(model, SequenceParallel(view({}))),
        autoencoder=SHAPE,
        seed=1,
        **more,
    )


def batch_of(pixels: Tensor, first: int = 0) -> Batch:
    """Pixels (B, 3, T, H, W) in [-1, 1], as levels from 0 to 255."""
    samples, _, frames, height, width = pixels.shape
    return Batch(
        pixels=(pixels.double() + 1) * 127.5,
        prompts=["a", "bb", "ccc", "", "e", "f"][:samples],
        sample_ids=tuple(range(first, first + samples)),
        bucket=Bucket("x", frames, height, width, samples),
        fps=torch.zeros(samples),
        epoch=0,
        weight=1.0,
    )


def clips(samples: int = 6, frames: int = 9) -> Tensor:
    return torch.rand(samples, 3, frames, 32, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1


# Training.
def test_training_gives_the_first_frame_and_grey_as_one_clip_by_its_mode() -> None:
    weights = {"t2v": 1.0, "i2v_head": 1.0}
    prepare = preparation(CLIP, ConditioningConfig(references=weights, dropout=WHOLE))
    tokens = prepare(batch_of(clips()), step=4)
    kinds = [draw_kind(1, 4, sample, 3, weights, SHAPE) for sample in range(6)]
    assert set(kinds) == set(weights)
    given = [clip[:, :1] if kind == "i2v_head" else None for clip, kind in zip(clips(), kinds, strict=True)]
    wanted = torch.cat(
        (packed(known_by_hand(given)[:, None].expand(-1, 4, -1, -1, -1).double()), packed(clip_by_hand(given))), dim=-1
    )
    assert relative(tokens.inputs["cond"].double(), wanted) < 1e-6
    assert tokens.learned is None and tokens.inputs["row_of"] is None  # all frames are learned, as by Wan


def test_longer_heads_are_coded_with_the_rest_grey() -> None:
    """33 frames of 41, which are 9 latent ones of 11."""
    prepare = preparation(CLIP, ConditioningConfig(references={"v2v_head": 1.0}, dropout=WHOLE, known_in_loss=False))
    pixels = clips(2, 41)
    tokens = prepare(batch_of(pixels), step=0)
    cond = tokens.inputs["cond"].unflatten(1, (11, 6))
    assert (cond[:, :9, :, :16] == 1).all() and not cond[:, 9:, :, :16].any()
    coded = packed(Means().encode(torch.cat((pixels[:, :, :33], torch.zeros(2, 3, 8, 32, 48)), dim=2)))
    assert relative(cond[..., 16:].flatten(1, 2), coded) < 1e-5
    assert (
        tokens.learned is not None
        and tokens.learned.unflatten(1, (11, 6)).all(2).tolist() == [[False] * 9 + [True] * 2] * 2
    )


def test_stored_clips_are_what_training_codes() -> None:
    batch, part = batch_of(clips()), parts_of("i2v_head", SHAPE)[0]
    prepare = preparation(CLIP, ConditioningConfig(references={"i2v_head": 1.0}, dropout=WHOLE))
    encoded, coded = prepare.encoders.encode(batch), code_clip(prepare.encoders, batch, part)
    assert stored_name(part, whole=True) == "clip_head_1" != stored_name(part, whole=False)
    features = StoredFeatures(**encoded.tensors(), references={"clip_head_1": coded})
    ahead = replace(prepare, encoders=replace(prepare.encoders, autoencoder=None, stored=True))
    found, wanted = (
        one(what, 2).inputs for one, what in ((ahead, replace(batch, features=features)), (prepare, batch))
    )
    assert torch.equal(found["cond"], wanted["cond"]) and torch.equal(found["x"], wanted["x"])


def in_place(step: int, share: float = 0.6) -> tuple[Tokens, Tokens, list[bool]]:
    """Two micro-batches of a step, and which samples' first frames are known."""
    masks = {"image_head": share}
    prepare = preparation(IN_PLACE, ConditioningConfig(masks=masks, dropout=WHOLE))
    parts = (prepare(batch_of(clips(4)), step), prepare(batch_of(clips(2), first=4), step))
    return *parts, [draw_known(1, step, sample, 3, masks) is not None for sample in range(6)]


def test_known_tokens_are_clean_at_time_0_and_not_learned() -> None:
    first, _, known = in_place(3)
    assert any(known[:4]) and not all(known[:4])
    free, _, _ = in_place(3, share=0.0)
    frames = first.inputs["x"].unflatten(1, (3, 6))
    times = first.inputs["timestep"][first.inputs["row_of"]].unflatten(1, (3, 6))
    for row, has in enumerate(known[:4]):
        assert first.learned is not None
        assert first.learned[row].unflatten(0, (3, 6)).all(1).tolist() == [not has, True, True]
        noisy = free.inputs["x"].unflatten(1, (3, 6))[row]
        assert torch.equal(frames[row, 1:], noisy[1:]) and torch.equal(frames[row, 0], noisy[0]) != has
        assert (times[row, 1:] == 1000 * first.times[row].item()).all()
        assert (times[row, 0] == (0 if has else 1000 * first.times[row].item())).all()


def test_the_loss_is_the_mean_over_what_is_learned_of_the_whole_step() -> None:
    model, (*parts, known) = filled_model(IN_PLACE).float(), in_place(3)
    values = sum(72 * 4 - (24 * 4 if has else 0) for has in known)
    total, right = 0.0, 0.0
    for tokens in parts:
        total += loss_share(model, tokens, values).item()
        squares = (model(**tokens.inputs) - tokens.targets["velocity"]).square().unflatten(1, (3, 6))
        for row in range(len(squares)):
            right += squares[row, int(known.pop(0)) :].sum().item()
    assert total == pytest.approx(right / values, rel=1e-5)


# Sampling.
def pictures(count: int = 1) -> list[Tensor | None]:
    """What the first clip is given, and the second is not."""
    return [clips(1)[0, :, :count].double(), None]


@pytest.mark.parametrize("model", [CLIP, IN_PLACE], ids=["clip", "in_place"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampling_from_a_picture(model: WanConfig, guidance: float) -> None:
    option = replace(OPTION, guidance=guidance)
    sampler = build_sampler(components(model, filled_model(model)))
    given = pictures()
    ref = [None if frames is None else [frames] for frames in given]
    found = sampler(option, "i2v_head", seed=SEEDS, text=PROMPTS, neg=NEGATIVES, ref=ref).latents
    wanted = by_hand({"high": filled_model(model)}, option, given)
    assert relative(found, wanted) < 1e-10
    unknown = by_hand({"high": filled_model(model)}, option)
    assert relative(unknown[0], wanted[0]) > 1e-3 and torch.equal(unknown[1], wanted[1])
    assert relative(sampler(option, seed=SEEDS, text=PROMPTS, neg=NEGATIVES).latents, unknown) < 1e-10


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_known_frames_stay_clean_with_any_solver(solver: str) -> None:
    """Whatever steps remember of them: all else is as if the flow there were anything."""
    seen: list[Tensor] = []
    model = filled_model(IN_PLACE)
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["x"]), with_kwargs=True)
    sampler = build_sampler(components(IN_PLACE, model))
    ref = [None if frames is None else [frames] for frames in pictures()]
    found = sampler(replace(OPTION, solver=solver), "i2v_head", seed=SEEDS, text=PROMPTS, ref=ref).latents
    clean = clip_by_hand(pictures())
    assert relative(found[0, :, 0], clean[0, :, 0]) < 1e-12 and len(seen) == 2 * OPTION.num_steps
    assert all(relative(x[0].unflatten(0, (3, 6))[0], packed(clean)[0, :6]) < 1e-12 for x in seen)


def test_a_picture_reaches_the_pixels() -> None:
    api = build_api(components(IN_PLACE, filled_model(IN_PLACE)))
    pixels = api(replace(OPTION, num_steps=2), "i2v_head", seed=[1], text=["a"], ref=[[clips(1)[0, :, :1]]])
    assert pixels.shape == (1, 3, 9, *(8 * n for n in GRID[1:]))


# What is refused.
def test_kinds_that_end_a_clip_are_not_for_a_clip_with_grey() -> None:
    assert kinds_of("clip") == ("t2v", "i2v_head", "v2v_head", "v2v_head_easy")
    for cond_type in ("i2v_tail", "i2v_loop", "v2v_tail"):
        with pytest.raises(UserError, match=f"cond_type={cond_type}: model.kind=wan reads known frames at the head"):
            check_references(CLIP, RectifiedFlowConfig(), cond_type)
    check_references(CLIP, RectifiedFlowConfig(), "v2v_head")
    check_references(IN_PLACE, RectifiedFlowConfig(), "i2v_loop")
    for model, objective in ((PLAIN, RectifiedFlowConfig()), (IN_PLACE, RectifiedFlowV1Config())):
        with pytest.raises(UserError, match=r"^ref: model.kind=wan .*take ref and cond_type out"):
            check_references(model, objective, "i2v_head")


RUN: dict[str, Any] = {
    "name": "run",
    "model": {"kind": "wan", "size": "debug", "in_channels": 16, "text_dim": 32},
    "vae": {"kind": "dct", "channels": 16},
    "text": {"kind": "bytes", "dim": 32},
    "data": {"table": "t.csv", "buckets": {"32px": {9: [1.0, 1]}}},
    "train": {"steps": 1},
}


@pytest.mark.parametrize(
    ("takes", "conditioning", "said"),
    [
        ("clip", {"references": {"i2v_tail": 1.0}}, "conditioning.references.i2v_tail: must be 0"),
        (
            "clip",
            {"mask_types": {"i2v_head": 1.0}},
            "mask_types: model.kind=wan reads known frames as one",
        ),
        ("clip", {"masks": {"image_head": 1.0}}, "conditioning.masks: model.kind=wan takes no clean frames"),
        (
            "in_place",
            {"references": {"i2v_head": 1.0}},
            "references: model.kind=wan takes known frames in",
        ),
        (
            "none",
            {"references": {"i2v_head": 1.0}},
            "references: model.kind=wan reads no reference frames",
        ),
    ],
)
def test_conditions_that_a_wan_is_not_given(takes: str, conditioning: Any, said: str) -> None:
    run = RUN | {"model": RUN["model"] | {"references": takes}, "conditioning": conditioning}
    with pytest.raises(UserError) as error:
        load_config(RunConfig, run)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_conditions_that_a_wan_is_given() -> None:
    for takes, conditioning in (
        ("clip", {"references": {"i2v_head": 1.0, "i2v_tail": 0.0}}),
        ("in_place", {"masks": {"image_head": 0.5}}),
        ("none", {}),
    ):
        load_config(RunConfig, RUN | {"model": RUN["model"] | {"references": takes}, "conditioning": conditioning})


def test_an_option_of_its_own_has_no_third_pass() -> None:
    """Guidance towards references is for models that read them apart."""
    calls: list[int] = []
    model = filled_model(CLIP)
    model.register_forward_hook(lambda *_: calls.append(1))
    option = SamplingOption(width=48, height=32, num_frames=9, num_steps=2, guidance=3.0, guidance_img=9.0)
    build_sampler(components(CLIP, model))(option, "i2v_head", seed=[1], text=["a"], ref=[[clips(1)[0, :, :1]]])
    assert len(calls) == 4
