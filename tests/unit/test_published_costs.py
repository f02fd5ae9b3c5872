"""Operations that the planner says models take at the sizes they are used at, and formulas: products of blocks, pairs
of tokens, pairs of tokens and text."""

from typing import Any

import pytest

from acceleration.accounting.rank_layout import MicroBatch
from opensora.models import hunyuan_video
from opensora.models.wan import SIZES
from opensora.planner.forecast import Forecaster
from opensora.planner.meta_model import structure

TEXT = 512  # tokens that every prompt of Wan is filled up to


def planned(cfg: Any, img: int, txt: int = TEXT, **more: int) -> int:
    return Forecaster.flops_of(structure(cfg), MicroBatch(samples=1, txt=txt, img=img, **more))


@pytest.mark.parametrize(
    ("size", "height", "width", "pflop"),
    [
        ("t2v_1_3b", 480, 832, 0.28),
        ("t2v_14b", 480, 832, 1.68),
        ("t2v_14b", 720, 1280, 6.52),
        ("t2v_a14b", 720, 1280, 6.52),
    ],
)
def test_wan_as_published(size: str, height: int, width: int, pflop: float) -> None:
    """81 frames are 21 latent ones; a token spans 16 x 16 pixels."""
    cfg, tokens = SIZES[size], 21 * (height // 16) * (width // 16)
    hidden = cfg.hidden_size
    of_blocks = cfg.depth * (6 * hidden**2 + 2 * hidden * cfg.ffn_dim)
    formula = 2 * of_blocks * tokens + 4 * (tokens**2 + tokens * TEXT) * hidden * cfg.depth
    found = planned(cfg, tokens)
    assert found / 1e15 == pytest.approx(pflop, abs=0.006)
    # Beside it: text through its layers and the keys and values of every block, the first and the last layer.
    text = 2 * TEXT * (4096 * hidden + hidden**2 + cfg.depth * 2 * hidden**2)
    edges = 2 * tokens * hidden * 2 * cfg.token_values
    time = 2 * (256 * hidden + hidden**2 + 6 * hidden**2)
    assert found == formula + text + edges + time


def test_a_picture_costs_what_its_keys_and_values_do() -> None:
    cfg, tokens, picture = SIZES["i2v_14b"], 32760, 257
    hidden = cfg.hidden_size
    beside = planned(cfg, tokens, picture=picture) - planned(cfg, tokens)
    layers = 2 * picture * (1280**2 + 1280 * hidden + cfg.depth * 2 * hidden**2)
    assert beside == layers + 4 * tokens * picture * hidden * cfg.depth


def test_hunyuan_video_as_published() -> None:
    """129 frames of 720 x 1280 are 33 latent ones."""
    cfg, tokens, text = hunyuan_video.SIZES["13b"], 33 * 45 * 80, 256
    hidden, both = cfg.hidden_size, 118800 + 256
    per_token = 60 * (4 * hidden**2 + 2 * hidden * cfg.mlp_hidden)  # in a block of either kind: q, k, v, output; MLP
    assert tokens == 118800 and per_token == pytest.approx(6.795e9, rel=1e-3)
    formula = 2 * per_token * both + 4 * both**2 * hidden * 60
    found = planned(cfg, tokens, text)
    assert found / 1e15 == pytest.approx(12.1, abs=0.05)
    # Beside it: the refiner with its attention, modulations, vectors, the first and the last layer.
    of_refiner = 4 * hidden**2 + 2 * hidden * 4 * hidden
    refiner = 2 * text * (4096 * hidden + 2 * of_refiner) + 2 * 4 * text**2 * hidden
    modulations = 20 * 2 * 6 * hidden**2 + 40 * 3 * hidden**2 + 2 * 2 * hidden**2 + 2 * hidden**2
    vectors = 3 * (256 * hidden + hidden**2) + (768 + 4096) * hidden + 2 * hidden**2
    edges = 2 * tokens * hidden * 2 * 64
    assert found == formula + refiner + 2 * (modulations + vectors) + edges
