"""What a simulated device cannot see: faults of these kinds pass, so nobody may take it for a GPU."""

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from acceleration.attention.kernels import KERNELS
from tests.device import simulated
from tests.device.faults import UNSEEN
from tests.device.runs import with_faults
from tests.device.simulated import CUDA, LIMITS, simulated_cuda
from tests.dist.harness import run_distributed

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"


def test_faults_that_only_a_gpu_shows() -> None:
    """Copies without an order, and memory that a kernel may refuse to read, give the right numbers here."""
    (noticed,) = run_distributed(with_faults, 1, [fault.name for fault in UNSEEN], timeout=100)
    assert noticed == {fault.name: [] for fault in UNSEEN}


def blind() -> dict[str, Any]:
    found: dict[str, Any] = {"backend": dist.get_backend()}
    with simulated_cuda():
        q = torch.randn(1, 5, 2, 16, device=CUDA, dtype=torch.bfloat16)
        outs = [KERNELS[name].forward(q, q, q, None)[0].cpu() for name in ("cuda", "cudnn")]
        found["kernels have the same bits"] = torch.equal(*outs)
        found["memory"] = torch.cuda.max_memory_allocated(CUDA)
        found["a terabyte of pinned memory"] = not _raises(lambda: torch.empty(1, pin_memory=True).expand(2**38))
        wrong = {torch.ops.aten.gelu.default: lambda described, x, approximate="none": x}
        with mock.patch.dict(simulated._EMULATED, wrong), contextlib.suppress(AssertionError):
            found["wrong numbers of a kernel"] = torch.nn.functional.gelu(q).isfinite().all().item()
    return found


def _raises(run: Any) -> bool:
    try:
        run()
    except RuntimeError:
        return True
    return False


def test_what_is_not_there_to_be_seen() -> None:
    (found,) = run_distributed(blind, 1, timeout=100)
    assert found["backend"] == "gloo"  # no NCCL
    assert found["kernels have the same bits"]  # formulas, whatever kernel is asked for
    assert found["memory"] == 0 and found["a terabyte of pinned memory"]  # no allocator


def test_limits_are_documented() -> None:
    """The table in the docs is that of the simulator: a limit for everything that is not seen, and where to look."""
    text = DOCUMENT.read_text()
    for what, where in LIMITS.items():
        assert f"| {what} | {where} |" in text, what
