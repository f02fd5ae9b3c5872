"""What step caches save and what they cost: seconds a clip, and PSNR and SSIM against sampling without one.

    python -m benchmarks.step_caches [RUN] [--clips 8] [--steps 50] [--only KIND] [--ratios] [overrides]

RUN is the run folder, or export, of a trained model, as what an untrained one does from step to step says nothing;
without one it is the model of the rendered shapes that comes with the package. Every cache samples the same prompts and
seeds, one clip at a time, and each is timed between two runs without a cache, so that the speed-up is a ratio of
neighbours; on a CPU in processor time, which a busy machine does not stretch. PSNR is 10 log10(4 / mean squared error)
in [-1, 1], SSIM that of Wang et al. (2004), both means over clips. ``--ratios`` measures what MagCache is calibrated
with, and adds it. The last line is JSON.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from acceleration.distributed import runtime as runtimes
from data_pipeline.shapes.render import COLOURS, DIRECTIONS, SHAPES
from opensora.assembly.components import Components
from opensora.cli.main import run_cli
from opensora.config.load import load_config
from opensora.config.run import SampleConfig
from opensora.inference.check import check_step_cache
from opensora.inference.find import find_source
from opensora.inference.load import load_components
from opensora.inference.pipeline import build_api, fit
from opensora.models.layers.stages import Stage, Streams, run_in_order
from opensora.pretrained import SHAPES as PRETRAINED
from opensora.sampling.caches import (
    CacheConfig,
    DBCache,
    Decision,
    FirstBlockCache,
    MagCache,
    PyramidAttentionBroadcast,
    TeaCache,
)
from opensora.sampling.guidance import passes_per_step
from opensora.sampling.options import SamplingOption
from opensora.utils.errors import UserError

CONFIG = "configs/sample/demo.yaml"
CACHES: tuple[CacheConfig, ...] = (
    *(FirstBlockCache(threshold=threshold) for threshold in (0.05, 0.1, 0.2, 0.4)),
    *(DBCache(threshold=threshold, first_blocks=2, last_blocks=1) for threshold in (0.08, 0.2)),
    *(TeaCache(threshold=threshold, coefficients=(1.0, 0.0)) for threshold in (0.1, 0.2, 0.4)),
    *(PyramidAttentionBroadcast(spatial=every) for every in (2, 3)),
)


class Sampled(NamedTuple):
    """All clips with one cache."""

    pixels: Tensor  # (B, 3, T, H, W) in [-1, 1]
    seconds: float  # a clip
    computed: float  # share of the decisions


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    cfg = load_config(SampleConfig, CONFIG, [f"weights={args.weights}", "prompt=any", *args.overrides])
    runtime = runtimes.start(cfg.parallel.timeout_s, mesh=cfg.parallel.mesh)
    parts = load_components(cfg, find_source(cfg), runtime)
    option = fit(replace(cfg.sampling, num_steps=args.steps), parts)
    prompts = args.prompts or some_prompts(args.clips)
    chosen = [cache for cache in CACHES if args.only in (None, cache.kind)]
    if args.ratios:
        ratios = residual_ratios(parts, option, prompts)
        print(f"ratios: {[round(ratio, 5) for ratio in ratios]}")
        chosen += [MagCache(ratios=ratios, threshold=threshold) for threshold in (0.06, 0.12)]
    for cache in chosen:
        check_step_cache("sampling", replace(option, cache=cache), parts.cfg)
    rows = measure(parts, option, prompts, chosen)
    report(rows, args)
    runtimes.stop()
    return 0


def measure(
    parts: Components, option: SamplingOption, prompts: Sequence[str], caches: Sequence[CacheConfig]
) -> list[dict[str, Any]]:
    """A row per cache; what is compared with is sampled before and after each."""
    sample(parts, option, prompts[:1])  # warm
    before = sample(parts, option, prompts)
    rows = []
    for cache in caches:
        found = sample(parts, replace(option, cache=cache), prompts)
        after = sample(parts, option, prompts)
        assert torch.equal(after.pixels, before.pixels), "without a cache a clip is a function of prompt and seed"
        settings = {name: value for name, value in vars(cache).items() if name not in ("kind", "ratios")}
        rows.append(
            {
                "cache": cache.kind,
                "settings": settings,
                "computed": round(found.computed, 3),
                "seconds": round(found.seconds, 4),
                "speedup": round((before.seconds + after.seconds) / 2 / found.seconds, 3),
                "psnr": round(mean(psnr, found.pixels, before.pixels), 2),
                "ssim": round(mean(ssim, found.pixels, before.pixels), 4),
            }
        )
        before = after
    return rows


def sample(parts: Components, option: SamplingOption, prompts: Sequence[str]) -> Sampled:
    """Every prompt by itself, with a seed of its own."""
    decisions: list[Decision] = []
    api = build_api(parts, decisions.append)
    clock = time.perf_counter if parts.device.type == "cuda" else time.process_time
    began = clock()
    clips = [api(option, seed=seed, text=[prompt]) for seed, prompt in enumerate(prompts)]
    if parts.device.type == "cuda":
        torch.cuda.synchronize(parts.device)
    seconds = (clock() - began) / len(prompts)
    computed = sum(decision.computed for decision in decisions) / len(decisions) if decisions else 1.0
    return Sampled(torch.cat(clips).float().cpu(), seconds, computed)


def residual_ratios(parts: Components, option: SamplingOption, prompts: Sequence[str]) -> tuple[float, ...]:
    """For every step the mean over tokens, clips and passes of |what the blocks add| / |what they added before|."""
    found: list[list[float]] = [[] for _ in range(option.num_steps)]
    passes = passes_per_step(replace(option, text_osci=False))
    model: Any = parts.model
    for seed, prompt in enumerate(prompts):
        last: dict[int, Tensor] = {}
        calls = iter(range(passes * option.num_steps))

        def watched(stages: Sequence[Stage], streams: Streams, last: Any = last, calls: Any = calls) -> Tensor:
            step, number = divmod(next(calls), passes)
            before = stages[0].image(streams)
            out = run_in_order(stages, streams)
            size = (out - before).float().norm(dim=-1)
            found[step].append((size / last[number]).mean().item() if step else 1.0)
            last[number] = size
            return out

        model.run_stages = watched
        try:
            build_api(parts)(replace(option, text_osci=False), seed=seed, text=[prompt])
        finally:
            model.run_stages = run_in_order
    return tuple(sum(ratios) / len(ratios) for ratios in found)


def mean(of: Callable[[Tensor, Tensor], float], found: Tensor, truth: Tensor) -> float:
    return sum(of(a, b) for a, b in zip(found, truth, strict=True)) / len(truth)


def psnr(found: Tensor, truth: Tensor) -> float:
    """Of values in [-1, 1], in dB; at most 99, for equal ones."""
    error = (found - truth).square().mean().item()
    return min(99.0, 10 * math.log10(4 / error)) if error else 99.0


def ssim(found: Tensor, truth: Tensor) -> float:
    """Of clips (3, T, H, W) in [-1, 1]: Gaussian windows of 11 pixels, sigma 1.5, K = (0.01, 0.03), range 2."""
    at = torch.arange(11, dtype=torch.float64) - 5
    row = torch.exp(-at.square() / (2 * 1.5**2))
    window = (row[:, None] * row[None] / row.sum() ** 2)[None, None]
    x, y = (clip.double().flatten(0, 1)[:, None] for clip in (found, truth))  # (3 T, 1, H, W)

    def around(values: Tensor) -> Tensor:
        return functional.conv2d(values, window)

    mean_x, mean_y = around(x), around(y)
    var_x, var_y = around(x * x) - mean_x**2, around(y * y) - mean_y**2
    covariance = around(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (alike / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean().item()


def some_prompts(count: int) -> list[str]:
    """Captions of the rendered shapes, all colours, shapes and directions in turn."""
    colours, shapes, directions = list(COLOURS), list(SHAPES), list(DIRECTIONS)
    return [
        f"a {colours[i % len(colours)]} {shapes[i % len(shapes)]} moves {directions[i % len(directions)]} "
        "on a gray background"
        for i in range(count)
    ]


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    print(f"{'cache':<19}{'settings':<62}{'computed':>9}{'s/clip':>8}{'speed-up':>9}{'PSNR':>7}{'SSIM':>8}")
    for row in rows:
        settings = ", ".join(f"{name}={value}" for name, value in row["settings"].items() if value not in (None, 0))
        print(
            f"{row['cache']:<19}{settings[:61]:<62}{row['computed']:>9.1%}{row['seconds']:>8.3f}"
            f"{row['speedup']:>8.2f}x{row['psnr']:>7.2f}{row['ssim']:>8.4f}"
        )
    print(json.dumps({"benchmark": "step_caches", "steps": args.steps, "clips": args.clips, "rows": rows}))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_caches", description=__doc__.splitlines()[0])
    parser.add_argument("weights", nargs="?", help="run folder, export folder or safetensors file; default: ours")
    parser.add_argument("--clips", type=int, default=8, help="how many, each with a prompt and seed of its own")
    parser.add_argument("--prompts", nargs="*", help="in place of captions of the rendered shapes")
    parser.add_argument("--steps", type=int, default=50, help="of the solver")
    parser.add_argument("--only", choices=sorted({cache.kind for cache in CACHES}), help="this kind alone")
    parser.add_argument("--ratios", action="store_true", help="calibrate MagCache, and measure it")
    args, overrides = parser.parse_known_args(argv)
    if args.weights and "=" in args.weights:  # an override, and no weights before it
        overrides.insert(0, args.weights)
        args.weights = None
    args.weights = args.weights or PRETRAINED
    args.overrides = overrides
    if args.clips < 1 or args.steps < 2:
        raise UserError("--clips must be at least 1, --steps at least 2")
    return args


if __name__ == "__main__":
    run_cli(main)
