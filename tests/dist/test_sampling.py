"""Any layout samples what one process samples: fp64 latents, to 1e-10.

The reference is written out here: a plain model, the guidance formula and Euler steps, without the pipeline, a denoiser
or any wrapper. Sizes divide by nothing: 5 frames of 2.39:1 are 105 image tokens, text has 5 tokens of which some are
padding, 4 heads go over 3 processes.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from acceleration.accounting.comm_volume import sampling_bytes
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import MeshConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import Mesh
from acceleration.distributed.tasks import DistributedRunner
from acceleration.parallelize import parallelize
from acceleration.sequence import SequenceParallel
from opensora.assembly.components import Components
from opensora.assembly.layout import check_guidance
from opensora.assembly.token_layout import token_layout
from opensora.inference.pipeline import build_api
from opensora.models.families import build_model
from opensora.models.mmdit import MMDiTConfig
from opensora.planner.meta_model import structure
from opensora.sampling.denoisers import I2VDenoiser
from opensora.sampling.guidance import oscillate
from opensora.sampling.noise import get_noise
from opensora.sampling.options import SamplingOption
from opensora.schedulers.rectified_flow import RectifiedFlowConfig
from opensora.schedulers.timesteps import get_schedule
from opensora.utils.errors import UserError
from opensora.utils.rng import torch_generator
from opensora.utils.tokens import image_ids, pack, unpack
from tests.dist.harness import run_distributed
from tests.dist.layouts import FP64
from tests.dist.parity import TOLERANCE, Sampled, SamplingCase, check_sampled, fill, relative
from tests.dist.problem import MODEL, TEXT_TOKENS, FakeText, PassThrough

CPU = torch.device("cpu")
PROMPTS, NEGATIVES, SEEDS = ["a fox runs", "two"], ["blur", ""], [3, 11]
Degrees = dict[str, int]


@dataclass(frozen=True)
class Job:
    """One call of the pipeline, for two clips."""

    option: SamplingOption
    grid: tuple[int, int, int]  # latents, which here are pixels

    @property
    def model(self) -> MMDiTConfig:
        return replace(MODEL, guidance_embed=self.option.method == "distill")


CLIP = SamplingOption(resolution="5px", aspect_ratio="2.39:1", num_frames=5, num_steps=3, guidance=4.0)
STILL = SamplingOption(resolution="3px", aspect_ratio="1:1", num_frames=1, num_steps=3, guidance=3.0)
JOBS = {
    "clip": Job(CLIP, (5, 3, 7)),
    "oscillating": Job(replace(STILL, num_steps=12, text_osci=True), (1, 3, 3)),  # one pass in the last step
    "unguided": Job(replace(STILL, guidance=1.0), (1, 3, 3)),
    "distilled": Job(replace(STILL, method="distill"), (1, 3, 3)),
}
GUIDED, ALL = ("clip", "oscillating"), tuple(JOBS)


@torch.no_grad()
def on_one_process(job: Job) -> Tensor:
    """(B, C, T', H', W') by hand."""
    option, grid = job.option, job.grid
    model = build_model(job.model).double()
    for name, parameter in model.named_parameters():
        fill(name, parameter)
    noise = [
        get_noise(1, grid[1], grid[2], option.num_frames, seed=s, channels=8, stride=(1, 1, 1), patch_size=1)
        for s in SEEDS
    ]
    x = pack(torch.cat(noise).double(), 1)
    times = get_schedule(option.num_steps, grid[1] * grid[2], grid[0])

    def velocity(prompts: list[str], time: float) -> Tensor:
        text = FakeText().encode(prompts)
        return model(
            img=x,
            img_ids=image_ids(grid, 1).expand(2, -1, -1),
            txt=text.txt,
            txt_ids=torch.zeros(2, text.txt.shape[1], 3),
            timesteps=torch.full((2,), time, dtype=torch.float64),
            y_vec=text.y_vec,
            cond=torch.zeros(*x.shape[:2], MODEL.cond_channels),
            guidance=torch.full((2,), option.guidance) if option.method == "distill" else None,
            txt_mask=text.mask,
        )

    for step, (now, then) in enumerate(pairwise(times)):
        v = velocity(PROMPTS, now)
        is_on = not option.text_osci or step < 10 or step % 2 == 0
        if option.method == "i2v" and is_on:
            away = velocity(NEGATIVES, now)
            v = away + option.guidance * (v - away)
        x = x + (then - now) * v
    return unpack(x, grid, 1)


def layout(degrees: Degrees, zero: Any, cfg: MMDiTConfig = MODEL) -> tuple[Mesh, nn.Module]:
    """The mesh and the sharded model."""
    parallel = ParallelConfig(zero=zero, mesh=MeshConfig(**degrees), precision=FP64)
    mesh = meshes.build(parallel.mesh, dist.get_world_size(), CPU)
    with torch.device("meta"):
        model = build_model(cfg)
    return mesh, parallelize(model, parallel, mesh, CPU, fill).requires_grad_(False)


def on_these_layouts(cases: list[SamplingCase]) -> list[dict[str, Sampled]]:
    """Runs in every process of the group: every job on every layout."""
    results = []
    for degrees, zero, names in cases:
        found = {}
        for name in names:
            job = JOBS[name]
            mesh, model = layout(degrees, zero, job.model)
            parts = Components(
                model=model,
                cfg=job.model,
                autoencoder=PassThrough(),
                text_encoder=FakeText(),
                objective=RectifiedFlowConfig(),
                layout=token_layout(job.model, SequenceParallel(mesh)),
                mesh=mesh,
                device=CPU,
                prompt_suffix=False,
            )
            for axis in mesh.axes.values():
                axis.bytes_sent = 0
            latents = build_api(parts)(job.option, seed=SEEDS, text=PROMPTS, neg=NEGATIVES)
            found[name] = Sampled(latents, dict(mesh.bytes_sent()), predicted(job, mesh, zero))
        results.append(found)
    return results


def predicted(job: Job, mesh: Mesh, zero: Any) -> dict[str, int]:
    """Bytes by axis of one job, by formula."""
    option, (t, h, w) = job.option, job.grid
    place = RankLayout(
        meshes.view({name: mesh[name].degree for name in meshes.AXES}, dist.get_rank()),
        ParallelConfig(zero=zero, precision=FP64),
    )
    guided = option.method == "i2v" and option.guidance != 1
    passes = [
        2 if guided and (not option.text_osci or oscillate(option.guidance, step) != 1) else 1
        for step in range(option.num_steps)
    ]
    batch = MicroBatch(samples=len(PROMPTS), txt=TEXT_TOKENS, img=t * h * w, has_mask=True)
    return sampling_bytes(structure(job.model), place, batch, passes, job.model.in_channels)


QUICK: dict[int, list[SamplingCase]] = {
    2: [
        ({"cfg": 2}, 3, GUIDED),
        ({"ulysses": 2}, 0, ("unguided", "distilled")),
        ({"ring": 2}, 3, ("clip",)),
        ({"tensor": 2}, 3, ("clip",)),
    ],
    3: [({"ulysses": 3}, 3, ("clip",))],
    4: [
        ({"cfg": 2, "ulysses": 2}, 3, ("oscillating",)),
        ({"ring": 2, "ulysses": 2}, 3, ("clip",)),
        ({"cfg": 2, "tensor": 2}, 0, ("clip",)),
    ],
}
SLOW: dict[int, list[SamplingCase]] = {
    2: [({axis: 2}, zero, ALL) for axis in ("shard", "replicate", "ulysses", "ring", "tensor") for zero in (0, 3)]
    + [({"cfg": 2}, zero, GUIDED) for zero in (0, 1, 2, 3)],
    3: [({axis: 3}, zero, ALL) for axis in ("ulysses", "ring") for zero in (0, 3)],
    4: [({axis: 4}, 3, ALL) for axis in ("ulysses", "ring", "tensor")]
    + [({a: 2, b: 2}, 3, ALL) for a, b in (("ring", "ulysses"), ("ring", "tensor"), ("ulysses", "tensor"))]
    + [
        ({"cfg": 2, axis: 2}, zero, GUIDED)
        for axis in ("replicate", "shard", "ring", "ulysses", "tensor")
        for zero in (0, 3)
    ],
    6: [({"cfg": 2, "ulysses": 3}, 3, GUIDED), ({"ring": 2, "ulysses": 3}, 3, ALL), ({"ring": 3, "tensor": 2}, 3, ALL)],
    8: [
        ({"cfg": 2, "ring": 2, "ulysses": 2}, 3, GUIDED),
        ({"cfg": 2, "ulysses": 2, "tensor": 2}, 3, GUIDED),
        ({"cfg": 2, "ring": 2, "tensor": 2}, 0, GUIDED),
        ({"shard": 2, "cfg": 2, "ulysses": 2}, 3, GUIDED),
        ({"ring": 2, "ulysses": 2, "tensor": 2}, 3, ALL),
        ({"ring": 8}, 3, ALL),
    ],
}


def check(world: int, cases: list[SamplingCase], timeout: float) -> None:
    truths = {name: on_one_process(JOBS[name]) for name in {name for *_, names in cases for name in names}}
    check_sampled(cases, run_distributed(on_these_layouts, world, cases, timeout=timeout), truths)


@pytest.mark.parametrize("world", QUICK)
def test_layouts_sample_what_one_process_samples(world: int) -> None:
    check(world, QUICK[world], 100)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("world", "case"),
    [pytest.param(world, case, id=f"{case[0]}-zero{case[1]}") for world, cases in SLOW.items() for case in cases],
)
def test_every_layout_samples_what_one_process_samples(world: int, case: SamplingCase) -> None:
    check(world, [case], 500)


REFERENCED = SamplingOption(
    num_steps=12, guidance=4.0, guidance_img=3.0, image_osci=True, text_osci=True, scale_temporal_osci=True
)


GUIDANCE = ("guidance", "guidance_img", "text_osci", "image_osci", "scale_temporal_osci")


def with_references(degrees: Degrees) -> tuple[Tensor, int, int, int]:
    """(tokens, calls of the model, bytes sent over cfg, values of a velocity) of three passes per step."""
    if degrees:
        mesh, model = layout(degrees, 3)
    else:
        mesh, model = meshes.view({}), build_model(MODEL).double().requires_grad_(False)
        for name, parameter in model.named_parameters():
            fill(name, parameter)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    sequence, grid = SequenceParallel(mesh), (3, 1, 5)
    tokens = 15

    def draw(channels: int, key: str) -> Tensor:
        return sequence.shard(
            torch.randn(2, tokens, channels, generator=torch_generator(key), dtype=torch.float64).contiguous()
        )

    features = FakeText().encode([*PROMPTS, *NEGATIVES, *NEGATIVES])
    txt, mask = (sequence.shard(x, extra_to_last=True) for x in (features.txt, features.mask))  # type: ignore[arg-type]
    local = I2VDenoiser().denoise(
        model,
        draw(8, "noise"),
        get_schedule(REFERENCED.num_steps, 5, 3),
        **{name: getattr(REFERENCED, name) for name in GUIDANCE},
        img_ids=sequence.shard(image_ids(grid, 1).expand(6, -1, -1)),
        txt=txt,
        txt_ids=torch.zeros(*txt.shape[:2], 3),
        y_vec=features.y_vec,
        txt_mask=mask,
        context=sequence.context(features.txt.shape[1], tokens),
        cond=draw(MODEL.cond_channels, "references"),
        latent_frames=3,
        run=DistributedRunner(mesh["cfg"]),
    )
    return sequence.gather(local, tokens), len(calls), mesh["cfg"].bytes_sent, local.numel()


@pytest.mark.parametrize(
    ("world", "degrees"),
    [
        (3, {"cfg": 3}),
        pytest.param(2, {"cfg": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"cfg": 2, "ring": 2}, marks=pytest.mark.slow),
        pytest.param(6, {"cfg": 3, "ulysses": 2}, marks=pytest.mark.slow),
    ],
)
def test_three_passes_over_two_or_three_processes(world: int, degrees: Degrees) -> None:
    """The same latents, bit for bit alike along cfg; every process calls the model equally often."""
    truth, passes, _, _ = with_references({})
    steps, cfg = REFERENCED.num_steps, degrees["cfg"]
    assert passes == 3 * steps
    for tokens, calls, sent, values in run_distributed(with_references, world, degrees, timeout=100):
        assert relative(tokens, truth) <= TOLERANCE
        assert calls == steps * -(-3 // cfg)
        most = -(-3 // cfg)  # velocities in one message; who has fewer pads
        assert sent == steps * most * values * 8 * (cfg - 1)


BAD_GUIDANCE = {
    "distilled": ({"cfg": 2}, {"method": "distill"}, "parallel.mesh.cfg=2: sampling.method=distill makes one pass"),
    "guidance off": ({"cfg": 2}, {"guidance": 1.0}, "parallel.mesh.cfg=2: sampling.guidance=1 is off"),
    "no third pass": ({"cfg": 3}, {}, "set parallel.mesh.cfg=2"),
    "all that are left": ({"cfg": -1, "shard": 1}, {}, "parallel.mesh.cfg=6: text to video"),
}


@pytest.mark.parametrize("case", BAD_GUIDANCE)
def test_processes_without_a_pass_are_refused(case: str) -> None:
    degrees, option, message = BAD_GUIDANCE[case]
    with pytest.raises(UserError) as caught:
        check_guidance(MeshConfig(**degrees), 6, SamplingOption(**option))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    check_guidance(MeshConfig(cfg=2), 6, SamplingOption(text_osci=True))
