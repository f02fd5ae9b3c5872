"""A batch of jobs becomes clips, on all processes of a group, with the plumbing of the sampling command."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from acceleration.distributed.mesh import Mesh
from acceleration.sharding import fsdp
from opensora.inference.lengths import coded
from opensora.inference.pipeline import Made, fit, pixels_of
from opensora.inference.save import to_uint8
from opensora.models.base import decode_clip, latent_grid
from opensora.sampling.options import SamplingOption
from opensora.serve.jobs import Job
from opensora.serve.store import Store
from opensora.serve.worker.models import Model, paths
from opensora.serve.worker.peers import Peers
from opensora.utils.rng import torch_generator

OnStep: TypeAlias = Callable[[int, int], None]
COMPARED = 2  # steps of a batch that are compared with those of its clips alone: the second shows what the first made
# A step cache that goes by changes takes a decision for a whole batch.
FIXED_CACHES = ("none", "pyramid_attention")


class Enough(Exception):
    """As many steps are done as were wanted."""


def shares_of(jobs: int, groups: int) -> list[int]:
    """Clips of every data-parallel group, the most first."""
    return [jobs // groups + (index < jobs % groups) for index in range(groups)]


def share_of(jobs: Sequence[Job], mesh: Mesh) -> list[Job]:
    """Those that this process works on; where none is left it repeats the last, as weights are gathered by all."""
    shares = shares_of(len(jobs), mesh.data_degree)
    first = sum(shares[: mesh.data_rank])
    return list(jobs[first : first + shares[mesh.data_rank]] or jobs[-1:])


def make_clips(peers: Peers, store: Store, model: Model, jobs: Sequence[Job], on_step: OnStep) -> Tensor:
    """(n, T, H, W, 3) uint8 on rank 0; to the bit those of the command. Collective, inside of ``Peers.attempt``.

    Args:
        jobs: of one ``batch_key``, with or without references all of them.
        on_step: called with (steps done, steps in all), from (0, all) on, on all processes; may raise on all.

    Raises:
        UserError: what the command would refuse.
    """
    mine, mesh = share_of(jobs, model.parts.mesh), model.parts.mesh
    model.check(mine, paths(store, mine))
    model.use_lora(jobs[0].request.get("lora"))
    option, kind = model.option(jobs[0]), model.kind(jobs[0])
    made = denoised(store, model, mine, option, kind, Paced(on_step, model.parts.device))
    peers.border()
    clips = to_uint8(pixels_of(model.parts, made, kind, option.num_frames))
    clips = torch.stack([model.watermark(clip) for clip in clips]) if model.watermark else clips
    return peers.to_first(clips, shares_of(len(jobs), mesh.data_degree), mesh)


def denoised(
    store: Store, model: Model, jobs: Sequence[Job], option: SamplingOption, kind: str, on_step: OnStep
) -> Made:
    return model.sampler(
        option,
        kind,
        seed=[int(model.option(job).seed) for job in jobs],
        text=[job.prompt for job in jobs],
        neg=[model.neg(job) for job in jobs],
        ref=paths(store, list(jobs)),
        on_step=on_step,
    )


class Paced:
    """Steps are counted when the device has done them, but for the last one, which it may still work on."""

    def __init__(self, on_step: OnStep, device: torch.device) -> None:
        self._on_step, self._device = on_step, device
        self._before: torch.cuda.Event | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._device.type == "cuda":
            if self._before is not None:
                self._before.synchronize()
            self._before = torch.cuda.Event()
            self._before.record()
        self._on_step(done, total)


def first_steps(store: Store, model: Model, jobs: Sequence[Job], steps: int) -> list[Tensor]:
    """What the model gave in the first steps: (clips, ...) of every evaluation, this process's share. Collective."""
    found: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        found.append(output.detach().clone())

    def leave(done: int, total: int) -> None:
        if done == min(steps, total):
            raise Enough

    handle = model.parts.model.register_forward_hook(keep)
    try:
        with contextlib.suppress(Enough):
            denoised(store, model, jobs, model.option(jobs[0]), model.kind(jobs[0]), leave)
    finally:
        handle.remove()
    return found


def same_bits(peers: Peers, store: Store, model: Model, jobs: Sequence[Job]) -> bool:
    """Whether these jobs give the same together as alone: in their first steps, and when latents of their size are
    decoded. Collective, inside of ``Peers.attempt``; the same on all processes."""
    option = model.option(jobs[0])
    if option.noise != "keyed" or option.cache.kind not in FIXED_CACHES:
        return False
    model.check(list(jobs), paths(store, list(jobs)))
    model.use_lora(jobs[0].request.get("lora"))
    mine, most = share_of(jobs, model.parts.mesh), shares_of(len(jobs), model.parts.mesh.data_degree)[0]
    together = first_steps(store, model, mine, COMPARED)
    equal = decodes_alike(model, option, model.kind(jobs[0]), len(mine))
    for turn in range(most):  # as many on every process
        row = min(turn, len(mine) - 1)
        alone = first_steps(store, model, mine[row : row + 1], COMPARED)
        pairs = zip(together, alone, strict=True)
        equal = equal and all(torch.equal(many[row : row + 1], one) for many, one in pairs)
    return peers.all_say(equal)


def decodes_alike(model: Model, option: SamplingOption, kind: str, clips: int) -> bool:
    """Whether an autoencoder makes the same of clips together as of each alone. Collective."""
    parts = model.parts
    latents, frames = drawn_latents(model, option, kind, clips)
    many = decode_clip(parts.autoencoder, latents, frames, parts.run_tiles)
    ones = [decode_clip(parts.autoencoder, one[None], frames, parts.run_tiles) for one in latents]
    return torch.equal(many, torch.cat(ones))


def drawn_latents(model: Model, option: SamplingOption, kind: str, clips: int) -> tuple[Tensor, int]:
    """(B, C, T', H', W') of clips of this size, and the frames that they are coded as."""
    parts, option = model.parts, fit(option, model.parts)
    assert option.height is not None and option.width is not None
    frames = coded(option, parts.layout.denoising, parts.autoencoder, kind)
    grid = latent_grid(frames, option.height, option.width, parts.autoencoder)
    shape = (clips, parts.autoencoder.channels, *grid)
    return torch.randn(shape, generator=torch_generator(0, "batch")).to(parts.device), frames


def warm_up(store: Store, model: Model, job: Job) -> float | None:
    """Two steps of a clip and its pixels. Collective.

    Returns:
        Seconds of the second step; None: a clip has one.
    """
    marks: list[float] = []

    def leave(done: int, total: int) -> None:
        if model.parts.device.type == "cuda":
            torch.cuda.synchronize(model.parts.device)
        marks.append(time.monotonic())
        if done == min(COMPARED, total):
            raise Enough

    option, kind = model.option(job), model.kind(job)
    with contextlib.suppress(Enough):
        denoised(store, model, [job], option, kind, leave)
    latents, frames = drawn_latents(model, option, kind, 1)
    decode_clip(model.parts.autoencoder, latents, frames, model.parts.run_tiles)
    return marks[2] - marks[1] if len(marks) > COMPARED else None


def mend(model: Model) -> None:
    """After an error in the middle of the model: the next clip begins as if nothing had been. No exchange."""
    fsdp.settle(model.parts.model)
    if model.parts.device.type == "cuda":
        torch.cuda.empty_cache()
