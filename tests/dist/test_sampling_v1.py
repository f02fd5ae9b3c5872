"""Sampling as in Open-Sora 1.x from the factored model, with frames that are given and edited: any layout gives what
one process gives, fp64 latents to 1e-10. The reference is a plain model, and every solver written out from its formula.
"""

import math
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
from opensora.sampling.options import SamplingOption
from opensora.schedulers import ObjectiveConfig
from opensora.schedulers.iddpm import IDDPMConfig
from opensora.schedulers.rectified_flow_v1 import RectifiedFlowV1Config
from opensora.utils.rng import torch_generator
from opensora.utils.tokens import image_ids, pack, unpack
from tests.dist.factored import CPU, MODEL, Latents, plain_model
from tests.dist.harness import run_distributed
from tests.dist.layouts import FP64
from tests.dist.parity import Sampled, SamplingCase, check_sampled, fill
from tests.dist.problem import TEXT_TOKENS, FakeText

PROMPTS, NEGATIVES, SEEDS = ["a fox runs", "two"], ["blur", ""], [3, 11]
FRAMES, HEIGHT, WIDTH = 5, 2, 14  # latents, which here are pixels; 5 x 7 tokens
PATCH, CHANNELS, VALUES = (1, 2, 2), MODEL.channels, 4 * MODEL.channels
RATIOS = torch.tensor([[0.0, 0.5, 1.0, 0.8, 1.0], [1.0, 1.0, 0.3, 1.0, 0.0]])
CLIP = SamplingOption(width=WIDTH, height=HEIGHT, num_frames=FRAMES, num_steps=5, guidance=4.0, fps=8.0)


@dataclass(frozen=True)
class Case:
    """One call of the pipeline, for two clips."""

    option: SamplingOption
    objective: ObjectiveConfig
    edits: bool = True  # frames stand in the noise


FLOW = RectifiedFlowV1Config(version="1.3", use_timestep_transform=True, transform_scale=1.5)
CASES = {
    "ddpm": Case(replace(CLIP, solver="ddpm", cfg_channel=3), IDDPMConfig()),
    "ddim": Case(replace(CLIP, solver="ddim", eta=0.5, timestep_respacing="2,3"), IDDPMConfig()),
    "dpm": Case(replace(CLIP, solver="dpm_solver"), IDDPMConfig(), edits=False),
    "flow": Case(CLIP, FLOW),
    "contrast": Case(replace(CLIP, use_flaw_fix=True, text_osci=True, force_num=2), FLOW, edits=False),
}


def start() -> Tensor:
    """(B, C, T', H', W'): noise, and in some frames what is given."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, CHANNELS, FRAMES, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)


def drawn(purpose: str, step: int) -> Tensor:
    shape = (CHANNELS, FRAMES, HEIGHT, WIDTH)
    return torch.stack([torch.randn(shape, generator=torch_generator(seed, purpose, step)) for seed in SEEDS]).double()


# By hand: latents (B, C, T', H', W'), predictions with their two outputs one after the other.
def predictions(x: Tensor, time: float, noisy: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of the prompts, and of what to move away from: (B, 2 C, T', H', W') each."""
    model, text = plain_model(), FakeText()

    def one(prompts: list[str], dropped: list[bool]) -> Tensor:
        features = text.encode(prompts)
        ids = image_ids((FRAMES, HEIGHT, WIDTH), PATCH).expand(2, -1, -1).unflatten(1, (FRAMES, -1))
        known = None if noisy is None else ~noisy[..., None].expand(-1, -1, ids.shape[2])
        found = model(
            x=pack(x, PATCH).unflatten(1, (FRAMES, -1)),
            positions=ids,
            timestep=torch.full((2,), time, dtype=torch.float64),
            y=features.txt,
            y_mask=features.mask,
            dropped=torch.tensor(dropped),
            fps=torch.full((2,), CLIP.fps),
            size=torch.tensor([[HEIGHT, WIDTH]] * 2, dtype=torch.float32),
            known=known,
        ).flatten(1, 2)
        parts = (unpack(part, (FRAMES, HEIGHT, WIDTH), PATCH) for part in found.split(VALUES, dim=-1))
        return torch.cat(list(parts), dim=1)

    return one(PROMPTS, [False, False]), one(NEGATIVES, [False, True])


def along(frames: Tensor) -> Tensor:
    return frames[:, None, :, None, None]


def guided(found: tuple[Tensor, Tensor], scale: float, channels: int = CHANNELS) -> Tensor:
    """The first channels are moved; the others, and the second output, are those of the prompt."""
    prompted, away = found
    moved = away[:, :channels] + scale * (prompted[:, :channels] - away[:, :channels])
    return torch.cat((moved, prompted[:, channels:]), dim=1)


@torch.no_grad()
def chain_by_hand(case: Case) -> Tensor:
    """DDPM and DDIM."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    chosen = [0, 250, 500, 749, 999] if case.option.solver == "ddpm" else [0, 499, 500, 750, 999]
    abar = torch.cumprod(1 - beta, 0)[chosen]
    x, steps = start(), len(chosen)
    levels = (RATIOS * steps).int()
    for index, level in enumerate(reversed(range(steps))):
        kept, now, before = x, abar[level], abar[level - 1] if level else torch.tensor(1.0, dtype=torch.float64)
        fresh = now.sqrt() * x + (1 - now).sqrt() * drawn("frame noise", index)
        x = torch.where(along(levels == level), fresh, x)
        out = guided(predictions(x, float(chosen[level]), levels > level), 4.0, case.option.cfg_channel or CHANNELS)
        noise, v = out.chunk(2, dim=1)
        clean = (x - (1 - now).sqrt() * noise) / now.sqrt()
        if case.option.solver == "ddim":
            sigma = 0.5 * ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
            x = before.sqrt() * clean + (1 - before - sigma**2).sqrt() * noise
        else:
            step_beta = 1 - now / before
            x = before.sqrt() * step_beta / (1 - now) * clean + (1 - step_beta).sqrt() * (1 - before) / (1 - now) * x
            posterior = step_beta * (1 - before) / (1 - now)
            if level:
                share = (v + 1) / 2
                sigma = (0.5 * (share * step_beta.log() + (1 - share) * posterior.log())).exp()
        if level:
            x = x + sigma * drawn("solver noise", index)
        x = torch.where(along(levels < level), kept, x)
    return x


def moved(t: float) -> float:
    """The transform of 1.3 for 5 frames of 2 x 14 pixels."""
    ratio = math.sqrt(HEIGHT * WIDTH / 512**2) * math.sqrt((FRAMES - 1) // 4) * 1.5
    return ratio * t / (1 + (ratio - 1) * t)


@torch.no_grad()
def flow_by_hand(case: Case) -> Tensor:
    """Euler steps."""
    x, steps = start(), case.option.num_steps
    # The model's embedding makes 1e-9 of a time's last digit: all is noise at 1, whatever the formula's rounding says.
    times = [1.0, *(moved((1 - step / steps) * 1000 / 1000) for step in range(1, steps)), 0.0]
    noised = RATIOS == 1
    for index, (now, then) in enumerate(pairwise(times)):
        kept, noisy = x, now - 1e-9 <= RATIOS
        if case.edits:
            x = torch.where(along(noisy & ~noised), (1 - now) * x + now * drawn("frame noise", index), x)
            noised = noisy
        found = predictions(x, 1000 * now, noisy if case.edits else None)
        scale = 1.0 if case.option.text_osci and index >= 2 and index % 2 else 4.0
        v = guided(found, scale)[:, :CHANNELS]
        if case.option.use_flaw_fix:
            prompted = found[0][:, :CHANNELS]
            contrast = prompted.flatten(1).std(1) / v.flatten(1).std(1)
            v = v * (0.7 * contrast + 0.3).view(-1, 1, 1, 1, 1)
        x = x + (now - then) * v
        if case.edits:
            x = torch.where(along(noisy), x, kept)
    return x


@torch.no_grad()
def dpm_by_hand(case: Case) -> Tensor:
    """DPM-Solver++(2M), whose last step of few is of first order."""
    steps = case.option.num_steps
    log_alphas = 0.5 * torch.log(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumsum(0)

    def at(t: float) -> tuple[float, float, float]:
        """alpha, sigma and lambda, between two of the 1000 places t = 1/1000 ... 1."""
        place = t * 1000 - 1
        low = min(int(place), 998)
        log_alpha = float(log_alphas[low] + (place - low) * (log_alphas[low + 1] - log_alphas[low]))
        sigma = math.sqrt(1 - math.exp(2 * log_alpha))
        return math.exp(log_alpha), sigma, log_alpha - math.log(sigma)

    times = [1 + (0.001 - 1) * step / steps for step in range(steps + 1)]
    x, before = start(), None
    for index in range(steps):
        (alpha, sigma, now), (alpha2, sigma2, then) = at(times[index]), at(times[index + 1])
        noise = guided(predictions(x, 1000 * times[index] - 1, None), 4.0)[:, :CHANNELS]
        clean = slope = (x - sigma * noise) / alpha
        if before is not None and index < steps - 1:
            r = (now - at(times[index - 1])[2]) / (then - now)
            slope = clean + (clean - before) / (2 * r)
        x = sigma2 / sigma * x - alpha2 * (math.exp(now - then) - 1) * slope
        before = clean
    return x


def by_hand(name: str) -> Tensor:
    written = {"ddpm": chain_by_hand, "ddim": chain_by_hand, "dpm": dpm_by_hand}
    return written.get(name, flow_by_hand)(CASES[name])


# On layouts.
def on_these_layouts(cases: list[SamplingCase]) -> list[dict[str, Sampled]]:
    """Runs in every process of the group: every call on every layout."""
    return [{name: on_this_layout(degrees, zero, CASES[name]) for name in names} for degrees, zero, names in cases]


def on_this_layout(degrees: dict[str, int], zero: Any, case: Case) -> Sampled:
    parallel = ParallelConfig(zero=zero, mesh=MeshConfig(**degrees), precision=FP64)
    mesh = meshes.build(parallel.mesh, dist.get_world_size(), CPU)
    with torch.device("meta"):
        model = build_model(MODEL)
    parts = components(parallelize(model, parallel, mesh, CPU, fill).requires_grad_(False), mesh, case)
    for axis in mesh.axes.values():
        axis.bytes_sent = 0
    return Sampled(sample(parts, case), dict(mesh.bytes_sent()), predicted(case, mesh, parallel))


def components(model: torch.nn.Module, mesh: Mesh, case: Case) -> Components:
    return Components(
        model=model,
        cfg=MODEL,
        autoencoder=Latents(),
        text_encoder=FakeText(),
        objective=case.objective,
        layout=token_layout(MODEL, SequenceParallel(mesh)),
        mesh=mesh,
        device=CPU,
        prompt_suffix=False,
    )


def sample(parts: Components, case: Case) -> Tensor:
    ratios = RATIOS if case.edits else None
    told: dict[str, Any] = {"seed": SEEDS, "text": PROMPTS, "neg": NEGATIVES}
    return build_api(parts)(case.option, noise=start(), edit_ratios=ratios, **told)


def predicted(case: Case, mesh: Mesh, parallel: ParallelConfig) -> dict[str, int]:
    """Bytes by axis of one call, by formula."""
    place = RankLayout(meshes.view({name: mesh[name].degree for name in meshes.AXES}, dist.get_rank()), parallel)
    passes = [2] * case.option.num_steps
    if case.option.text_osci:
        passes[3] = 1
    batch = MicroBatch(samples=2, txt=TEXT_TOKENS, img=FRAMES * HEIGHT * WIDTH // 4, frames=FRAMES, has_mask=True)
    sums = [3 * 2 * 8, 2 * 2 * 8] * passes.count(2) if case.option.use_flaw_fix else []  # of two clips, fp64
    return sampling_bytes(structure(MODEL, case.edits), place, batch, passes, VALUES, outputs=2, sums=sums)


ALL = tuple(CASES)
QUICK: list[SamplingCase] = [({"ulysses": 2}, 0, ("ddpm", "contrast"))]
SLOW: dict[int, list[SamplingCase]] = {
    2: [({axis: 2}, zero, ALL) for axis in ("shard", "ulysses", "ring", "tensor", "cfg") for zero in (0, 3)],
    3: [({axis: 3}, 3, ALL) for axis in ("ulysses", "ring")],
    4: [({"ring": 2, "ulysses": 2}, 3, ALL), ({"cfg": 2, "ulysses": 2}, 3, ALL)],
}


def check(world: int, cases: list[SamplingCase], timeout: float) -> None:
    truths = {name: by_hand(name) for name in {name for *_, names in cases for name in names}}
    check_sampled(cases, run_distributed(on_these_layouts, world, cases, timeout=timeout), truths)


@pytest.mark.parametrize("name", CASES)
def test_one_process_samples_what_the_formulas_say(name: str) -> None:
    mesh, truth = meshes.view({}), by_hand(name)
    found = sample(components(plain_model(), mesh, CASES[name]), CASES[name])
    assert found.dtype == torch.float64
    assert ((found - truth).abs().max() / truth.abs().max()).item() <= 1e-10


def test_layouts_sample_what_one_process_samples() -> None:
    check(2, QUICK, 100)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", SLOW)
def test_every_layout_samples_what_one_process_samples(world: int) -> None:
    check(world, SLOW[world], 800)
