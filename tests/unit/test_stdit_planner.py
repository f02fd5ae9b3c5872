"""What the planner says of STDiT, STDiT2 and STDiT3: operations as torch counts them, and tokens that meet."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from acceleration.accounting.rank_layout import MicroBatch
from acceleration.distributed import mesh as meshes
from acceleration.sequence import SequenceParallel
from opensora.models.families import MODEL_SIZES, build_model, describe, family_of
from opensora.models.layers.attention import SDPACore
from opensora.models.stdit.windows import WindowCore, pairs
from opensora.planner.forecast import Forecaster
from opensora.planner.meta_model import denoiser_inputs, structure
from opensora.utils.tokens import Grid

_SLOW = pytest.mark.slow
CASES = [
    pytest.param("stdit", "xl2", (16, 32, 32), marks=_SLOW),
    pytest.param("stdit2", "xl2", (5, 33, 60), marks=_SLOW),
    ("stdit3", "xl2", (15, 30, 53)),
    pytest.param("stdit3", "3b2", (1, 64, 64), marks=_SLOW),
    pytest.param("stdit3", "xl2_v1_3", (13, 64, 96), marks=_SLOW),  # whole windows
    ("stdit3", "xl2_v1_3", (25, 90, 160)),  # 720 pixels: 45 rows are five windows and a part of one
]


def inputs(cfg: Any, grid: Grid, samples: int, txt: int) -> tuple[MicroBatch, dict[str, Any]]:
    """A micro-batch, and what the forward is given, on the meta device with the sides of its frames."""
    batch = MicroBatch(samples=samples, txt=txt, img=grid.tokens, frames=grid.frames, has_mask=True)
    given = denoiser_inputs(cfg, batch, SequenceParallel(meshes.view({})))
    return batch, given | ({"grid": grid.sides} if "grid" in given else {})


@pytest.mark.parametrize(("kind", "size", "latents"), CASES)
def test_operations_are_those_that_torch_counts(kind: str, size: str, latents: tuple[int, int, int]) -> None:
    cfg = replace(MODEL_SIZES[kind][size], depth=3)
    batch, given = inputs(cfg, describe(cfg).grid(latents), 2, 300)
    with torch.device("meta"):
        model = build_model(cfg)
    counter = FlopCounterMode(display=False)
    with counter:
        model(**given)
    counted = counter.get_total_flops()
    assert abs(Forecaster.flops_of(structure(cfg), batch) - counted) <= 0.01 * counted


def met(cfg: Any, grid: Grid) -> int:
    """Pairs of queries and keys in a layer of each kind, as cores are given them."""
    with torch.device("meta"):
        model = build_model(replace(cfg, depth=1))
    found = []

    def note(module: Any, args: Any) -> None:
        q, k = args[0], args[1]
        found.append(q.shape[0] * q.shape[1] * k.shape[1])

    for name, module in model.named_modules():
        if isinstance(module, SDPACore) and "cross_attn" not in name:
            module.register_forward_pre_hook(note)
    model(**inputs(cfg, grid, 1, 5)[1])
    return sum(found)


@pytest.mark.parametrize("kind", ["stdit", "stdit2", "stdit3"])
@pytest.mark.parametrize("latents", [(4, 10, 12), (1, 16, 6), (7, 30, 34)])
def test_tokens_that_meet(kind: str, latents: tuple[int, int, int]) -> None:
    sizes = MODEL_SIZES[kind]
    for cfg in (sizes["debug"], *([sizes["debug_v1_3"]] if kind == "stdit3" else [])):
        denoising = describe(cfg)
        grid = denoising.grid(latents)
        assert denoising.attention_pairs(grid) == met(cfg, grid)


def test_pairs_in_windows_are_those_of_every_token_with_its_window() -> None:
    """Counted one by one, also where windows are cut off at the edge and where they have a length in time."""
    for window in ((2, 3, -1), (3, 2, 2), (1, 4, 3), (5, 5, -1)):
        for grid in ((3, 5, 7), (4, 6, 3), (1, 1, 1), (5, 2, 8)):
            height, width, length = window
            of = [
                (t // (length if length > 0 else grid[0]), h // height, w // width)
                for t in range(grid[0])
                for h in range(grid[1])
                for w in range(grid[2])
            ]
            assert pairs(grid, window) == sum(a == b for a in of for b in of), (window, grid)


@pytest.mark.parametrize("window", [(2, 3, -1), (3, 2, 2), (1, 4, 3), (5, 5, -1)])
@pytest.mark.parametrize("grid", [(3, 5, 7), (4, 6, 3), (1, 1, 1), (5, 2, 8)])
def test_windows_are_padding_and_masks_written_out(window: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
    """Against attention over all tokens in which nothing is seen beyond a token's window."""
    generator = torch.Generator().manual_seed(0)
    frames, rows, columns = grid
    q, k, v = torch.randn(3, 2, frames, rows * columns, 3, 4, generator=generator, dtype=torch.float64)
    found = WindowCore(window)(q, k, v, grid=grid)
    height, width, length = window
    index = torch.arange(frames * rows * columns)
    t, h, w = index // (rows * columns), index // columns % rows, index % columns
    number = t // (length if length > 0 else frames) * 10_000 + h // height * 100 + w // width
    flat = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    scores = flat[0] @ flat[1].transpose(-1, -2) / 2
    scores = scores.masked_fill(number[:, None] != number, float("-inf"))
    truth = (scores.softmax(-1) @ flat[2]).transpose(1, 2).unflatten(1, (frames, rows * columns))
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)


def test_lora_targets_name_layers() -> None:
    from acceleration import lora
    from acceleration.config import LoraConfig

    for kind in ("stdit", "stdit2", "stdit3"):
        cfg = MODEL_SIZES[kind]["debug"]
        with torch.device("meta"):
            names = lora.apply(build_model(cfg), LoraConfig(rank=2, targets=family_of(cfg).lora_targets))
        assert len(names) == cfg.depth * {"stdit": 9, "stdit2": 9, "stdit3": 14}[kind]
