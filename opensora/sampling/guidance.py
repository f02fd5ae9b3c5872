"""Guidance: the passes of the model in a step, and how they are combined."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from opensora.sampling.loop import Progress, TextInputs, integrate, predict
from opensora.sampling.options import SamplingOption
from opensora.utils.tasks import Task, TaskRunner, one_by_one

OSCILLATION_START = 10  # oscillating guidance is on in all steps before this one


class SampleDenoiser(Protocol):
    """From noise to latents; the choices are in ``DENOISERS``."""

    def denoise(
        self,
        model: Callable[..., Tensor],
        img: Tensor,
        *,
        timesteps: list[float],
        option: SamplingOption,
        img_ids: Tensor,
        prompt: TextInputs,
        negative: TextInputs | None = None,
        cond: Tensor | None = None,
        references: bool = False,
        latent_frames: int = 1,
        progress: Progress | None = None,
        run: TaskRunner = one_by_one,
    ) -> Tensor:
        """Tokens at t=0 in fp32 (fp64 for fp64 img), (B, N, C) as img.

        Args:
            model: a denoiser, see opensora/models/base.py.
            img: (B, N, C) noise, packed; N may be this process's share.
            timesteps: falling times, see get_schedule.
            option: guidance, and how it varies.
            img_ids: (B, N, 3), the (t, h, w) of img.
            prompt, negative: the prompt and what to move away from ("" if nothing).
            cond: (B, N, C') for models that read references, zeros where nothing is known; None for others.
            references: whether cond knows anything, on any process: all must say the same.
            latent_frames: T' of the whole clip.
            progress: called after every step.
            run: evaluates the model for the passes of a step, which do not depend on each other.
        """


class I2VDenoiser:
    """Classifier-free guidance by several passes, for prompts and for references.

    With c the pass that knows prompt and references, u the one that knows references, u2 the one that knows nothing:
    v = u2 + g_img (u - u2) + g_txt (c - u). Without references u = u2 and two passes do; with a guidance of 1 one.
    """

    @torch.no_grad()
    def denoise(
        self,
        model: Callable[..., Tensor],
        img: Tensor,
        *,
        timesteps: list[float],
        option: SamplingOption,
        img_ids: Tensor,
        prompt: TextInputs,
        negative: TextInputs | None = None,
        cond: Tensor | None = None,
        references: bool = False,
        latent_frames: int = 1,
        progress: Progress | None = None,
        run: TaskRunner = one_by_one,
    ) -> Tensor:
        """See SampleDenoiser. Raises ValueError when guidance is on and there is no negative prompt."""
        if negative is None and (references or option.guidance != 1):
            raise ValueError(f"guidance={option.guidance} needs the features of a negative prompt, as those of ''")

        def velocity(x: Tensor, t: float, step: int) -> Tensor:
            def evaluate(*passes: tuple[TextInputs, Tensor | None]) -> list[Tensor]:
                work = [Task(partial(predict, model, x, t, img_ids, *known), tuple(x.shape)) for known in passes]
                return [found.to(x.dtype) for found in run(work)]

            guidance = oscillate(option.guidance, step) if option.text_osci else option.guidance
            if negative is None or (guidance == 1 and not references):
                return evaluate((prompt, cond))[0]
            if not references or cond is None:
                prompted, unprompted = evaluate((prompt, cond), (negative, cond))
                return unprompted + guidance * (prompted - unprompted)
            nothing = torch.zeros_like(cond)
            prompted, unprompted, uncond_image = evaluate((prompt, cond), (negative, cond), (negative, nothing))
            along_clip = image_guidance(option, step, len(timesteps), latent_frames, img_ids)
            return uncond_image + along_clip * (unprompted - uncond_image) + guidance * (prompted - unprompted)

        return integrate(velocity, img, timesteps, progress)


class DistilledDenoiser:
    """One pass per step; the model reads the guidance scale as an input (Flux-dev)."""

    @torch.no_grad()
    def denoise(
        self,
        model: Callable[..., Tensor],
        img: Tensor,
        *,
        timesteps: list[float],
        option: SamplingOption,
        img_ids: Tensor,
        prompt: TextInputs,
        negative: TextInputs | None = None,
        cond: Tensor | None = None,
        references: bool = False,
        latent_frames: int = 1,
        progress: Progress | None = None,
        run: TaskRunner = one_by_one,
    ) -> Tensor:
        """See SampleDenoiser; there is nothing to move away from, so the negative prompt is not read."""
        guidance = torch.full((img.shape[0],), option.guidance, device=img.device)

        def velocity(x: Tensor, t: float, step: int) -> Tensor:
            one = Task(partial(predict, model, x, t, img_ids, prompt, cond, guidance), tuple(x.shape))
            return run([one])[0].to(x.dtype)

        return integrate(velocity, img, timesteps, progress)


DENOISERS: dict[str, type[SampleDenoiser]] = {"i2v": I2VDenoiser, "distill": DistilledDenoiser}


def passes_per_step(option: SamplingOption, *, references: bool = False) -> int:
    """How often a step evaluates the model, in the steps with the most."""
    if option.method == "distill":
        return 1
    return 3 if references else 1 if option.guidance == 1 else 2


def oscillate(guidance: float, step: int) -> float:
    """``guidance`` in the first 10 steps and every even one after, else 1 (off)."""
    return guidance if step < OSCILLATION_START or step % 2 == 0 else 1.0


def image_guidance(
    option: SamplingOption, step: int, times: int, latent_frames: int, img_ids: Tensor
) -> float | Tensor:
    """g_img of a step: a number, or (B, N, 1) growing from 1 to a limit along the clip, the limit falling to 1."""
    guidance = oscillate(option.guidance_img, step) if option.image_osci else option.guidance_img
    if not option.scale_temporal_osci or guidance <= 1:
        return guidance
    limit = 1 + (guidance - 1) * (1 - step / (times - 1))
    return 1 + (limit - 1) * img_ids[..., :1] / max(latent_frames - 1, 1)
