"""Forecast against measurement: peak memory of a training step on gloo processes, for many layouts.

    python -m benchmarks.plan_accuracy [--only N]

Measured is what torch's CPU allocator hands out: the profiler notes every allocation and release, also those inside of
operators, and their running sum on top of the tensors alive before the step has its maximum at the peak. (The resident
set would also count what the allocator keeps for later and what libraries load.) The third step is measured: the first
makes the optimizer's state. Of all processes the one with most counts. Nothing of the forecast is fitted to it.
"""

import argparse
import gc
import json
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from acceleration import lora
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import LoraConfig, MeshConfig, OptimConfig, ParallelConfig, PrecisionConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from acceleration.engines import build_engine
from acceleration.parallelize import parallelize
from acceleration.sequence import SequenceParallel
from opensora.models.families import build_model
from opensora.models.mmdit import FAMILY, MMDiTConfig
from opensora.planner.forecast import Forecaster
from opensora.planner.meta_model import denoiser_inputs
from tests.dist.harness import run_distributed

SMALL = MMDiTConfig(
    in_channels=16, vec_in_dim=64, context_in_dim=256, hidden_size=384, num_heads=6, depth=2, depth_single_blocks=4,
    axes_dim=(16, 24, 24),
)  # fmt: skip
DEEP = replace(SMALL, hidden_size=256, num_heads=4, depth=6, depth_single_blocks=12)
WIDE = replace(SMALL, hidden_size=768, num_heads=12, depth=2, depth_single_blocks=3)
OPTIM = OptimConfig(ema_decay=0.9)
FP32, BF16 = PrecisionConfig(compute="fp32"), PrecisionConfig()


@dataclass(frozen=True)
class Case:
    model: Any = SMALL
    world: int = 1
    mesh: dict[str, int] = field(default_factory=dict)
    zero: Any = 3
    recompute: Any = "none"
    precision: PrecisionConfig = FP32
    samples: int = 1
    txt: int = 64
    img: int = 512
    frames: int | None = None  # of models that keep time and space apart
    picture: int = 0  # tokens of a picture
    batches: int = 1
    rank: int = 0  # of adapters on every layer of the blocks; 0: all weights are trained

    @property
    def adapters(self) -> LoraConfig:
        return LoraConfig(rank=self.rank, targets=FAMILY.lora_targets)

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            zero=self.zero,
            mesh=MeshConfig(**self.mesh),
            recompute=RecomputeConfig(kind=self.recompute, blocks=3 if self.recompute == "first" else 0),
            precision=self.precision,
        )

    @property
    def batch(self) -> MicroBatch:
        sizes = {"txt": self.txt, "img": self.img, "frames": self.frames, "picture": self.picture}
        return MicroBatch(samples=self.samples, **sizes)

    def __str__(self) -> str:
        name = {SMALL: "small", DEEP: "deep", WIDE: "wide"}.get(self.model, self.model.kind)
        mesh = " ".join(f"{axis}{degree}" for axis, degree in self.mesh.items()) or "-"
        tokens = f"{self.samples}x({self.txt}+{self.img})x{self.batches}"
        return (
            f"{name:<6}{self.world:>2} {mesh:<20} zero{self.zero} {self.recompute:<6}{self.precision.compute} {tokens}"
            + f" rank {self.rank}" * (self.rank > 0)
        )


CASES = [
    Case(zero=0),
    Case(zero=2, world=2),
    Case(zero=3, world=2, recompute="full"),
    Case(model=DEEP, zero=3, world=2),
    Case(model=DEEP, zero=3, world=2, recompute="full", samples=2),
    Case(model=DEEP, zero=2, world=2, recompute="first", img=1024),
    Case(model=WIDE, zero=1, world=2, batches=2, img=256),
    Case(model=WIDE, zero=2, world=2, batches=2, img=256),
    Case(model=WIDE, zero=3, world=4, recompute="full", img=256),
    Case(zero=0, batches=2, recompute="full"),
    Case(zero=3, world=2, mesh={"ulysses": 2}, img=1024),
    Case(zero=2, world=2, mesh={"ring": 2}, recompute="full", img=1024),
    Case(zero=3, world=2, mesh={"tensor": 2}, img=1024),
    Case(zero=3, world=4, mesh={"replicate": 2, "ulysses": 2}, img=1024, batches=2),
    Case(zero=1, world=2, precision=BF16, batches=2),
    Case(zero=3, world=2, precision=BF16, recompute="full"),
    Case(rank=8),
    Case(zero=3, world=2, rank=8, precision=BF16, recompute="full", img=1024),
]


def predict(case: Case) -> int:
    """Bytes of the process that needs most."""
    forecast = Forecaster(case.model, OPTIM, device_type="cpu", adapters=case.adapters)
    degrees = meshes.resolve(MeshConfig(**case.mesh), case.world)
    return max(
        forecast.memory(RankLayout(meshes.view(degrees, rank), case.parallel), case.batch, batches=case.batches).total
        for rank in range(case.world)
    )


def draw(name: str, tensor: torch.Tensor) -> None:
    tensor.normal_(0, 0.02)


def measure(case: Case) -> int:
    """Runs in every process: peak bytes of the third step."""
    device = torch.device("cpu")
    mesh = meshes.build(case.parallel.mesh, dist.get_world_size(), device)
    with torch.device("meta"):
        model = build_model(case.model)
    if case.rank:
        lora.apply(model, case.adapters)
    parallelize(model, case.parallel, mesh, device, draw)
    engine = build_engine(model, case.parallel, OPTIM, mesh)
    sequence = SequenceParallel(mesh)

    def step(number: int) -> None:
        for index in range(case.batches):
            inputs = denoiser_inputs(case.model, case.batch, sequence, device=device)
            velocity = engine.model(**inputs)
            share = velocity.float().square().sum()
            del inputs, velocity
            engine.backward(share, last_microbatch=index == case.batches - 1)
            del share
        engine.step(number)

    for number in range(2):
        step(number)
    gc.collect()
    before = alive()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(2)
    return before + highest(profile)


def alive() -> int:
    """Bytes of all tensors."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            tensor = thing.to_local() if hasattr(thing, "to_local") else thing
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def highest(profile: Any) -> int:
    """The maximum of the running sum of allocations and releases."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        top = max(top, level)
    return top


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", type=int, help="number of one case")
    args = parser.parse_args()
    rows = []
    print(f"{'case':<64}{'predicted MiB':>14}{'measured MiB':>14}{'ratio':>8}")
    for case in CASES if args.only is None else [CASES[args.only]]:
        predicted = predict(case)
        measured = max(run_distributed(measure, case.world, case, timeout=300))
        rows.append({"case": str(case), "predicted": predicted, "measured": measured})
        print(
            f"{case!s:<64}{predicted / 2**20:>14.1f}{measured / 2**20:>14.1f}{predicted / measured:>8.3f}", flush=True
        )
    ratios = [row["predicted"] / row["measured"] for row in rows]
    worst = max(abs(ratio - 1) for ratio in ratios)
    print(json.dumps({"benchmark": "plan_accuracy", "cases": len(rows), "worst_error": worst, "rows": rows}))


if __name__ == "__main__":
    main()
