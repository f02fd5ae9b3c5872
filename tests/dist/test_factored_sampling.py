"""Sampling from the factored model: any layout gives what one process gives, fp64 latents to 1e-10, and sends what the
formulas say. The reference is a plain model, the guidance formula and Euler steps, written out here."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.accounting.comm_volume import sampling_bytes
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import MeshConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import Mesh
from acceleration.parallelize import parallelize
from acceleration.sequence import SequenceParallel
from opensora.assembly.components import Components
from opensora.assembly.token_layout import token_layout
from opensora.inference.pipeline import build_api
from opensora.models.families import build_model
from opensora.planner.meta_model import structure
from opensora.sampling.noise import get_noise
from opensora.sampling.options import SamplingOption
from opensora.schedulers.timesteps import get_schedule
from opensora.utils.tokens import image_ids, pack, unpack
from tests.dist.factored import CPU, MODEL, Latents, plain_model
from tests.dist.harness import run_distributed
from tests.dist.layouts import FP64
from tests.dist.parity import Sampled, SamplingCase, check_sampled, fill
from tests.dist.problem import TEXT_TOKENS, FakeText
from tests.factored_family import GaussianFlowConfig

PROMPTS, NEGATIVES, SEEDS = ["a fox runs", "two"], ["blur", ""], [3, 11]  # one has no negative: the learned embedding
VALUES = 4 * MODEL.channels  # of a token


@dataclass(frozen=True)
class Job:
    """One call of the pipeline, for two clips."""

    option: SamplingOption

    @property
    def grid(self) -> tuple[int, int, int]:
        assert self.option.height is not None and self.option.width is not None
        return self.option.num_frames, self.option.height, self.option.width  # latents, which here are pixels


CLIP = SamplingOption(width=14, height=2, num_frames=5, num_steps=3, guidance=4.0, fps=8.0)
JOBS = {
    "clip": Job(CLIP),
    "still": Job(replace(CLIP, width=10, height=6, num_frames=1)),
    "unguided": Job(replace(CLIP, guidance=1.0)),
}


@torch.no_grad()
def by_hand(job: Job) -> Tensor:
    """(B, C, T', H', W')."""
    option, grid, model, patch = job.option, job.grid, plain_model(), (1, 2, 2)
    frames, places = grid[0], grid[1] // 2 * (grid[2] // 2)
    sizes: dict[str, Any] = {"channels": MODEL.channels, "stride": (1, 1, 1), "patch_size": 2}
    noise = [get_noise(1, *grid[1:], frames, seed=seed, **sizes) for seed in SEEDS]
    x = pack(torch.cat(noise).double(), patch).unflatten(1, (frames, places))

    def velocity(prompts: list[str], dropped: list[bool], time: float) -> Tensor:
        text = FakeText().encode(prompts)
        return model(
            x=x,
            positions=image_ids(grid, patch).expand(2, -1, -1).unflatten(1, (frames, places)),
            timestep=torch.full((2,), time, dtype=torch.float64),
            y=text.txt,
            y_mask=text.mask,
            dropped=torch.tensor(dropped),
            fps=torch.full((2,), option.fps),
            size=torch.tensor([grid[1:], grid[1:]], dtype=torch.float32),
        )[..., :VALUES]

    for now, then in pairwise(get_schedule(option.num_steps, places, frames)):
        v = velocity(PROMPTS, [False, False], now)
        if option.guidance != 1:
            away = velocity(NEGATIVES, [False, True], now)
            v = away + option.guidance * (v - away)
        x = x + (then - now) * v
    return unpack(x.flatten(1, 2), grid, patch)


def on_these_layouts(cases: list[SamplingCase]) -> list[dict[str, Sampled]]:
    """Runs in every process of the group: every job on every layout."""
    return [{name: on_this_layout(degrees, zero, JOBS[name]) for name in names} for degrees, zero, names in cases]


def on_this_layout(degrees: dict[str, int], zero: Any, job: Job) -> Sampled:
    parallel = ParallelConfig(zero=zero, mesh=MeshConfig(**degrees), precision=FP64)
    mesh = meshes.build(parallel.mesh, dist.get_world_size(), CPU)
    with torch.device("meta"):
        model = build_model(MODEL)
    parts = Components(
        model=parallelize(model, parallel, mesh, CPU, fill).requires_grad_(False),
        cfg=MODEL,
        autoencoder=Latents(),
        text_encoder=FakeText(),
        objective=GaussianFlowConfig(),
        layout=token_layout(MODEL, SequenceParallel(mesh)),
        mesh=mesh,
        device=CPU,
        prompt_suffix=False,
    )
    for axis in mesh.axes.values():
        axis.bytes_sent = 0
    latents = build_api(parts)(job.option, seed=SEEDS, text=PROMPTS, neg=NEGATIVES)
    return Sampled(latents, dict(mesh.bytes_sent()), predicted(job, mesh, parallel))


def predicted(job: Job, mesh: Mesh, parallel: ParallelConfig) -> dict[str, int]:
    """Bytes by axis of one job, by formula."""
    place = RankLayout(meshes.view({name: mesh[name].degree for name in meshes.AXES}, dist.get_rank()), parallel)
    passes = [1 if job.option.guidance == 1 else 2] * job.option.num_steps
    frames, height, width = job.grid
    img = frames * (height // 2) * (width // 2)
    batch = MicroBatch(samples=2, txt=TEXT_TOKENS, img=img, frames=frames, has_mask=True)
    return sampling_bytes(structure(MODEL), place, batch, passes, VALUES, outputs=2)


ALL = tuple(JOBS)
QUICK: list[SamplingCase] = [({"ulysses": 2}, 0, ("unguided",)), ({"cfg": 2}, 3, ("clip",))]
SLOW: dict[int, list[SamplingCase]] = {
    2: [({axis: 2}, zero, ALL) for axis in ("shard", "ulysses", "ring", "tensor") for zero in (0, 3)],
    3: [({axis: 3}, 3, ALL) for axis in ("ulysses", "ring")],
    4: [
        ({"ring": 2, "ulysses": 2}, 3, ALL),
        ({"cfg": 2, "ulysses": 2}, 3, ("clip", "still")),
        ({"cfg": 2, "ring": 2}, 0, ("clip", "still")),
        ({"ulysses": 2, "tensor": 2}, 3, ALL),
        ({"ulysses": 4}, 3, ALL),
    ],
}


def check(world: int, cases: list[SamplingCase], timeout: float) -> None:
    truths = {name: by_hand(JOBS[name]) for name in {name for *_, names in cases for name in names}}
    check_sampled(cases, run_distributed(on_these_layouts, world, cases, timeout=timeout), truths)


def test_layouts_sample_what_one_process_samples() -> None:
    check(2, QUICK, 100)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", SLOW)
def test_every_layout_samples_what_one_process_samples(world: int) -> None:
    check(world, SLOW[world], 500)
