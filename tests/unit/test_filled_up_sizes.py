"""Latents that are no whole patches: filled up with zeros before a model, cut off behind it, and in no loss."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from acceleration.distributed import mesh as meshes
from acceleration.sequence import SequenceParallel
from opensora.assembly.token_layout import token_layout
from opensora.models.families import describe
from opensora.models.stdit import STDiT3Config, STDiTConfig
from opensora.train.preparation import loss_share
from tests.dist.stdit import MODELS, batches, plain_model, preparation

SIZES = [(1, 1, 1), (2, 3, 5), (5, 4, 7), (3, 6, 8), (4, 5, 4)]


def layout(**shape: Any) -> Any:
    cfg = STDiT3Config(hidden_size=24, depth=1, num_heads=2, caption_channels=6, **shape)
    return token_layout(cfg, SequenceParallel(meshes.view({})))


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3), (2, 2, 2)])
@pytest.mark.parametrize("size", SIZES)
def test_zeros_at_the_end_of_every_axis(patch: tuple[int, int, int], size: tuple[int, int, int]) -> None:
    tokens, (pt, ph, pw) = layout(patch_size=patch), patch
    x = torch.randn(2, 4, *size)
    ends = [-side % one for side, one in zip(size, patch, strict=True)]
    whole = F.pad(x, (0, ends[2], 0, ends[1], 0, ends[0]))
    truth = rearrange(whole, "b c (t pt) (h ph) (w pw) -> b t (h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
    grid = tokens.denoising.grid(size)
    assert torch.equal(tokens.patchify(x), truth)
    assert torch.equal(tokens.unpatchify(truth, grid), x)
    assert (grid.frames, grid.places) == truth.shape[1:3] and grid.tokens == grid.frames * grid.places
    positions = tokens.positions(grid, 2, "cpu")
    assert positions.shape == (*truth.shape[:3], 3)
    assert positions.amax(dim=(0, 1, 2)).tolist() == [side - 1 for side in grid.sides]
    inside, filled = tokens.inside(grid, "cpu"), F.pad(torch.ones_like(x[:1]), (0, ends[2], 0, ends[1], 0, ends[0]))
    wanted = rearrange(filled, "b c (t pt) (h ph) (w pw) -> b t (h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw).bool()
    assert wanted.all() if inside is None else torch.equal(inside, wanted)


@pytest.mark.parametrize("reduction", ["elements", "samples"])
@pytest.mark.parametrize("model", ["stdit3", "windows"])
def test_the_loss_is_over_latents_alone(model: str, reduction: Any) -> None:
    """Written out on latents, where nothing was filled up."""
    cfg: Any = MODELS[model]
    network, prepare = plain_model(cfg), replace(preparation(cfg, meshes.view({})), reduction=reduction)
    layout_ = prepare.layout
    for batch in batches(cfg, 0):
        tokens = prepare(batch, 0)  # type: ignore[arg-type]
        grid = layout_.denoising.grid(tuple(batch.pixels.shape[2:]))
        with torch.no_grad():
            found = loss_share(network, tokens, 7)
            halves = network(**tokens.inputs).chunk(2, dim=-1)
        mean, log_variance = (layout_.unpatchify(half, grid) for half in halves)
        target = layout_.unpatchify(tokens.targets["velocity"].double(), grid)
        loss = 0.5 * (log_variance + (mean - target) ** 2 / log_variance.exp())
        counted = torch.ones_like(loss)
        if tokens.learned is not None:
            counted = counted * tokens.learned.all(dim=2)[:, None, :, None, None]  # frames
        truth = (loss * counted).sum()
        if reduction == "samples":
            truth = sum(one[is_counted.bool()].mean() for one, is_counted in zip(loss, counted, strict=True))
        torch.testing.assert_close(found, truth / 7, rtol=1e-12 if reduction == "elements" else 1e-6, atol=0)


def test_only_models_that_fill_up_take_such_sizes() -> None:
    wide, plain = describe(STDiT3Config()), describe(STDiTConfig())
    assert (wide.pixel_multiple((4, 8, 8)), plain.pixel_multiple((4, 8, 8))) == (8, 16)
    tokens = token_layout(STDiTConfig(), SequenceParallel(meshes.view({})))
    with pytest.raises(ValueError, match="do not divide into patches"):
        tokens.patchify(torch.zeros(1, 4, 2, 3, 4))
