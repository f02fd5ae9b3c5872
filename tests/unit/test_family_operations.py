"""Operations of every family but MMDiT as the planner says and as torch counts them, at the published widths."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from acceleration.accounting.rank_layout import MicroBatch
from acceleration.distributed import mesh as meshes
from acceleration.sequence import SequenceParallel
from opensora.models.families import MODEL_SIZES, build_model, describe
from opensora.planner.flops import training_flops
from opensora.planner.forecast import Forecaster
from opensora.planner.meta_model import denoiser_inputs, structure
from opensora.utils.tokens import Grid

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PICTURE = 257  # tokens of a picture beside the text
SIZES = [
    (kind, size)
    for kind, sizes in MODEL_SIZES.items()
    for size in sizes
    if kind != "mmdit" and not size.startswith("debug")
]


def shapes(kind: str, size: str) -> Iterator[tuple[Grid, int, int]]:
    """(grid of tokens, samples, text tokens) of a still and of clips, sides from 16 tokens on and whole patches."""
    draw, denoising = random.Random(f"{kind} {size}"), describe(MODEL_SIZES[kind][size])
    for index in range(5):
        frames = 1 if index == 3 else denoising.patch[0] * draw.randint(2, 12)
        sides = [4 * draw.randint(8, 24) for _ in range(2)]
        yield denoising.grid((frames, sides[0], sides[1])), draw.randint(1, 3), draw.randint(1, 300)


def counted(cfg: Any, grid: Grid, samples: int, txt: int, *, known: bool, trained: bool = False) -> tuple[int, int]:
    """(the planner's, torch's) operations of a forward, or of forward and backward."""
    frames = grid.frames if describe(cfg).token_axes == "factored" else None
    picture = PICTURE if describe(cfg).image_dim else 0
    batch = MicroBatch(samples=samples, txt=txt, img=grid.tokens, frames=frames, has_mask=True, picture=picture)
    given = denoiser_inputs(cfg, batch, SequenceParallel(meshes.view({})), known=known)
    with torch.device("meta"):
        model = build_model(cfg)
    with FlopCounterMode(display=False) as counter:
        out = model(**given | ({"grid": grid.sides} if "grid" in given else {}))
        if trained:
            out.sum().backward()
    forward = Forecaster.flops_of(structure(cfg, known), batch)
    return training_flops(forward) if trained else forward, counter.get_total_flops()


@pytest.mark.parametrize(("kind", "size"), SIZES)
def test_forwards_of_drawn_shapes(kind: str, size: str) -> None:
    """With and without frames that are known; exact but for windows, whose number in a frame of so many tokens is that
    of one near to a square."""
    cfg = replace(MODEL_SIZES[kind][size], depth=3)
    for index, (grid, samples, txt) in enumerate(shapes(kind, size)):
        known = describe(cfg).references != "none" and index % 2 == 0
        said, torchs = counted(cfg, grid, samples, txt, known=known)
        assert said == pytest.approx(torchs, rel=0.01 if getattr(cfg, "kernel_size", None) else 1e-12), grid


@pytest.mark.parametrize(("kind", "size"), SIZES)
def test_forward_and_backward_of_the_whole_model(kind: str, size: str) -> None:
    """The text has no gradient, which the planner does not know: a small part of a whole model's operations."""
    cfg = MODEL_SIZES[kind][size]
    grid, samples, txt = next(shapes(kind, size))
    said, torchs = counted(cfg, grid, samples, txt, known=False, trained=True)
    assert said == pytest.approx(torchs, rel=0.01)
