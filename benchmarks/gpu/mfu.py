"""Model FLOP utilisation of one GPU: blocks of the 11B MMDiT at the lengths that training has, forward and backward.

    python -m benchmarks.gpu.mfu --tokens 8828 37000 --recompute none full [--compile]

A share of the model's blocks stands for the whole (weights, gradients and activations of 11B do not fit one GPU at
every length): the cost of a block does not depend on how many there are. FLOPs are those of the model, 2 per
multiplication, backward twice the forward, recomputation not counted; the peak is that of dense bf16. Not run yet.
"""

import argparse
import json
import statistics
import time

import torch
from torch import Tensor

from acceleration.config import CompileConfig, MeshConfig, ParallelConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed import runtime
from acceleration.parallelize import parallelize
from opensora.models.families import build_model
from opensora.models.mmdit import MMDiTConfig

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, data sheets of the SXM boards
TEXT = 512


def flops(cfg: MMDiTConfig, tokens: int) -> float:
    """Of one forward pass over ``tokens`` image and TEXT text tokens: linear layers and attention of all blocks."""
    width, mlp = cfg.hidden_size, cfg.mlp_ratio
    whole = tokens + TEXT
    linear = 2 * width**2 * (4 + 2 * mlp) * whole
    attention = 4 * whole**2 * width
    return (cfg.depth + cfg.depth_single_blocks) * (linear + attention)


def drawn_values(name: str, tensor: Tensor) -> None:
    """Weights as small as a model's, in no time: a million draws, over and over."""
    draw = torch.randn(min(tensor.numel(), 2**20), generator=torch.Generator().manual_seed(len(name))) * 0.02
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), len(draw)):
        part = flat[start : start + len(draw)]
        part.copy_(draw[: len(part)])


def measure(
    cfg: MMDiTConfig, tokens: int, recompute: str, rounds: int, compiled: bool = False, text: int = TEXT
) -> tuple[float, float]:
    """(median seconds of forward and backward, peak GiB)."""
    device = torch.device("cuda", torch.cuda.current_device())
    # Of one length at a time, so that the compiler may know it.
    compile_cfg = CompileConfig(enabled=compiled, dynamic=False)
    parallel = ParallelConfig(zero=0, recompute=RecomputeConfig(kind=recompute), compile=compile_cfg)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = build_model(cfg)
    mesh = meshes.build(MeshConfig(), 1, device)
    parallelize(model, parallel, mesh, device, drawn_values)
    inputs = {
        "img": torch.randn(1, tokens, cfg.in_channels, device=device),
        "img_ids": torch.zeros(1, tokens, 3, device=device),
        "txt": torch.randn(1, text, cfg.context_in_dim, device=device),
        "txt_ids": torch.zeros(1, text, 3, device=device),
        "timesteps": torch.rand(1, device=device),
        "y_vec": torch.randn(1, cfg.vec_in_dim, device=device),
        "cond": torch.zeros(1, tokens, cfg.cond_channels, device=device) if cfg.cond_embed else None,
    }
    times = []
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(rounds + 2):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        model(**inputs).float().square().mean().backward()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
        model.zero_grad()
    return statistics.median(times[2:]), torch.cuda.max_memory_allocated(device) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8828, 37000], help="image tokens")
    parser.add_argument("--recompute", nargs="+", default=["none", "full"])
    parser.add_argument("--double", type=int, default=2, help="double-stream blocks")
    parser.add_argument("--single", type=int, default=4, help="single-stream blocks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile of every block")
    args = parser.parse_args()
    runtime.start(60)
    name = torch.cuda.get_device_name()
    peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
    cfg = MMDiTConfig(depth=args.double, depth_single_blocks=args.single)
    print(f"{name}, torch {torch.__version__}, {args.double} double + {args.single} single blocks of 11B, bf16")
    print(f"{'tokens':>8}{'recompute':>11}{'ms':>9}{'TFLOP/s':>9}{'MFU':>8}{'GiB':>7}")
    for tokens in args.tokens:
        for recompute in args.recompute:
            try:
                seconds, gib = measure(cfg, tokens, recompute, args.rounds, args.compile)
            except torch.OutOfMemoryError:
                print(f"{tokens:>8}{recompute:>11}   out of memory")
                continue
            rate = 3 * flops(cfg, tokens) / seconds
            share = f"{rate / peak:>8.1%}" if peak else f"{'?':>8}"
            print(f"{tokens:>8}{recompute:>11}{seconds * 1e3:>9.1f}{rate / 1e12:>9.1f}{share}{gib:>7.1f}")
            record = {"benchmark": "mfu", "tokens": tokens, "recompute": recompute, "compile": args.compile}
            found = {"s": seconds, "tflops": rate / 1e12, "mfu": rate / peak if peak else None, "gib": gib}
            print(json.dumps({**record, **found}), flush=True)
    runtime.stop()


if __name__ == "__main__":
    main()
