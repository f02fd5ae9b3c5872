"""What a training batch of Open-Sora 1.3 tells the model: latents of given frames and where they are, whose prompt is
dropped, what frames weigh in the loss. All of it written out here from the draws."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from acceleration.distributed import mesh as meshes
from opensora.conditioning import ConditioningConfig, DropoutConfig
from opensora.conditioning.condition_dropout import draw_drops
from opensora.conditioning.dropout import drop_text
from opensora.conditioning.mask_types import draw_given, noisy_pixels
from opensora.train.preparation import Preparation, Tokens
from tests.dist.stdit import MODELS, SEED, TYPES, Clips, Latents, batches, plain_model, preparation

MODEL = MODELS["given"]


def prepared(conditioning: ConditioningConfig, step: int = 0) -> list[tuple[Clips, Tokens]]:
    prepare: Preparation = replace(preparation(MODEL, meshes.view({})), conditioning=conditioning)
    return [(batch, prepare(batch, step)) for batch in batches(MODEL, step)]  # type: ignore[arg-type]


def as_tokens(latents: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, T, S, C 2 2), sides filled up with zeros."""
    padded = torch.nn.functional.pad(latents, (0, latents.shape[4] % 2, 0, latents.shape[3] % 2))
    return rearrange(padded, "b c t (h p) (w q) -> b t (h w) (c p q)", p=2, q=2)


def coded(pixels: Tensor) -> Tensor:
    return Latents().encode(pixels).float()


def given_of(batch: Clips, step: int, types: dict[str, float]) -> list[Any]:
    frames = batch.pixels.shape[2]
    return [draw_given(SEED, step, sample, frames, types) for sample in batch.sample_ids]


@pytest.mark.parametrize("conditions", [{}, {"cond": 1.0}, {"text": 1.0}, {"null": 1.0}, {"keep": 1.0}, "mixed"])
@pytest.mark.parametrize("step", [0, 3])
def test_what_the_model_reads(conditions: Any, step: int) -> None:
    weights = TYPES.dropout.conditions if conditions == "mixed" else conditions
    cfg = replace(TYPES, dropout=DropoutConfig(text=0.5, conditions=weights))
    kinds, noisy = set(), 0
    for batch, tokens in prepared(cfg, step):
        pixels, ids = batch.pixels.float() / 127.5 - 1, batch.sample_ids
        by_chance = drop_text(SEED, step, ids, cfg.dropout)[0]
        drops = draw_drops(SEED, step, ids, weights) if weights else [None] * len(ids)
        for row, (one, drop) in enumerate(zip(given_of(batch, step, cfg.mask_types), drops, strict=True)):
            source = pixels[row : row + 1]
            if one.noise:
                source, noisy = noisy_pixels(source, [one.noise], SEED, step, ids[row : row + 1]), noisy + 1
            cond = torch.zeros_like(coded(source))
            known = torch.zeros(cond.shape[2], dtype=torch.bool)
            known[one.frames] = True
            if not (drop and drop.reference):
                cond[:, :, one.frames] = coded(source)[:, :, one.frames]
            assert torch.equal(tokens.inputs["cond"][row].float(), as_tokens(cond)[0])
            assert torch.equal(tokens.inputs["mask_index"][row], known)  # also of what is dropped
            mask = as_tokens(known[None, None, :, None, None].float().expand_as(cond))[0]
            assert torch.equal(tokens.inputs["cond_mask"][row].amax(-1), mask.amax(-1))
            expected = drop.text if drop and one.frames else by_chance[row] and not one.frames
            assert bool(tokens.inputs["dropped"][row]) == bool(expected)
            kinds.add((bool(one.frames), bool(expected)))
    assert noisy or step
    assert {given for given, _ in kinds} == {False, True}


def test_nothing_given_still_adds_the_biases() -> None:
    """As the original trains text to video: the embedders of given frames see zeros, and learn their biases."""
    for types, seen in (({"none": 1.0}, True), ({}, False)):
        model = plain_model(MODEL)
        for _, tokens in prepared(ConditioningConfig(mask_types=types)):
            assert ("cond" in tokens.inputs) == seen
            if seen:
                assert not tokens.inputs["cond"].any() and not tokens.inputs["cond_mask"].any()
                assert not tokens.inputs["mask_index"].any()
            model(**tokens.inputs).sum().backward()
        for name in ("x_embedder_cond", "x_embedder_cond_mask"):
            gradient = model.get_parameter(f"{name}.bias").grad
            assert (gradient is not None and bool(gradient.any())) == seen


def test_weights_in_the_loss_have_mean_one() -> None:
    cfg = replace(TYPES, known_weight=0.3)
    for batch, tokens in prepared(cfg, 1):
        assert tokens.weights is not None
        for row, one in enumerate(given_of(batch, 1, cfg.mask_types)):
            frames, count = batch.pixels.shape[2], len(set(one.frames))
            others = (frames - 0.3 * count) / (frames - count) if count < frames else 0.0
            wanted = torch.full((frames,), others, dtype=torch.float64)
            wanted[one.frames] = 0.3
            found = tokens.weights[row]
            assert torch.allclose(found, wanted[:, None].expand_as(found), rtol=1e-12)
