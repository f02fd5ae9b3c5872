"""Tokens of a reference picture: those of transformers' CLIP, and the way they take to a Wan that reads them."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from acceleration.distributed.mesh import view
from acceleration.sequence import SequenceParallel
from opensora.assembly.encoders import Encoders
from opensora.assembly.stored_features import identity
from opensora.assembly.token_layout import token_layout
from opensora.conditioning import ConditioningConfig, DropoutConfig
from opensora.conditioning.references import draw_kind
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.datasets.buckets.bucket import Bucket
from opensora.datasets.loading.feature_store import FeatureStore, StoredFeatures, write_index, write_null, write_shard
from opensora.datasets.loading.reader import Batch
from opensora.datasets.plan.batch_plan import MicroBatch
from opensora.inference.pipeline import build_sampler
from opensora.models.base import AutoencoderShape
from opensora.models.conditions import Conditions
from opensora.models.image import (
    IMAGE_ENCODERS,
    ClipVisionConfig,
    NoImageEncoder,
    build_image_encoder,
    check_image_encoder,
)
from opensora.models.image.clip_vision import ClipVisionEncoder, clip_pixels
from opensora.models.wan import WanConfig
from opensora.planner.encoder_memory import frozen_bytes, image_encoder_bytes, image_flops, image_working_bytes
from opensora.schedulers.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from opensora.train.preparation import Preparation
from opensora.utils.errors import UserError
from tests.dist.problem import FakeText
from tests.text_models import write_clip_vision
from tests.wan_clips import CLIP, NEGATIVES, OPTION, PROMPTS, SEEDS, Means, by_hand, components, filled_model

DTYPE = torch.float64
DIM, TOKENS = 16, 17
SEES = replace(CLIP, image_dim=DIM)
SHAPE = AutoencoderShape(4, (4, 8, 8), True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image half as a pipeline has it, and a whole CLIP."""
    root = tmp_path_factory.mktemp("clip")
    write_clip_vision(root / "wan" / "image_encoder")
    write_clip_vision(root / "whole", whole=True)
    return root


def built(path: Path, dtype: torch.dtype = DTYPE, **options: Any) -> ClipVisionEncoder:
    encoder = build_image_encoder(ClipVisionConfig(path=str(path), **options), "cpu", dtype)
    assert isinstance(encoder, ClipVisionEncoder)
    return encoder


def pictures(count: int = 2, height: int = 40, width: int = 56, dtype: torch.dtype = DTYPE) -> Tensor:
    """Smooth ones, of 256 levels, in [-1, 1]."""
    rough = torch.rand(count, 3, 7, 9, generator=torch.Generator().manual_seed(5), dtype=DTYPE)
    smooth = torch.nn.functional.interpolate(rough, (height, width), mode="bilinear")
    return ((smooth * 255).round() / 127.5 - 1).to(dtype)


def penultimate(path: Path, pixels: Tensor) -> Tensor:
    """As WanImageToVideoPipeline asks for it."""
    from transformers import CLIPVisionModel

    model = CLIPVisionModel.from_pretrained(path).to(pixels.dtype).eval()
    with torch.no_grad():
        found: Tensor = model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    return found


@pytest.mark.parametrize("fit", ["squash", "crop"])
def test_tokens_are_the_hidden_states_before_the_last(fit: str, folder: Path) -> None:
    encoder = built(folder / "wan", fit=fit)
    assert (encoder.tokens, encoder.dim, encoder.side) == (TOKENS, DIM, 28)
    found = encoder.encode(pictures())
    wanted = penultimate(folder / "wan" / "image_encoder", clip_pixels(pictures(), 28, fit))
    assert found.shape == (2, TOKENS, DIM) and (found - wanted).abs().max() < 1e-10
    assert not found.requires_grad
    names = [name for name, _ in encoder._clip.named_parameters()]
    assert {name.split(".")[2] for name in names if name.startswith("encoder.")} == {"0", "1"}  # of three
    assert not any("post_layernorm" in name for name in names)


def test_pictures_become_squares_as_in_wans_own_code() -> None:
    """``CLIPModel.visual`` of Wan: the whole picture, bicubic, then the colours' statistics."""
    x = pictures()
    square = torch.nn.functional.interpolate(x, size=(28, 28), mode="bicubic", align_corners=False) * 0.5 + 0.5
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=DTYPE)[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=DTYPE)[:, None, None]
    assert torch.allclose(clip_pixels(x, 28, "squash"), (square - mean) / std, atol=1e-12)


@pytest.mark.parametrize("size", [(40, 56), (56, 40), (28, 28), (91, 33), (20, 24)])
def test_pictures_are_cropped_as_the_processor_of_transformers_does(size: tuple[int, int]) -> None:
    """To one of 256 levels, which Pillow rounds to twice; most are the same."""
    from transformers import CLIPImageProcessor

    x = pictures(1, *size)
    picture = Image.fromarray(((x[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    wanted = torch.as_tensor(np.asarray(processor(images=picture, return_tensors="pt").pixel_values))
    found = clip_pixels(x, 28, "crop")
    levels = (found - wanted).abs() * torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None] * 255
    assert found.shape == (1, 3, 28, 28) and levels.max() < 1.01 and levels.mean() < 0.25


def test_published_shapes_without_files() -> None:
    """CLIP ViT-H/14 up to the layer before the last: 257 tokens of 1280."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    big = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=31,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )
    with torch.device("meta"):
        model = CLIPVisionModel(big)
    kind = IMAGE_ENCODERS["clip_vision"]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(kind.parameters, rel=1e-3)
    assert (model.embeddings.num_positions, kind.dim, kind.side) == (kind.tokens, 1280, 224)
    assert sum(p.numel() for p in model.encoder.layers[0].parameters()) == kind.block


def test_a_picture_does_not_depend_on_those_beside_it(folder: Path) -> None:
    encoder = built(folder / "wan", torch.float32)
    together = encoder.encode(pictures(3))
    for row in range(3):
        assert torch.equal(encoder.encode(pictures(3)[row : row + 1])[0], together[row])
    half = built(folder / "wan", torch.bfloat16).encode(pictures(3))
    assert half.dtype == torch.bfloat16 and (half - together).abs().mean() < 0.05


def test_a_whole_clip_and_single_files(folder: Path, tmp_path: Path) -> None:
    """Its image half, in names of both kinds; what is wrong is one line."""
    wanted = penultimate(folder / "whole", clip_pixels(pictures(), 28, "squash"))
    assert (built(folder / "whole").encode(pictures()) - wanted).abs().max() < 1e-10
    shutil.copytree(folder / "wan" / "image_encoder", tmp_path / "own")
    tensors = load_file(tmp_path / "own" / "model.safetensors")
    plain = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    for prefix in ("", "vision_model."):
        save_file({f"{prefix}{name}": x for name, x in plain.items()}, tmp_path / "own" / "model.safetensors")
        found = built(tmp_path / "own" / "model.safetensors").encode(pictures())
        assert torch.equal(found, built(folder / "wan").encode(pictures())), prefix
    plain["encoder.layers.0.more.weight"] = plain.pop("pre_layrnorm.bias")
    save_file(plain, tmp_path / "own" / "model.safetensors")
    cfg = ClipVisionConfig(path=str(tmp_path / "own"))
    with pytest.raises(UserError, match=r"missing: pre_layrnorm.bias.*unexpected: encoder.layers.0.more") as told:
        check_image_encoder(cfg, SEES)
    assert str(told.value).startswith(f"image_encoder.path={tmp_path / 'own'}: ") and "\n" not in str(told.value)


def test_what_a_model_does_not_read_is_refused(folder: Path) -> None:
    cfg = ClipVisionConfig(path=str(folder / "wan"))
    check_image_encoder(cfg, SEES)
    check_image_encoder(NoImageEncoder(), CLIP)
    with pytest.raises(UserError, match=r"gives tokens 16 wide, model.kind=wan reads 1280"):
        check_image_encoder(cfg, replace(CLIP, image_dim=1280))
    with pytest.raises(UserError, match=r"image_encoder.path is not set: .*or set image_encoder.kind=none"):
        check_image_encoder(ClipVisionConfig(), SEES)
    with pytest.raises(UserError, match=r"image_encoder.kind=none: model.kind=wan reads tokens of a reference picture"):
        load_config(RunConfig, run(image_dim=DIM))
    with pytest.raises(UserError, match=r"image_encoder.kind=clip_vision: model.kind=wan reads no tokens"):
        load_config(RunConfig, run() | {"image_encoder": {"kind": "clip_vision"}})
    assert load_config(RunConfig, run()).image_encoder == NoImageEncoder()


def run(**model: Any) -> dict[str, Any]:
    return {
        "name": "run",
        "model": {"kind": "wan", "size": "debug", "in_channels": 16, "text_dim": 32, "references": "clip", **model},
        "vae": {"kind": "dct", "channels": 16},
        "text": {"kind": "bytes", "dim": 32},
        "data": {"table": "t.csv", "buckets": {"32px": {9: [1.0, 1]}}},
        "train": {"steps": 1},
    }


def test_forecasts_know_its_memory_and_features_its_name() -> None:
    at: Any = {"kind": "clip_vision", "path": "x"}
    cfg = load_config(RunConfig, run(image_dim=1280) | {"image_encoder": at})
    parameters = 611_000_000
    moved = replace(cfg, image_encoder=replace(cfg.image_encoder, device="cpu"))
    assert frozen_bytes(cfg) - frozen_bytes(moved) == 2 * parameters
    seen = ClipVisionConfig()
    assert image_encoder_bytes(seen, 2, 4) == 2 * parameters
    assert image_encoder_bytes(replace(seen, shard=True), 2, 4) == parameters / 2
    assert image_encoder_bytes(replace(seen, offload=True), 2, 4) == 0
    assert image_encoder_bytes(NoImageEncoder(), 2, 4) == image_working_bytes(NoImageEncoder(), 2, 4) == 0
    working = image_working_bytes(seen, 2, 1)
    assert image_working_bytes(replace(seen, offload=True), 2, 1) == working + 2 * parameters
    assert working < image_working_bytes(replace(seen, shard=True), 2, 1) < working + parameters
    assert image_working_bytes(replace(seen, device="cpu"), 2, 1) == 0
    assert image_flops(seen, 3) == 6 * parameters * 257
    made_for = [identity(one, _Table()) for one in (cfg, replace(cfg, image_encoder=replace(seen, path="x")))]  # type: ignore[arg-type]
    assert made_for[0]["image_encoder"] == {"kind": "clip_vision", "path": "x", "fit": "squash"}
    assert identity(moved, _Table()) == made_for[0]  # type: ignore[arg-type]
    assert "image_encoder" not in identity(load_config(RunConfig, run()), _Table())  # type: ignore[arg-type]


class _Table:
    content = "of clips"


# The way of the tokens.
def preparation(folder: Path, conditioning: ConditioningConfig, model: WanConfig = SEES) -> Preparation:
    encoder = built(folder / "wan", torch.float32)
    return Preparation(
        encoders=Encoders(
            autoencoder=Means(), text_encoder=FakeText(), image_encoder=encoder, device=torch.device("cpu")
        ),
        objective=RectifiedFlow(RectifiedFlowConfig()),
        conditioning=conditioning,
        model=model,
        layout=token_layout(model, SequenceParallel(view({}))),
        autoencoder=SHAPE,
        seed=1,
    )


def clips(samples: int = 6, frames: int = 9) -> Tensor:
    return torch.rand(samples, 3, frames, 32, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1


def batch_of(pixels: Tensor) -> Batch:
    samples, _, frames, height, width = pixels.shape
    return Batch(
        pixels=(pixels.double() + 1) * 127.5,
        prompts=["a", "bb", "ccc", "", "e", "f"][:samples],
        sample_ids=tuple(range(samples)),
        bucket=Bucket("x", frames, height, width, samples),
        fps=torch.zeros(samples),
        epoch=0,
        weight=1.0,
    )


WEIGHTS = {"t2v": 1.0, "i2v_head": 1.0}


def test_training_gives_tokens_of_first_frames_that_are_known(folder: Path) -> None:
    """Zeros of the others; a prompt that is dropped takes nothing away, as passes without prompt have them."""
    dropout = DropoutConfig(text=1.0, pooled=1.0)
    tokens = preparation(folder, ConditioningConfig(references=WEIGHTS, dropout=dropout))(batch_of(clips()), step=4)
    kinds = [draw_kind(1, 4, sample, 3, WEIGHTS, SHAPE) for sample in range(6)]
    whole = built(folder / "wan", torch.float32).encode(clips()[:, :, 0])
    found = tokens.inputs["image_tokens"]
    assert found.shape == (6, TOKENS, DIM) and set(kinds) == set(WEIGHTS)
    for row, kind in enumerate(kinds):
        wanted = whole[row] if kind == "i2v_head" else torch.zeros(TOKENS, DIM)
        assert torch.allclose(found[row], wanted, atol=1e-5), kind
    none = preparation(folder, ConditioningConfig())(batch_of(clips()), step=4)
    assert not none.inputs["image_tokens"].any()
    loss = filled_model(SEES).float()(**tokens.inputs)
    assert torch.isfinite(loss).all()


def test_tokens_go_where_the_reference_goes(folder: Path) -> None:
    """Samples that lose their frames lose the picture, those that lose their prompt do not."""
    drops = {"keep": 1.0, "cond": 1.0, "text": 1.0, "null": 1.0}
    conditioning = ConditioningConfig(
        references={"i2v_head": 1.0}, dropout=DropoutConfig(text=0.0, pooled=0.0, conditions=drops)
    )
    prepare = preparation(folder, conditioning)
    seen = set()
    for step in range(4):
        told = prepare(batch_of(clips()), step).inputs
        has_frames = told["cond"][..., 16:].flatten(1).any(1)
        assert torch.equal(told["image_tokens"].flatten(1).any(1), has_frames)
        seen |= set(has_frames.tolist())
    assert seen == {True, False}


def test_tokens_made_ahead_are_those_of_training(folder: Path, tmp_path: Path) -> None:
    """Through the files of stored features, sample by sample."""
    batch = batch_of(clips())
    prepare = preparation(folder, ConditioningConfig(references={"i2v_head": 1.0}))
    encoded = prepare.encoders.encode(batch)
    plan = MicroBatch(bucket=batch.bucket, sample_ids=batch.sample_ids, epoch=0)
    write_shard(tmp_path, 0, [(plan, StoredFeatures(**encoded.tensors()))], "hash")
    null = prepare.encoders.null
    write_null(tmp_path, {"txt": null.txt, "y_vec": null.y_vec, "mask": null.mask}, "hash")  # type: ignore[dict-item]
    write_index(tmp_path, 1, 1, {}, "hash")
    asked = replace(plan, sample_ids=(4, 1))
    read = FeatureStore(tmp_path).read(asked)
    assert encoded.image_tokens is not None and read.image_tokens is not None
    assert torch.equal(read.image_tokens, encoded.image_tokens[[4, 1]]) and read.references == {}
    stored = replace(prepare.encoders, image_encoder=None, autoencoder=None, stored=True)
    again = stored.encode(replace(batch, features=read))
    assert again.image_tokens is not None and torch.equal(again.image_tokens, read.image_tokens)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampling_reads_the_reference_picture(guidance: float, folder: Path) -> None:
    """Both passes have the picture's tokens; a clip without picture has zeros."""
    option, frames = replace(OPTION, guidance=guidance), clips(1)[0, :, :1].double()
    encoder = built(folder / "wan")
    sampler = build_sampler(components(SEES, filled_model(SEES), image_encoder=encoder))
    found = sampler(option, "i2v_head", seed=SEEDS, text=PROMPTS, neg=NEGATIVES, ref=[[frames], None]).latents
    told = torch.cat((encoder.encode(frames.transpose(0, 1)), torch.zeros(1, TOKENS, DIM, dtype=DTYPE)))
    wanted = by_hand({"high": filled_model(SEES)}, option, [frames, None], picture=told)
    assert ((found - wanted).abs().max() / wanted.abs().max()).item() < 1e-10
    blind = by_hand({"high": filled_model(SEES)}, option, [frames, None], picture=told * 0)
    assert (blind[0] - wanted[0]).abs().max() > 1e-3 * wanted.abs().max()
    alone = sampler(option, seed=SEEDS, text=PROMPTS, neg=NEGATIVES).latents
    assert torch.allclose(alone, by_hand({"high": filled_model(SEES)}, option, picture=told * 0), atol=1e-10)


def test_passes_keep_or_lose_the_picture() -> None:
    known = Conditions(text=torch.ones(1), image_tokens=torch.ones(1, 2, 3), reference=torch.ones(1), known=None)
    null = Conditions(text=torch.zeros(1))
    kept, gone = known.without_text(null), known.without_reference()
    assert kept.image_tokens is known.image_tokens and kept.text is null.text
    assert gone.image_tokens is not None and not gone.image_tokens.any()
    assert known.map(image=lambda x: x[:0], text=lambda x: x[:0]).image_tokens is known.image_tokens
