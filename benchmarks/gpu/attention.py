"""Attention kernels of one GPU, forward and backward, at the lengths and head sizes of the 11B MMDiT.

    python -m benchmarks.gpu.attention [--tokens 8828 37000] [--kernels cuda cudnn flex]

``model`` is the model's own core, torch's ``scaled_dot_product_attention``; the others are those of
``parallel.attention``. FLOPs are 4 n^2 d forward and two and a half times as many backward (scores are computed again).
"""

import argparse
import json
import statistics
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from acceleration.attention.core import KernelCore
from acceleration.attention.kernels import KERNELS, PACKAGES
from opensora.models.layers.attention import SDPACore

HEADS, DIM = 24, 128
CUDA = torch.device("cuda", 0)


def kernels() -> list[str]:
    """What this machine can run."""
    return ["model", "cuda", "cudnn", "flex", *(name for name, (module, _) in PACKAGES.items() if find_spec(module))]


def seconds(run: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Median time of ``run`` on the device, after two that do not count."""
    times = []
    for turn in range(rounds + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize(device)
        if turn >= 2:
            times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def measure(name: str, tokens: int, rounds: int, heads: int = HEADS, dim: int = DIM) -> tuple[float, float]:
    """(seconds of forward, of forward and backward) of one sequence in bf16."""
    core: nn.Module = SDPACore() if name == "model" else KernelCore(KERNELS[name])
    q, k, v = (
        torch.randn(1, tokens, heads, dim, device=CUDA, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    grad = torch.randn(1, tokens, heads, dim, device=CUDA, dtype=torch.bfloat16)

    def forward() -> Tensor:
        out: Tensor = core(q, k, v)
        return out

    def both() -> None:
        q.grad = k.grad = v.grad = None
        forward().backward(grad)

    with torch.no_grad():
        ahead = seconds(forward, rounds, CUDA)
    return ahead, seconds(both, rounds, CUDA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8828, 37000], help="text and image tokens")
    parser.add_argument("--kernels", nargs="+", default=kernels())
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    failed = False
    for tokens in args.tokens:
        for name in args.kernels:
            try:
                ahead, whole = measure(name, tokens, args.rounds)
            except Exception as error:  # the next kernel may work
                failed = True
                print(f"{name} at {tokens} tokens: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
                continue
            work = 4 * tokens**2 * HEADS * DIM
            record = {
                "benchmark": "attention",
                "kernel": name,
                "tokens": tokens,
                "forward_ms": ahead * 1e3,
                "both_ms": whole * 1e3,
                "forward_tflops": work / ahead / 1e12,
                "both_tflops": 3.5 * work / whole / 1e12,
            }
            print(json.dumps(record), flush=True)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
