"""One training step (forward and backward) of our MMDiT against diffusers' Flux of the same shape.

Both hold the same weights and read the same inputs, in turn in one process, so that the ratio survives a busy machine.
Beside the times stand the floating-point operations per second that they are, and those of matrix products alone at the
shape of the model's widest layer, measured in the same rounds: how much of the machine a step reaches.

    python -m benchmarks.step_vs_diffusers
    python -m benchmarks.step_vs_diffusers --device cuda --dtype bf16 --hidden 3072 --heads 24 --frames 9 --side 32
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from opensora.models.families import build_model, init_model_
from opensora.models.mmdit import MMDiTConfig
from opensora.models.mmdit.convert import LAYOUTS, flux_to_diffusers
from opensora.utils.tokens import image_ids

MATMUL = "matrix products"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def config(args: argparse.Namespace, layout: str) -> MMDiTConfig:
    head_dim = args.hidden // args.heads
    side = head_dim * 7 // 16 // 2 * 2
    return MMDiTConfig(
        vec_in_dim=64,
        context_in_dim=256,
        hidden_size=args.hidden,
        num_heads=args.heads,
        depth=args.depth,
        depth_single_blocks=args.single,
        axes_dim=(head_dim - 2 * side, side, side),
        cond_embed=False,
        fused_qkv=LAYOUTS[layout].fused_qkv,
        rope_layout=LAYOUTS[layout].rope_layout,
    )


def flux_like(cfg: MMDiTConfig) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=cfg.in_channels,
        num_layers=cfg.depth,
        num_single_layers=cfg.depth_single_blocks,
        attention_head_dim=cfg.head_dim,
        num_attention_heads=cfg.num_heads,
        joint_attention_dim=cfg.context_in_dim,
        pooled_projection_dim=cfg.vec_in_dim,
        axes_dims_rope=cfg.axes_dim,
    )


def make_inputs(args: argparse.Namespace, cfg: MMDiTConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    grid = (args.frames, args.side, args.side)
    ids = image_ids(grid, 1, device).expand(args.batch, -1, -1)  # (B, N, 3)
    return {
        "img": randn(args.batch, ids.shape[1], cfg.in_channels),
        "img_ids": ids,
        "txt": randn(args.batch, args.text, cfg.context_in_dim),
        "txt_ids": torch.zeros(args.batch, args.text, 3, device=device),
        "timesteps": torch.rand(args.batch, generator=generator).to(device),
        "y_vec": randn(args.batch, cfg.vec_in_dim),
    }


def diffusers_inputs(given: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_states": given["img"],
        "encoder_hidden_states": given["txt"],
        "pooled_projections": given["y_vec"],
        "timestep": given["timesteps"],
        "img_ids": given["img_ids"][0],
        "txt_ids": given["txt_ids"][0],
        "return_dict": False,
    }


def seconds(model: nn.Module, given: dict[str, Any], device: torch.device) -> float:
    """One forward and backward; gradients are dropped first, as an optimizer step would."""
    model.zero_grad(set_to_none=True)
    settle: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    settle()
    start = time.perf_counter()
    out = model(**given)
    (out[0] if isinstance(out, tuple) else out).float().square().mean().backward()
    settle()
    return time.perf_counter() - start


def step_flops(model: nn.Module, given: dict[str, Any], device: torch.device) -> int:
    """Floating-point operations of one forward and backward, counted as they run."""

    def attention(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def attention_backward(grad: Any, q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    aten = torch.ops.aten  # torch's counter passes over these two
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        seconds(model, given, device)
    return counter.get_total_flops()


class MatrixProducts(nn.Module):
    """A linear layer of the model's greatest width on all its tokens: the rate that the machine has for products."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.up = nn.Linear(args.hidden, 4 * args.hidden, bias=False)
        self.down = nn.Linear(4 * args.hidden, args.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):  # so that loss and gradients of the input weigh little
            x = self.down(self.up(x))
        return x


def measure(args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every round, and operations of a step, of each rival and of matrix products alone."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    rivals: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
    for layout in LAYOUTS:
        cfg = config(args, layout)
        with device:
            rivals[f"ours, {layout} layout"] = (build_model(cfg).to(dtype), make_inputs(args, cfg, device, dtype))
    ours, given = rivals["ours, flux layout"]
    init_model_(ours, seed=0)  # type: ignore[arg-type]
    with device:
        theirs = flux_like(config(args, "flux"))
    theirs.load_state_dict(flux_to_diffusers(ours.state_dict()))
    rivals["diffusers"] = (theirs.to(dtype), diffusers_inputs(given))
    rows = args.batch * (args.text + args.frames * args.side**2)
    with device:
        products = MatrixProducts(args).to(dtype)
        rivals[MATMUL] = (products, {"x": torch.randn(rows, args.hidden, dtype=dtype, requires_grad=True)})
    times: dict[str, list[float]] = {name: [] for name in rivals}
    flops = {name: step_flops(model, inputs, device) for name, (model, inputs) in rivals.items()}  # warms up, too
    end = time.perf_counter() + args.seconds
    while time.perf_counter() < end or len(times["diffusers"]) < 3:
        for name, (model, inputs) in rivals.items():
            times[name].append(seconds(model, inputs, device))
    return times, flops


def paired_ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over rounds, each against its own neighbour in time: load that lasts a round cancels."""
    return statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--depth", type=int, default=2, help="double-stream blocks")
    parser.add_argument("--single", type=int, default=4, help="single-stream blocks")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--frames", type=int, default=3, help="latent frames")
    parser.add_argument("--side", type=int, default=8, help="tokens per frame side")
    parser.add_argument("--text", type=int, default=64, help="text tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 bears neighbours best")
    parser.add_argument("--seconds", type=float, default=16.0, help="how long to measure, after a warm-up")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    times, flops = measure(args)
    rates = {name: flops[name] / min(values) / 1e9 for name, values in times.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    tokens = args.frames * args.side**2
    print(
        f"forward + backward, {args.device} {args.dtype}, batch {args.batch}, {tokens} image + {args.text} text tokens,"
    )
    print(f"hidden {args.hidden}, {args.depth} double + {args.single} single blocks, {len(times['diffusers'])} rounds")
    print(f"{'':28}{'median ms':>10}{'min ms':>10}{'of diffusers':>14}{'GFLOP/s':>10}{'of products':>13}")
    ratios = {name: paired_ratio(values, times["diffusers"]) for name, values in times.items()}
    for name, median in medians.items():
        against = f"{ratios[name]:14.3f}" if name != MATMUL else f"{'':14}"
        speed = f"{rates[name]:10.1f}{rates[name] / rates[MATMUL]:13.1%}"
        print(f"{name:28}{1e3 * median:10.1f}{1e3 * min(times[name]):10.1f}{against}{speed}")
    record = {
        "benchmark": "step_vs_diffusers",
        **vars(args),
        "rounds": len(times["diffusers"]),
        "median_s": {name: round(median, 5) for name, median in medians.items()},
        "ratio_to_diffusers": {name: round(ratio, 4) for name, ratio in ratios.items() if name.startswith("ours")},
        "gflop_per_s": {name: round(rate, 1) for name, rate in rates.items()},
        "torch": torch.__version__,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
