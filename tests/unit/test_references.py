"""Reference frames: the kinds, what is coded for them, how they are drawn; against tensors of the published code."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from acceleration.distributed.mesh import view
from acceleration.sequence import SequenceParallel
from opensora.assembly import stored_features
from opensora.assembly.encoders import Encoders
from opensora.assembly.token_layout import token_layout
from opensora.conditioning import ConditioningConfig, DropoutConfig
from opensora.conditioning.references import KINDS, draw_kind, fits, given_frames, needed_parts, parts_of
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.datasets.buckets.bucket import Bucket
from opensora.datasets.loading import feature_store
from opensora.datasets.loading.reader import Batch
from opensora.inference.references import code_known
from opensora.models.base import AutoencoderShape, TextFeatures
from opensora.models.mmdit import MMDiTConfig
from opensora.schedulers.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from opensora.train.preparation import Preparation
from opensora.utils.errors import UserError
from opensora.utils.rng import torch_generator
from opensora.utils.tokens import unpack
from tests.toy_components import ToyAutoencoder

TOLERANCE = 1e-5
CAUSAL, UNCAUSAL = AutoencoderShape(4, (4, 8, 8), True), AutoencoderShape(4, (4, 8, 8), False)
MODEL = MMDiTConfig(
    in_channels=16, patch_size=2, vec_in_dim=5, context_in_dim=6, hidden_size=24, num_heads=2, axes_dim=(4, 4, 4)
)
TABLE = {  # (end, frames, latent frames) of what is coded: causal, not causal
    "t2v": ((), ()),
    "i2v_head": ((("head", 1, 1),), (("head", 1, 1),)),
    "i2v_tail": ((("tail", 1, 1),), (("tail", 1, 1),)),
    "i2v_loop": ((("head", 1, 1), ("tail", 1, 1)), (("head", 1, 1), ("tail", 1, 1))),
    "v2v_head": ((("head", 33, 9),), (("head", 32, 8),)),
    "v2v_tail": ((("tail", 33, 9),), (("tail", 32, 8),)),
    "v2v_head_easy": ((("head", 65, 17),), (("head", 64, 16),)),
    "v2v_tail_easy": ((("tail", 65, 17),), (("tail", 64, 16),)),
}


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)).item()


class NoText:
    """Every prompt the same."""

    context_dim, vec_dim = 6, 5

    def encode(self, prompts: list[str]) -> TextFeatures:
        return TextFeatures(txt=torch.zeros(len(prompts), 2, 6), y_vec=torch.zeros(len(prompts), 5))


def preparation(autoencoder: ToyAutoencoder, conditioning: ConditioningConfig, patch: int = 1) -> Preparation:
    shape = AutoencoderShape(autoencoder.channels, autoencoder.stride, autoencoder.causal)
    model = replace(MODEL, in_channels=autoencoder.channels * patch**2, patch_size=patch)
    return Preparation(
        encoders=Encoders(autoencoder=autoencoder, text_encoder=NoText(), device=torch.device("cpu")),
        objective=RectifiedFlow(RectifiedFlowConfig()),
        conditioning=conditioning,
        model=model,
        layout=token_layout(model, SequenceParallel(view({}))),
        autoencoder=shape,
        seed=1,
    )


def batch_of(pixels: Tensor, first: int = 0) -> Batch:
    """Pixels (B, 3, T, H, W) in [-1, 1], as levels from 0 to 255 that need not be whole."""
    samples, _, frames, height, width = pixels.shape
    return Batch(
        pixels=(pixels.double() + 1) * 127.5,
        prompts=["a"] * samples,
        sample_ids=tuple(range(first, first + samples)),
        bucket=Bucket("x", frames, height, width, samples),
        fps=torch.zeros(samples),
        epoch=0,
        weight=1.0,
    )


def golden_cases() -> list[Any]:
    names = ("x73", "x17", "x1", "x68")
    return [pytest.param(kind, name, id=f"{kind}.{name}") for kind in KINDS for name in names]


@pytest.mark.parametrize(("kind", "name"), golden_cases())
def test_training_conditions_are_the_published_ones(golden: Path, kind: str, name: str) -> None:
    """cond = cat(mask, mask * latents), as the model gets it."""
    tensors = load_file(golden / "conditioning.safetensors")
    autoencoder = ToyAutoencoder(tensors["ae.mix"], causal=name != "x68")
    prepare = preparation(autoencoder, ConditioningConfig(references={kind: 1.0}))
    pixels = tensors[f"train.{name}.pixels8"].float() / 127
    latents = tensors[f"train.t2v.{name}.x0"]
    assert relative(autoencoder.encode(pixels), latents) <= TOLERANCE
    inputs = prepare(batch_of(pixels), step=3).inputs
    cond = unpack(inputs["cond"], latents.shape[2:], 1)
    key = f"train.{kind}.{name}.cond"
    if key not in tensors:  # the published code fails on clips that are too short: they are as if nothing were known
        assert name == "x17" and kind.startswith("v2v") and not cond.any()
        return
    assert cond.shape == tensors[key].shape and relative(cond, tensors[key]) <= TOLERANCE


@pytest.mark.parametrize("kind", TABLE)
def test_the_table(kind: str) -> None:
    assert KINDS.keys() == TABLE.keys()
    for shape, wanted in zip((CAUSAL, UNCAUSAL), TABLE[kind], strict=True):
        assert tuple(map(tuple, parts_of(kind, shape))) == wanted


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^i2v: must be one of t2v, i2v_head"):
        parts_of("i2v", CAUSAL)


def test_room_for_a_kind() -> None:
    """v2v needs more than 9 latent frames, easy ones more than 17 (8 and 16 if not causal); frames at the ends need a
    video."""
    least = {"t2v": (1, 1), "i2v_head": (2, 2), "i2v_tail": (2, 2), "i2v_loop": (2, 2)}
    least |= {kind: (10, 9) for kind in ("v2v_head", "v2v_tail")}
    least |= {kind: (18, 17) for kind in ("v2v_head_easy", "v2v_tail_easy")}
    for kind, counts in least.items():
        for shape, count in zip((CAUSAL, UNCAUSAL), counts, strict=True):
            assert [frames for frames in range(1, 40) if fits(kind, frames, shape)] == list(range(count, 40)), kind


def shares(weights: dict[str, float], frames: int, draws: int = 4000, **more: bool) -> dict[str, float]:
    found = Counter(draw_kind(5, 7, sample, frames, weights, CAUSAL, **more) for sample in range(draws))
    return {kind: count / draws for kind, count in found.items()}


def test_kinds_are_drawn_by_weight_among_those_that_fit() -> None:
    weights = {"v2v_head": 4.0, "t2v": 1.0, "i2v_head": 5.0, "i2v_tail": 0.0, "v2v_head_easy": 2.0}
    for frames, wanted in (
        (5, {"t2v": 1 / 6, "i2v_head": 5 / 6}),
        (10, {"t2v": 0.1, "i2v_head": 0.5, "v2v_head": 0.4}),
        (18, {"t2v": 1 / 12, "i2v_head": 5 / 12, "v2v_head": 4 / 12, "v2v_head_easy": 2 / 12}),
        (1, {"t2v": 1.0}),
    ):
        found = shares(weights, frames)
        assert found.keys() == wanted.keys()
        assert all(abs(found[kind] - share) < 0.03 for kind, share in wanted.items()), (frames, found)
    assert shares({"v2v_head": 1.0}, 9) == {"t2v": 1.0} and shares({"v2v_head": 1.0}, 10) == {"v2v_head": 1.0}
    assert shares({"i2v_loop": 1.0}, 2) == {"i2v_loop": 1.0}
    assert shares({"i2v_loop": 1.0}, 2, learn_some=True) == {"t2v": 1.0}  # nothing would be left to learn


def test_a_draw_is_of_the_seed_the_step_and_the_sample_alone() -> None:
    weights = {kind: 1.0 for kind in KINDS}
    other_order = dict(reversed(weights.items()))
    first = [draw_kind(5, 7, sample, 40, weights, CAUSAL) for sample in range(64)]
    assert first == [draw_kind(5, 7, sample, 40, other_order, CAUSAL) for sample in range(64)]
    for key in ((6, 7), (5, 8)):
        assert first != [draw_kind(*key, sample, 40, weights, CAUSAL) for sample in range(64)]
    assert set(first) == set(KINDS)


class Watched(ToyAutoencoder):
    """Keeps what it was asked to code."""

    def encode(self, pixels: Tensor, *args: Any, **more: Any) -> Tensor:
        self.seen: list[Tensor] = [*getattr(self, "seen", []), pixels.clone()]
        return super().encode(pixels, *args, **more)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "t2v"])
def test_references_are_coded_alone(kind: str, causal: bool) -> None:
    """The autoencoder sees the frames of the reference and no other one; also where it is not causal, so that training
    shows the model what sampling has."""
    torch.manual_seed(0)
    autoencoder, frames = Watched(torch.randn(4, 3), causal=causal), 81 if causal else 80
    pixels = torch.rand(2, 3, frames, 8, 16) * 2 - 1
    prepare = preparation(autoencoder, ConditioningConfig(references={kind: 1.0}))
    prepare(batch_of(pixels), step=0)
    whole, *alone = autoencoder.seen
    wanted = [pixels[:, :, :count] if end == "head" else pixels[:, :, -count:] for end, count, _ in
              parts_of(kind, CAUSAL if causal else UNCAUSAL)]  # fmt: skip
    assert whole.shape[2] == frames and len(alone) == len(wanted)
    for found, right in zip(alone, wanted, strict=True):
        assert torch.allclose(found, right, atol=1e-5)


class Drawing(ToyAutoencoder):
    """Latents are the noise that it is given: what is drawn for what."""

    samples = True

    def encode(self, pixels: Tensor, run: Any = None, draw: Any = None) -> Tensor:
        mode = super().encode(pixels)
        return mode if draw is None else draw(tuple(mode.shape[1:])).to(mode)


def test_references_are_drawn_apart_where_the_autoencoder_draws() -> None:
    """A draw of (seed, epoch, sample, part): not that of the clip, another sample or end; in any batch and step."""
    prepare = preparation(Drawing(torch.randn(4, 3)), ConditioningConfig(references={"i2v_loop": 1.0}))
    pixels = torch.rand(2, 3, 9, 8, 8)
    cond = unpack(prepare(batch_of(pixels), step=0).inputs["cond"], (3, 1, 1), 1)
    wanted = [
        torch.randn(4, 1, 1, 1, generator=torch_generator(0, 0, sample, f"posterior {end}_1"))[:, 0, 0, 0]
        for sample in (0, 1)
        for end in ("head", "tail")
    ]
    found = [cond[sample, 1:, frame, 0, 0] for sample in (0, 1) for frame in (0, 2)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert len({one[0].item() for one in found}) == 4
    later = prepare(batch_of(pixels[1:], first=1), step=3).inputs["cond"]
    assert torch.equal(unpack(later, (3, 1, 1), 1)[0], cond[1])

    refs = [[pixels[0]], [pixels[1]]]
    grid = (3, 1, 1)
    drawn = code_known("i2v_loop", refs, grid, (8, 8), Drawing(torch.randn(4, 3)), seeds=(5, 6)).reference
    right = torch.randn(1, 4, 1, 1, 1, generator=torch_generator(6, "posterior tail_1"))
    assert torch.equal(drawn[1, :, 2], right[0, :, 0]) and not torch.equal(drawn[0], drawn[1])
    swapped = code_known("i2v_loop", refs, grid, (8, 8), Drawing(torch.randn(4, 3)), seeds=(6, 5)).reference
    assert torch.equal(swapped, drawn.flip(0))


def known_by_hand(kind: str, frames: int, causal: bool) -> list[bool]:
    count = 1 if kind.startswith("i2v") else 16 + causal if kind.endswith("easy") else 8 + causal
    head = {t for t in range(count) if kind != "t2v" and "tail" not in kind}
    tail = {frames - 1 - t for t in range(count) if "tail" in kind or "loop" in kind}
    return [t in head | tail for t in range(frames)]


@pytest.mark.parametrize("known_in_loss", [True, False])
def test_known_frames_may_be_left_out_of_the_loss(known_in_loss: bool) -> None:
    autoencoder = ToyAutoencoder(torch.randn(4, 3), causal=True)
    weights = {kind: 1.0 for kind in KINDS}
    prepare = preparation(autoencoder, ConditioningConfig(references=weights, known_in_loss=known_in_loss), patch=2)
    tokens = prepare(batch_of(torch.rand(12, 3, 77, 16, 32)), step=0)
    if known_in_loss:
        assert tokens.learned is None
        return
    assert tokens.learned is not None
    learned = tokens.learned.unflatten(1, (20, 2))  # two tokens a frame
    kinds = [draw_kind(1, 0, sample, 20, weights, CAUSAL, learn_some=True) for sample in range(12)]
    assert len(set(kinds)) > 4
    for row, kind in zip(learned, kinds, strict=True):
        assert row.tolist() == [[not known] * 2 for known in known_by_hand(kind, 20, True)]
        assert int((~row).sum()) == 2 * given_frames(kind, 20, CAUSAL)


def test_what_is_needed_of_a_clip() -> None:
    weights = {"t2v": 1.0, "i2v_head": 1.0, "i2v_loop": 1.0, "v2v_head": 2.0, "v2v_tail_easy": 0.0}
    assert [part.name for part in needed_parts(weights, 5, CAUSAL)] == ["head_1", "tail_1"]
    assert [part.name for part in needed_parts(weights, 40, CAUSAL)] == ["head_1", "tail_1", "head_33"]
    assert [part.name for part in needed_parts(weights, 40, UNCAUSAL)] == ["head_1", "tail_1", "head_32"]
    assert needed_parts(weights, 1, CAUSAL) == () and needed_parts({}, 40, CAUSAL) == ()


RUN = {
    "name": "run",
    "model": {"kind": "mmdit", "size": "debug", "in_channels": 16, "patch_size": 1},
    "vae": {"kind": "dct", "channels": 16},
    "text": {"kind": "bytes", "dim": 32},
    "data": {"table": "t.csv", "buckets": {"32px": {1: [1.0, 1], 77: [1.0, 1]}}, "features": "stored"},
    "train": {"steps": 1},
}


def run_with(references: dict[str, float]) -> RunConfig:
    model = {"vec_in_dim": 32, "context_in_dim": 32, "cond_embed": True}
    given = RUN | {"model": RUN["model"] | model, "conditioning": {"references": references}}  # type: ignore[operator]
    return load_config(RunConfig, given)


def test_stored_references_serve_runs_that_need_them_or_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that was made without references is as it was; one that lacks some is refused by name."""
    table: Any = SimpleNamespace(content="0")
    monkeypatch.setattr(feature_store, "verify", lambda folder: None)
    loop, head = run_with({"i2v_loop": 1.0, "t2v": 1.0, "v2v_tail": 0.0}), run_with({"i2v_head": 2.0})
    none, longer = run_with({}), run_with({"i2v_head": 1.0, "v2v_head": 1.0})
    assert "references" not in stored_features.identity(none, table)
    assert stored_features.identity(loop, table)["references"] == ["head_1", "tail_1"]

    def check(run: RunConfig, made_for: RunConfig) -> None:
        stated = json.loads(json.dumps(stored_features.identity(made_for, table)))
        manifest = {"hash": stored_features.identity_hash(stated), "made_for": stated, "epochs": 1}
        monkeypatch.setattr(feature_store, "read_manifest", lambda folder: manifest)
        stored_features.check(run, table, SimpleNamespace(epoch_of=lambda step: 0))  # type: ignore[arg-type]

    for run, made_for in ((loop, loop), (head, loop), (none, loop), (none, none), (head, longer)):
        check(run, made_for)
    for run, made_for in ((loop, head), (loop, none), (longer, loop)):
        with pytest.raises(UserError, match=r"^data\.features=stored: made for .*references"):
            check(run, made_for)


BAD: Sequence[tuple[Any, str]] = (
    ({"i2v": 1.0}, "references.i2v: no such kind; must be one of t2v, i2v_head"),
    ({"t2v": -1.0}, "references.t2v=-1.0: must be a weight"),
    ({"t2v": float("nan")}, "references.t2v=nan: must be a weight"),
    ({"t2v": True}, "references.t2v=True: must be a weight"),
    ({"t2v": 0.0, "i2v_head": 0}, "references: every weight is 0"),
    (["t2v"], "references: must be a mapping"),
)


@pytest.mark.parametrize(("references", "message"), BAD)
def test_what_is_refused(references: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConditioningConfig(references=references, dropout=DropoutConfig())


def test_every_training_case_of_the_published_code_is_compared(golden: Path) -> None:
    cases = json.loads((golden / "conditioning.json").read_text())["cases"]
    ours = {f"{kind}.{name}" for kind in KINDS for name in ("x73", "x17", "x1", "x68")}
    assert {case["key"] for case in cases if case["side"] == "train"} == ours
