"""Operations that the planner says models take at the sizes they are used at, and formulas: products of blocks, pairs
of tokens, pairs of tokens and text."""

import pytest

from acceleration.accounting.rank_layout import MicroBatch
from opensora.models.wan import SIZES, WanConfig
from opensora.planner.forecast import Forecaster
from opensora.planner.meta_model import structure

TEXT = 512  # tokens that every prompt of Wan is filled up to


def planned(cfg: WanConfig, img: int, **more: int) -> int:
    return Forecaster.flops_of(structure(cfg), MicroBatch(samples=1, txt=TEXT, img=img, **more))


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
