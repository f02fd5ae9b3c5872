"""Clips with references in them, and clips that go on from one another: any layout gives what one process gives, fp64
pixels to 1e-10. The reference is a plain model, and every clip written out: its noise, Euler steps with frames that are
kept, edited or read beside the noise, and how clips are joined."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from acceleration.config import MeshConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import Mesh
from acceleration.parallelize import parallelize
from acceleration.sequence import SequenceParallel
from opensora.assembly.components import Components
from opensora.assembly.token_layout import token_layout
from opensora.config.run import SampleConfig
from opensora.inference.opensora_1x.clips import LongClips
from opensora.inference.pipeline import build_sampler
from opensora.inference.prompts import Job, read_jobs
from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.families import build_model, family_of
from opensora.sampling.options import SamplingOption
from opensora.schedulers.rectified_flow_v1 import RectifiedFlowV1Config
from opensora.utils.rng import derive_key, torch_generator
from opensora.utils.tasks import TaskRunner, one_by_one
from opensora.utils.tokens import image_ids, pack, unpack
from tests.dist.harness import run_distributed
from tests.dist.layouts import FP64
from tests.dist.parity import TOLERANCE, relative
from tests.dist.problem import FakeText
from tests.dist.stdit import CHANNELS, CPU, MODELS, alive, plain_model

FRAMES, HEIGHT, WIDTH, PATCH = 5, 3, 13, (1, 2, 2)  # of latents, which here are places of pixels
WHOLE, VALUES = (5, 4, 14), 4 * CHANNELS
CLIP = SamplingOption(width=WIDTH, height=HEIGHT, num_frames=FRAMES, num_steps=4, guidance=4.0, fps=8.0, seed=3)
PROMPTS = ("|0|a fox runs|1|stands|3|never", "two")
MIX = torch.tensor([[0.9, 0.1, 0.2], [-0.3, 0.8, 0.1], [0.2, -0.1, 1.1], [0.5, 0.4, -0.6]], dtype=torch.float64)


class Colours:
    """Latents are colours, mixed; of latents that are no mixture the nearest one is decoded."""

    channels, stride, causal, is_costly = CHANNELS, (1, 1, 1), True, False

    def encode(self, pixels: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        return torch.einsum("ck,bkthw->bcthw", MIX.to(pixels), pixels)

    def decode(self, latents: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        return torch.einsum("kc,bcthw->bkthw", torch.linalg.pinv(MIX).to(latents), latents)


@dataclass(frozen=True)
class Case:
    """One video for each of two prompts."""

    model: str
    cfg: SampleConfig
    version: Any = "1.2"


def config(**given: Any) -> SampleConfig:
    return SampleConfig(weights="w", prompts=PROMPTS, neg="blur", sampling=CLIP, condition_frame_length=2, **given)


def cases(folder: Path) -> dict[str, Case]:
    """``folder`` has a.png and b.png."""
    both = f"{folder / 'a.png'};{folder / 'b.png'}"
    beside: dict[str, Any] = {"release": "1.3", "cond_type": "i2v_loop", "loop": 2}
    beside |= {"reference_path": (both, str(folder / "b.png"))}
    guided = replace(CLIP, guidance_img=2.0, text_osci=True, image_osci=True, force_num=1, use_sdedit=True)
    return {
        "placed": Case(
            "stdit3",
            config(
                release="1.2",
                loop=3,
                condition_frame_edit=0.3,
                reference_path=(both, None),
                mask_strategy=("0;0,1,0,-1,1,0.5;2,1,0,-1", None),
            ),
        ),
        "masked": Case("stdit3", config(reference_path=(both, both), mask_strategy=("0,1,0,2,1,0.8", "0;0,1,0,1,1,1"))),
        "tail": Case("windows", config(**(beside | {"cond_type": "i2v_tail", "loop": 3})), "1.3"),
        "beside": Case("windows", replace(config(**beside), sampling=guided), "1.3"),
        "latents": Case("stdit3", config(release="1.3", loop=2), "1.3"),
    }


def files(folder: Path) -> Path:
    for name, start in (("a", 0), ("b", 90)):
        pixels = (torch.arange(HEIGHT * WIDTH * 3).view(HEIGHT, WIDTH, 3) * 7 + start) % 256
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{name}.png")
    return folder


# By hand: latents (C, T', H', W') of one sample.
def coded(path: Path) -> Tensor:
    pixels = torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8).view(HEIGHT, WIDTH, 3)
    return torch.einsum("ck,hwk->chw", MIX, pixels.double() / 127.5 - 1)[:, None]


def velocity(case: Case, x: Tensor, prompt: str, *, null: bool, time: float, known: Tensor, reference: Tensor | None):
    """(C, T', H', W'). ``known`` (T',) bool; ``reference``: beside the noise."""
    cfg, text = MODELS[case.model], FakeText().encode([prompt])
    filled, places = torch.zeros(1, CHANNELS, *WHOLE, dtype=torch.float64), WHOLE[1] // 2 * (WHOLE[2] // 2)
    filled[0, ..., :HEIGHT, :WIDTH] = x

    def tokens(latents: Tensor) -> Tensor:
        return pack(latents, PATCH).unflatten(1, (FRAMES, places))

    beside = None
    if reference is not None:
        beside = torch.zeros_like(filled)
        beside[0, ..., :HEIGHT, :WIDTH] = reference
        beside = tokens(beside)
    wants_known = bool(cfg.cond_embed) == (reference is not None)
    told = Conditions(
        text=text.txt,
        text_mask=text.mask,
        dropped=torch.tensor([null and not prompt]),
        fps=torch.tensor([CLIP.fps]),
        size=torch.tensor([(HEIGHT, WIDTH)], dtype=torch.float32),
        num_frames=torch.tensor([float(FRAMES)]),
        reference=beside,
        known=known[None, :, None].expand(1, -1, places) if wants_known else None,
    )
    batch = TokenBatch(
        x=tokens(filled),
        positions=image_ids(WHOLE, PATCH)[None].unflatten(1, (FRAMES, places)),
        grid=(FRAMES, WHOLE[1] // 2, WHOLE[2] // 2),
    )
    model = plain_model(cfg)
    out = model(**family_of(cfg).arguments(cfg, batch, torch.tensor([time], dtype=torch.float64), told))[..., :VALUES]
    return unpack(out.flatten(1, 2), WHOLE, PATCH)[0, ..., :HEIGHT, :WIDTH]


def drawn(seed: int, *purpose: Any) -> Tensor:
    return torch.randn(CHANNELS, FRAMES, HEIGHT, WIDTH, generator=torch_generator(seed, *purpose)).double()


@torch.no_grad()
def clip_by_hand(
    case: Case, seed: int, prompt: str, ratios: Tensor, values: Tensor, reference: Tensor | None, known: Tensor
) -> Tensor:
    """Latents of one clip: frames of ``values`` whose ratio is below 1 stand in the noise."""
    option, edits = case.cfg.sampling, MODELS[case.model].cond_embed is False
    x = torch.where((ratios < 1).view(1, -1, 1, 1), values, drawn(seed, "sampling noise"))
    steps, started = option.num_steps, ratios == 1
    for step in range(steps):
        now, then, before = 1 - step / steps, 1 - (step + 1) / steps, x
        noisy = (ratios >= now - 1e-6) if edits else torch.ones(FRAMES, dtype=torch.bool)
        if edits:
            fresh = (1 - now) * x + now * drawn(seed, "frame noise", step)
            x = torch.where((noisy & ~started).view(1, -1, 1, 1), fresh, x)
            started = noisy
        if option.use_sdedit and reference is not None:
            fresh = (1 - now) * reference + now * drawn(seed, "frame noise", step)
            x = torch.where(known.view(1, -1, 1, 1), fresh, x)
        told: dict[str, Any] = {"time": 1000 * now, "known": known if reference is not None else ~noisy}
        c = velocity(case, x, prompt, null=False, reference=reference, **told)
        u = velocity(case, x, "blur", null=True, reference=reference, **told)
        off = option.text_osci and step >= option.force_num and step % 2
        if reference is None:
            v = u + (1.0 if off else option.guidance) * (c - u)
        else:
            blind = velocity(case, x, "blur", null=True, reference=torch.zeros_like(reference), **told)
            towards = 1.0 if off else option.guidance_img
            v = blind + towards * (u - blind) + (1.0 if off else option.guidance) * (c - u)
        x = x + (now - then) * v
        if edits:
            x = torch.where(noisy.view(1, -1, 1, 1), x, before)
    return x


def by_hand(case: Case, folder: Path) -> Tensor:
    """Pixels (B, 3, T, H, W)."""
    unmix = torch.linalg.pinv(MIX)
    return torch.stack([torch.einsum("kc,cthw->kthw", unmix, video) for video in latents_by_hand(case, folder)])


def latents_by_hand(case: Case, folder: Path) -> list[Tensor]:
    """(C, T, H, W) of each video: pixels are what mixtures are nearest to, so that joining them joins these."""
    a, b = coded(folder / "a.png"), coded(folder / "b.png")
    texts = [["a fox runs", "stands", "stands"], ["two"] * 3]
    free = torch.ones(FRAMES)
    nothing = torch.zeros(CHANNELS, FRAMES, HEIGHT, WIDTH, dtype=torch.float64)
    none = torch.zeros(FRAMES, dtype=torch.bool)
    nearest = MIX @ torch.linalg.pinv(MIX)
    videos = []
    for row in range(2):
        clips: list[Tensor] = []
        for clip in range(case.cfg.loop):
            seed = CLIP.seed if clip == 0 else derive_key(CLIP.seed, "clip", clip)
            ratios, values, reference, known = free.clone(), nothing.clone(), None, none.clone()
            if case.model == "windows":
                reference = nothing.clone()
                if clip == 0 and case.cfg.cond_type == "i2v_loop":
                    reference[:, 0], known[0] = (a if row == 0 else b)[:, 0], True
                if clip:
                    reference[:, :2], known[:2] = clips[-1][:, -2:], True
                    if case.cfg.cond_type == "i2v_loop" or clip == case.cfg.loop - 1:
                        reference[:, -1], known[-1] = b[:, 0], True
            elif case.cfg.mask_strategy and case.cfg.loop == 1:
                if row == 0:
                    values[:, 2], ratios[2] = b[:, 0], 0.8
                else:
                    values[:, 0], ratios[0] = a[:, 0], 0.0  # and frame 1 is free
            elif case.cfg.mask_strategy and row == 0 and clip == 0:
                values[:, 0], ratios[0] = a[:, 0], 0.0
                values[:, -1], ratios[-1] = b[:, 0], 0.5
            elif case.cfg.mask_strategy and row == 0 and clip == 2:
                values[:, -1], ratios[-1] = b[:, 0], 0.0
            if clip and reference is None:
                again = clips[-1] if case.version == "1.3" else torch.einsum("cd,dthw->cthw", nearest, clips[-1])
                values[:, :2], ratios[:2] = again[:, -2:], case.cfg.condition_frame_edit
            clips.append(clip_by_hand(case, seed, texts[row][clip], ratios, values, reference, known))
        videos.append(torch.cat([clips[0], *(one[:, 2:] for one in clips[1:])], dim=1))
    return videos


# On layouts.
def on_these_layouts(folder: Path, layouts: list[tuple[dict[str, int], Any, tuple[str, ...]]]) -> list[Any]:
    """Runs in every process of the group."""
    torch.set_num_threads(1)
    return [
        {name: on_this_layout(degrees, zero, cases(folder)[name]) for name in names} for degrees, zero, names in layouts
    ]


def on_this_layout(degrees: dict[str, int], zero: Any, case: Case) -> Tensor:
    parallel, cfg = ParallelConfig(zero=zero, mesh=MeshConfig(**degrees), precision=FP64), MODELS[case.model]
    mesh = meshes.build(parallel.mesh, dist.get_world_size(), CPU)
    with torch.device("meta"):
        model = build_model(cfg)
    return made(case, parallelize(model, parallel, mesh, CPU, alive).requires_grad_(False), mesh)


def made(case: Case, model: torch.nn.Module, mesh: Mesh) -> Tensor:
    parts = Components(
        model=model,
        cfg=MODELS[case.model],
        autoencoder=Colours(),
        text_encoder=FakeText(),
        objective=RectifiedFlowV1Config(version=case.version),
        layout=token_layout(MODELS[case.model], SequenceParallel(mesh)),
        mesh=mesh,
        device=CPU,
        prompt_suffix=False,
    )
    jobs: list[Job] = read_jobs(case.cfg)
    return LongClips(parts, case.cfg, build_sampler(parts), any(job.ref for job in jobs))(jobs)


QUICK: list[Any] = [({"ulysses": 2}, 0, ("placed",))]
SLOW: dict[int, list[Any]] = {
    2: [
        ({axis: 2}, zero, ("placed", "masked", "tail", "beside", "latents"))
        for axis, zero in (("shard", 3), ("ulysses", 3), ("ring", 0), ("tensor", 0), ("cfg", 0))
    ],
    3: [({"ulysses": 3}, 0, ("placed", "beside"))],
}


def check(folder: Path, world: int, layouts: list[Any], timeout: float) -> None:
    wanted = {name for *_, names in layouts for name in names}
    truths = {name: by_hand(cases(folder)[name], folder) for name in wanted}
    results = run_distributed(on_these_layouts, world, folder, layouts, timeout=timeout)
    for rank, found in enumerate(results):
        for layout, videos in zip(layouts, found, strict=True):
            for name, video in videos.items():
                assert video.dtype == torch.float64 and video.shape == truths[name].shape
                assert relative(video, truths[name]) <= TOLERANCE, (rank, layout, name)


@pytest.mark.parametrize("name", ["masked", "beside", "latents"])
def test_one_process_makes_what_the_formulas_say(name: str, tmp_path: Path) -> None:
    case, mesh = cases(files(tmp_path))[name], meshes.view({})
    found = made(case, plain_model(MODELS[case.model]), mesh)
    truth = by_hand(case, tmp_path)
    assert found.shape == truth.shape and relative(found, truth) <= TOLERANCE


def test_two_processes_make_what_the_formulas_say(tmp_path: Path) -> None:
    check(files(tmp_path), 2, QUICK, 100)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", SLOW)
def test_every_layout_makes_what_the_formulas_say(world: int, tmp_path: Path) -> None:
    check(files(tmp_path), world, SLOW[world], 800)
