"""Sampling from STDiT, STDiT2, STDiT3, DiT, Latte and PixArt: any layout gives what one process gives, fp64 latents to
1e-10, and sends what the formulas say. The reference is a plain model, the guidance formula and Euler steps, written
out here; of sizes that are no whole patches what fills them up is zero in every step."""

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
from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.families import build_model, describe, family_of
from opensora.planner.meta_model import structure
from opensora.sampling.noise import get_noise
from opensora.sampling.options import SamplingOption
from opensora.schedulers.timesteps import get_schedule
from opensora.utils.tokens import image_ids, pack, unpack
from tests.dist import chapters, stdit
from tests.dist.harness import run_distributed
from tests.dist.layouts import FP64
from tests.dist.parity import Sampled, check_sampled
from tests.dist.problem import TEXT_TOKENS, FakeText
from tests.dist.stdit import CHANNELS, CPU, Latents, alive, plain_model
from tests.factored_family import GaussianFlowConfig

PROMPTS, NEGATIVES, SEEDS = ["a fox runs", "two"], ["blur", ""], [3, 11]  # one has no negative: the learned embedding
VALUES, PATCH = 4 * CHANNELS, (1, 2, 2)
MODELS = chapters.MODELS | stdit.MODELS


@dataclass(frozen=True)
class Job:
    """One call of the pipeline, for two clips."""

    model: str
    option: SamplingOption

    @property
    def grid(self) -> tuple[int, int, int]:
        assert self.option.height is not None and self.option.width is not None
        return self.option.num_frames, self.option.height, self.option.width  # latents, which here are pixels

    @property
    def filled_up(self) -> tuple[int, int, int]:
        frames, height, width = self.grid
        return frames, height + height % 2, width + width % 2


CLIP = SamplingOption(width=14, height=2, num_frames=5, num_steps=3, guidance=4.0, fps=8.0)
ODD = replace(CLIP, width=13, height=3)
STILL = replace(ODD, width=9, height=6, num_frames=1)
JOBS = {
    "stdit": Job("stdit", CLIP),
    "stdit2": Job("stdit2", ODD),
    "stdit3": Job("stdit3", ODD),
    "stdit3 still": Job("stdit3", STILL),
    "windows": Job("windows", ODD),
    "windows still": Job("windows", replace(STILL, guidance=1.0)),
    **{name: Job(name, CLIP) for name in ("dit", "latte", "pixart", "pixart_ms")},
}


@torch.no_grad()
def by_hand(job: Job) -> Tensor:
    """(B, C, T', H', W')."""
    option, cfg, model = job.option, MODELS[job.model], plain_model(MODELS[job.model])
    frames, height, width = job.grid
    whole = job.filled_up
    places, factored = whole[1] // 2 * (whole[2] // 2), describe(cfg).token_axes == "factored"
    sizes: dict[str, Any] = {"channels": CHANNELS, "stride": (1, 1, 1), "patch_size": 1}
    noise = torch.cat([get_noise(1, height, width, frames, seed=seed, **sizes) for seed in SEEDS]).double()
    x = torch.zeros(2, CHANNELS, *whole, dtype=torch.float64)
    x[..., :height, :width] = noise

    def velocity(prompts: list[str], dropped: list[bool], time: float) -> Tensor:
        # The embedding of no prompt stands behind the mask of the prompt that it is in place of, as in training.
        read = [own if gone else said for own, said, gone in zip(PROMPTS, prompts, dropped, strict=True)]
        text = FakeText().encode(read)
        told = Conditions(
            text=text.txt,
            text_mask=text.mask,
            pooled=text.y_vec,
            dropped=torch.tensor(dropped),
            fps=torch.full((2,), 120.0 if frames == 1 else option.fps),
            size=torch.tensor([(height, width)] * 2, dtype=torch.float32),
            num_frames=torch.full((2,), float(frames)),
        )
        sides = (frames, whole[1] // 2, whole[2] // 2)
        tokens = TokenBatch(x=pack(x, PATCH), positions=image_ids(whole, PATCH).expand(2, -1, -1), grid=sides)
        if factored:
            by_frame = {name: getattr(tokens, name).unflatten(1, (frames, places)) for name in ("x", "positions")}
            tokens = replace(tokens, **by_frame)
        t = torch.full((2,), time, dtype=torch.float64)
        out = model(**family_of(cfg).arguments(cfg, tokens, t, told))[..., :VALUES]
        found = torch.zeros_like(x)
        out = out.flatten(1, 2) if factored else out
        found[..., :height, :width] = unpack(out, whole, PATCH)[..., :height, :width]
        return found

    for now, then in pairwise(get_schedule(option.num_steps, places, frames)):
        v = velocity(PROMPTS, [False, False], now)
        if option.guidance != 1:
            away = velocity(NEGATIVES, [False, True], now)
            v = away + option.guidance * (v - away)
        x = x + (then - now) * v
    return x[..., :height, :width]


def on_these_layouts(cases: list[Any]) -> list[dict[str, Sampled]]:
    """Runs in every process of the group: every job on every layout."""
    return [{name: on_this_layout(degrees, zero, JOBS[name]) for name in names} for degrees, zero, names in cases]


def on_this_layout(degrees: dict[str, int], zero: Any, job: Job) -> Sampled:
    parallel, cfg = ParallelConfig(zero=zero, mesh=MeshConfig(**degrees), precision=FP64), MODELS[job.model]
    mesh = meshes.build(parallel.mesh, dist.get_world_size(), CPU)
    with torch.device("meta"):
        model = build_model(cfg)
    parts = Components(
        model=parallelize(model, parallel, mesh, CPU, alive).requires_grad_(False),
        cfg=cfg,
        autoencoder=Latents(),
        text_encoder=FakeText(),
        objective=GaussianFlowConfig(),
        layout=token_layout(cfg, SequenceParallel(mesh)),
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
    grid = describe(MODELS[job.model]).grid(job.grid)
    denoising = describe(MODELS[job.model])
    frames = grid.frames if denoising.token_axes == "factored" else None
    text = TEXT_TOKENS if denoising.text == "cross" else 0
    batch = MicroBatch(samples=2, txt=text, img=grid.tokens, frames=frames, has_mask=text > 0)
    return sampling_bytes(structure(MODELS[job.model]), place, batch, passes, VALUES, outputs=2)


ALL = tuple(JOBS)
QUICK: list[Any] = [({"ulysses": 2}, 0, ("windows", "pixart"))]
SLOW: dict[int, list[Any]] = {
    1: [({}, 0, ALL)],
    2: [
        *(({axis: 2}, zero, ALL) for axis, zero in (("shard", 3), ("ulysses", 3), ("ring", 0), ("tensor", 3))),
        ({"cfg": 2}, 2, tuple(name for name in ALL if name != "windows still")),  # which is not guided
    ],
    3: [({axis: 3}, 3, ALL) for axis in ("ulysses", "ring")],
    4: [({"ring": 2, "ulysses": 2}, 3, ALL), ({"ulysses": 2, "tensor": 2}, 0, ALL), ({"ulysses": 4}, 3, ALL)],
    6: [({"ulysses": 6}, 0, ("windows", "stdit3"))],
}


def check(world: int, cases: list[Any], timeout: float) -> None:
    truths = {name: by_hand(JOBS[name]) for name in {name for *_, names in cases for name in names}}
    check_sampled(cases, run_distributed(on_these_layouts, world, cases, timeout=timeout), truths)


def test_layouts_sample_what_one_process_samples() -> None:
    check(2, QUICK, 100)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", SLOW)
def test_every_layout_samples_what_one_process_samples(world: int) -> None:
    check(world, SLOW[world], 800)
