"""Seconds of a training step in which ulysses cuts every sample, and in which it cuts the long ones only, in one run.

    python -m benchmarks.sharing_step [--steps 12]

Two gloo processes on this machine, ZeRO 2, an MMDiT of width 128 in fp32: four micro-batches a step, of 8 stills, 8 and
2 short clips, and 1 long clip. Every step is taken both ways, in turn; of each the fastest is reported, as others may
use the machine, and the median. The degrees are those that the cost model chooses. Prints a line and one JSON line.
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch
import torch.distributed as dist

from acceleration.accounting.rank_layout import MicroBatch
from acceleration.config import MeshConfig, OptimConfig, ParallelConfig, PrecisionConfig
from acceleration.distributed import mesh as meshes
from acceleration.engines import build_engine
from acceleration.parallelize import parallelize
from acceleration.sequence import SequenceParallel
from opensora.datasets.buckets.cost import CostConfig, features
from opensora.datasets.plan.dynamic_sp import SequenceSharing, choose, times
from opensora.models.families import build_model
from opensora.models.mmdit import MMDiTConfig
from opensora.planner.meta_model import denoiser_inputs
from tests.dist.harness import run_distributed

MODEL = MMDiTConfig(
    in_channels=16, vec_in_dim=32, context_in_dim=32, hidden_size=128, num_heads=4, axes_dim=(8, 12, 12),
    depth=1, depth_single_blocks=3, patch_size=1, cond_embed=False,
)  # fmt: skip
PARALLEL = ParallelConfig(
    zero=2, mesh=MeshConfig(ulysses=2, dynamic=True), precision=PrecisionConfig(compute="fp32"), timeout_s=300
)
SHAPES = ((8, 64), (8, 192), (2, 320), (1, 1280))  # (samples, image tokens of each)
TEXT_TOKENS = 16
Part = tuple[MicroBatch, SequenceParallel]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    found = run_distributed(measure, 2, args.steps, timeout=900)[0]
    print(f"ulysses 2, all cut: {found['cut_s']:.3f} s a step; chosen {found['degrees']}: {found['chosen_s']:.3f} s, "
          f"{found['cut_s'] / found['chosen_s']:.2f} times as fast; ulysses bytes {found['cut_mib']:.1f} and "
          f"{found['chosen_mib']:.1f} MiB")  # fmt: skip
    print(json.dumps({"benchmark": "sharing_step", "steps": args.steps, **found}))


def measure(steps: int) -> dict[str, object]:
    """Runs in every process."""
    device = torch.device("cpu")
    mesh = meshes.build(PARALLEL.mesh, dist.get_world_size(), device)
    with torch.device("meta"):
        model = build_model(MODEL)
    parallelize(model, PARALLEL, mesh, device, lambda name, tensor: tensor.normal_(0, 0.02))
    engine = build_engine(model, PARALLEL, OptimConfig(kind="sgd", lr=1e-3), mesh)
    degrees = chosen()
    ways = {"cut": parts(mesh, [2] * len(SHAPES)), "chosen": parts(mesh, degrees)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    sent: dict[str, float] = {}
    for step in range(steps + 2):
        for way, mine in ways.items():
            before = mesh["ulysses"].bytes_sent
            dist.barrier()
            began = time.perf_counter()
            for index, (batch, sequence) in enumerate(mine):
                velocity = engine.model(**denoiser_inputs(MODEL, batch, sequence, device=device))
                loss = (velocity.float() - 1).square().sum()
                engine.backward(loss, last_microbatch=index == len(mine) - 1)
            engine.step(step)
            dist.barrier()
            if step >= 2:  # the first ones warm up
                seconds[way].append(time.perf_counter() - began)
            sent[way] = (mesh["ulysses"].bytes_sent - before) / 2**20
    found: dict[str, object] = {"degrees": degrees}
    for way, values in seconds.items():
        found |= {f"{way}_s": min(values), f"{way}_median_s": statistics.median(values), f"{way}_mib": sent[way]}
    return found


def chosen() -> list[int]:
    """The degree of each micro-batch by the cost model, with attention's part for this width."""
    rows = features(*np.array(SHAPES, dtype=float).T)
    cost = CostConfig(per_token2=1 / (6 * MODEL.hidden_size))
    sharing = SequenceSharing(degree=2, text_tokens=TEXT_TOKENS)
    most = max(samples * (tokens + TEXT_TOKENS) for samples, tokens in SHAPES)
    return choose(times(rows, cost, sharing, most), sharing.degrees)[0].tolist()


def parts(mesh: meshes.Mesh, degrees: list[int]) -> list[Part]:
    """What this process has of every micro-batch."""
    sharing = SequenceSharing(degree=2, rank=mesh["ulysses"].rank, text_tokens=TEXT_TOKENS)
    return [
        (
            MicroBatch(samples=len(sharing.local_rows(samples, degree)), txt=TEXT_TOKENS, img=tokens),
            SequenceParallel(mesh.submesh(degree)),
        )
        for (samples, tokens), degree in zip(SHAPES, degrees, strict=True)
    ]


if __name__ == "__main__":
    main()
