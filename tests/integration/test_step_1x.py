"""benchmarks/step_1x.py, tiny: what it compares is the same, and it counts what it says."""

from argparse import Namespace
from typing import Any

import pytest
import torch

from benchmarks import step_1x
from benchmarks.diffusers_1x import RIVALS
from tests.dist.harness import run_distributed

TINY = Namespace(device="cpu", dtype="fp32", shape="tiny", seconds=0.0)


@pytest.mark.parametrize("kind", RIVALS)
def test_ours_and_diffusers_compute_the_same(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = step_1x.against_diffusers(kind, TINY)
    assert max(row["apart"].values()) <= 1e-5
    assert row["rounds"] >= 3 and all(
        row[part][who] > 0 for part in ("passes", "step") for who in ("ours", "diffusers")
    )
    assert all(row["step"][who] >= row["passes"][who] for who in ("ours", "diffusers"))
    step_1x.print_rows([row], TINY)
    assert f"{row['passes_ratio']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", RIVALS)
def test_a_weight_that_differs_is_seen(kind: str) -> None:
    """In the last layer and in the middle, by the output or by the gradient."""
    for number in (0, -1):
        rivals = RIVALS[kind](step_1x.SHAPES["tiny"][kind], torch.device("cpu"), torch.float32)
        weights = [p for name, p in rivals["ours"].model.named_parameters() if name.endswith("fc1.weight")]
        with torch.no_grad():
            weights[number].mul_(1.5)
        assert max(step_1x.apart(rivals).values()) > 1e-3


def shared(seconds: float) -> dict[str, Any]:
    return step_1x.shared_steps(step_1x.SHARED["tiny"], torch.device("cpu"), "fp32", seconds)


def test_switch_and_ulysses_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    """Their bytes: a block in space takes (B, T, S, D) to frames and back, or q, k, v and the output to heads."""
    shape = step_1x.SHARED["tiny"]
    values = shape.batch * shape.frames * (shape.side // 2) ** 2 * shape.hidden
    sent_away = values // 4  # half of what a process holds, which is half
    for found in run_distributed(shared, 2, 0.0, timeout=100):
        assert found["bytes"] == {"switch": 2 * 2 * 4 * sent_away, "ulysses": 2 * 4 * 4 * sent_away}
        assert found["formula"] == found["bytes"]["switch"]
        assert found["rounds"] >= 3 and min(found["step_s"].values()) > 0
    step_1x.print_sharing(found)
    assert "as predicted" in capsys.readouterr().out
