"""Guidance: the passes of the model in a step, and how their predictions are combined.

Apart from the solver, which sees one prediction, and from the model, which sees one pass. Names of passes: ``cond``
knows prompt and references, ``uncond`` knows the references, ``uncond_image`` knows nothing.

Only the channels that are ``guided`` are combined: a learned variance, and what else there is, stay those of ``cond``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from opensora.models.conditions import Conditions
from opensora.sampling.options import SamplingOption

OSCILLATION_START = 10  # oscillating guidance is on in all steps before this one, unless the job says another
FLAW_FIX = 0.7  # how much of the contrast is moved back (use_flaw_fix of Open-Sora 1.3)

Total: TypeAlias = Callable[[Tensor], Tensor]  # sum of what all processes have that share the samples


def alone(x: Tensor) -> Tensor:
    """``Total`` of one process."""
    return x


class Guidance(Protocol):
    """What a step asks of the model."""

    def passes(self, known: Conditions, null: Conditions | None, index: int) -> list[Conditions]:
        """What each pass of step ``index`` knows; the passes do not depend on each other.

        ``null``: the negative prompt, or no prompt; None where no step has a pass that knows it (``passes_per_step``).
        """

    def combine(self, predictions: list[Tensor], index: int) -> Tensor:
        """One prediction of those of the passes, in their order."""


@dataclass(frozen=True)
class NoGuidance:
    """One pass."""

    def passes(self, known: Conditions, null: Conditions | None, index: int) -> list[Conditions]:
        return [known]

    def combine(self, predictions: list[Tensor], index: int) -> Tensor:
        return predictions[0]


@dataclass(frozen=True)
class TextGuidance:
    """Classifier-free guidance (arXiv:2207.12598): v = uncond + g (cond - uncond). Two passes; one where g is 1."""

    option: SamplingOption
    guided: int | None = None  # channels of a token; None: all
    total: Total = alone

    def passes(self, known: Conditions, null: Conditions | None, index: int) -> list[Conditions]:
        if null is None or text_scale(self.option, index) == 1:
            return [known]
        return [known, known.without_text(null)]

    def combine(self, predictions: list[Tensor], index: int) -> Tensor:
        if len(predictions) == 1:
            return predictions[0]
        cond, uncond = (found[..., : self.guided] for found in predictions)
        guided = uncond + text_scale(self.option, index) * (cond - uncond)
        if self.option.use_flaw_fix:
            guided = with_contrast_of(cond, guided, self.total)
        return beside_rest(guided, predictions[0])


@dataclass(frozen=True)
class TextImageGuidance:
    """Guidance by prompt and references (InstructPix2Pix, arXiv:2211.09800, as in Open-Sora 1.3 and 2). Three passes:

    v = uncond_image + g_img (uncond - uncond_image) + g (cond - uncond)
    """

    option: SamplingOption
    steps: int
    latent_frames: int  # T' of the whole clip
    positions: Tensor  # (B, N, 3) or (B, T, S, 3), of this process's tokens
    guided: int | None = None  # channels of a token; None: all
    keeps_known: bool = False  # uncond_image is told which frames would be known, and that they are zeros

    def passes(self, known: Conditions, null: Conditions | None, index: int) -> list[Conditions]:
        assert null is not None
        without_text = known.without_text(null)
        return [known, without_text, without_text.without_reference(keeps_known=self.keeps_known)]

    def combine(self, predictions: list[Tensor], index: int) -> Tensor:
        cond, uncond, uncond_image = (found[..., : self.guided] for found in predictions)
        along_clip = image_scale(self.option, index, self.steps, self.latent_frames, self.positions.to(cond.dtype))
        guided = uncond_image + along_clip * (uncond - uncond_image) + text_scale(self.option, index) * (cond - uncond)
        return beside_rest(guided, predictions[0])


@dataclass(frozen=True)
class DistilledGuidance:
    """One pass; the model reads the scale as an input (Flux-dev)."""

    option: SamplingOption

    def passes(self, known: Conditions, null: Conditions | None, index: int) -> list[Conditions]:
        told = known.pooled if known.pooled is not None else known.text
        assert told is not None, "a distilled model reads a prompt"
        return [replace(known, guidance=torch.full((told.shape[0],), self.option.guidance, device=told.device))]

    def combine(self, predictions: list[Tensor], index: int) -> Tensor:
        return predictions[0]


def build_guidance(
    option: SamplingOption,
    *,
    references: bool,
    steps: int,
    latent_frames: int,
    positions: Tensor,
    guided: int | None = None,
    keeps_known: bool = False,
    total: Total = alone,
) -> Guidance:
    """How a job is guided.

    Args:
        references: whether frames are known, on any process: all must say the same.
        steps, latent_frames, positions, guided, keeps_known: see ``TextImageGuidance``.
        total: for what is of a whole sample.
    """
    if option.method == "distill":
        return DistilledGuidance(option)
    if references:
        return TextImageGuidance(option, steps, latent_frames, positions, guided, keeps_known)
    return NoGuidance() if option.guidance == 1 else TextGuidance(option, guided, total)


def beside_rest(guided: Tensor, whole: Tensor) -> Tensor:
    """The first channels ``guided``, and of ``whole`` all others."""
    rest = whole[..., guided.shape[-1] :]
    return torch.cat((guided, rest), dim=-1) if rest.shape[-1] else guided


def with_contrast_of(cond: Tensor, guided: Tensor, total: Total) -> Tensor:
    """``guided`` times 0.7 std(cond) / std(guided) + 0.3, of every whole sample (arXiv:2305.08891)."""
    both = torch.stack((cond, guided)).flatten(2)  # (2, B, values)
    count = torch.full_like(both[:1, :, :1].sum(2), both.shape[2])
    sums = total(torch.cat((both.sum(2), count)))  # (3, B)
    mean = sums[:2] / sums[2]
    spread = total((both - mean[..., None]).square().sum(2)).sqrt()
    factor = FLAW_FIX * spread[0] / spread[1].clamp(min=torch.finfo(spread.dtype).tiny) + 1 - FLAW_FIX
    return guided * factor.view(-1, *[1] * (guided.ndim - 1))


def passes_per_step(option: SamplingOption, *, references: bool = False) -> int:
    """How often a step evaluates the model, in the steps with the most."""
    if option.method == "distill":
        return 1
    return 3 if references else 2 if {option.guidance, option.guidance_low} - {1, None} else 1


def passes_of_steps(option: SamplingOption, *, references: bool = False) -> tuple[int, ...]:
    """How often every step evaluates the model: where oscillating guidance is off, the prompt alone is one pass."""
    most = passes_per_step(option, references=references)
    return tuple(1 if most == 2 and text_scale(option, step) == 1 else most for step in range(option.num_steps))


def oscillate(guidance: float, step: int, force_num: int = OSCILLATION_START) -> float:
    """``guidance`` in the first ``force_num`` steps and every even one after, else 1 (off)."""
    return guidance if step < force_num or step % 2 == 0 else 1.0


def text_scale(option: SamplingOption, step: int) -> float:
    """g of a step."""
    return oscillate(option.guidance, step, option.force_num) if option.text_osci else option.guidance


def image_scale(option: SamplingOption, step: int, steps: int, latent_frames: int, positions: Tensor) -> float | Tensor:
    """g_img of a step: a number, or (..., 1) growing along the clip from a least to a limit, which falls to the least.

    The least is 1, and in the last step the limit is a step above it; or, as in Open-Sora 1.3, the least is
    ``initial_image_scale``, and the limit reaches it.
    """
    guidance = option.guidance if option.guidance_img is None else option.guidance_img
    guidance = oscillate(guidance, step, option.force_num) if option.image_osci else guidance
    least, last = (option.initial_image_scale, max(steps - 1, 1)) if option.scale_image_weight else (1.0, steps)
    if not (option.scale_temporal_osci or option.scale_image_weight) or guidance <= least:
        return guidance
    limit = least + (guidance - least) * (1 - step / last)
    return least + (limit - least) * positions[..., :1] / max(latent_frames - 1, 1)
