"""The benchmarks of a GPU run on the simulated one: what they would stumble over on the first day is found before."""

from argparse import Namespace
from typing import Any

import pytest

from acceleration.distributed import runtime
from benchmarks import diffusers_1x, step_1x
from benchmarks.gpu import attention, data, mfu, sampling
from opensora.models.mmdit import MMDiTConfig
from opensora.sampling.options import SamplingOption
from tests.device.simulated import simulated_cuda
from tests.dist.harness import run_distributed

TINY = MMDiTConfig(
    hidden_size=64, num_heads=4, depth=1, depth_single_blocks=1, axes_dim=(4, 6, 6), context_in_dim=48, vec_in_dim=32
)
STEP = Namespace(device="cuda", dtype="fp32", shape="tiny", seconds=0.0)


def runs() -> dict[str, Any]:
    """Every function that measures, small."""
    from diffusers import LatteTransformer3DModel, PixArtTransformer2DModel  # noqa: F401  they ask for a real device

    with simulated_cuda():
        device = runtime.torch.device("cuda", 0)
        parts = sampling.build(TINY, device, text_tokens=6)
        small = SamplingOption(width=32, height=32, num_frames=5, num_steps=2)
        return {
            "mfu": [mfu.measure(TINY, 40, kind, 1, text=6) for kind in ("none", "full")],
            "attention": [attention.measure(name, 24, 1, heads=2, dim=16) for name in ("model", "cuda", "cudnn")],
            "sampling": sampling.measure(parts, small),
            "data": (data.copies(5, rounds=1), data.prepared(5, TINY, rounds=1, size=(32, 32))),
            "step_1x": [step_1x.against_diffusers(kind, STEP) for kind in diffusers_1x.RIVALS],
        }


def test_benchmarks_run_on_the_simulated_device() -> None:
    (found,) = run_distributed(runs, 1, timeout=100)
    assert all(seconds > 0 for seconds, _ in found["mfu"]) and len(found["attention"]) == 3
    assert found["sampling"][0] > 0
    assert found["data"][0].keys() == {"pinned_gb_s", "plain_gb_s"}
    assert max(difference for row in found["step_1x"] for difference in row["apart"].values()) <= 1e-5


def test_clips_are_read() -> None:
    """Rendered, indexed and loaded as ``benchmarks.gpu.data`` does."""
    assert data.read(16)["clips_per_s"] > 0


def test_model_flops_are_those_of_its_layers() -> None:
    """6 parameters and token forward and backward, but for attention: the formula must not count a fantasy."""
    cfg = MMDiTConfig(depth=2, depth_single_blocks=4)
    width, tokens = cfg.hidden_size, 1000
    whole = tokens + mfu.TEXT
    linear_weights = 6 * (4 * width**2 + 2 * cfg.mlp_ratio * width**2)
    attention_flops = 6 * 4 * whole**2 * width
    assert mfu.flops(cfg, tokens) == pytest.approx(2 * linear_weights * whole + attention_flops)
