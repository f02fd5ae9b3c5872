"""``I2VDenoiser`` and ``DistilledDenoiser``: sampling of an MMDiT by its forward's own names, for scripts.

Both are the same loop with guidance by passes or as an input of the model; ours samples by ``sampling.loop.denoise``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from opensora.models.conditions import Conditions
from opensora.sampling.evaluation import Watch, unwatched
from opensora.sampling.guidance import build_guidance
from opensora.sampling.loop import Progress, denoise
from opensora.sampling.options import SamplingOption
from opensora.schedulers.euler import Euler
from opensora.utils.tasks import TaskRunner, one_by_one


@dataclass(frozen=True, kw_only=True)
class TextInputs:
    """What one pass of the model reads of a prompt, this process's share of it."""

    txt: Tensor  # (B, L, context_in_dim)
    txt_ids: Tensor  # (B, L, 3)
    y_vec: Tensor  # (B, vec_in_dim)
    txt_mask: Tensor | None = None  # (B, L)
    context: Any = None  # for the attention cores: who holds which tokens

    def conditions(self) -> Conditions:
        """The same for guidance, which knows no model's names."""
        return Conditions(text=self.txt, text_mask=self.txt_mask, pooled=self.y_vec, context=self.context)


class I2VDenoiser:
    """Classifier-free guidance by several passes, for prompts and for references; see sampling/guidance.py."""

    method: Literal["i2v", "distill"] = "i2v"

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
        watch: Watch = unwatched,
    ) -> Tensor:
        """Tokens at t=0 in fp32 (fp64 for fp64 img), (B, N, C) as img.

        Args:
            model: takes the arguments of ``MMDiTModel.forward``.
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
            watch: entered around every evaluation, as by a step cache.

        Raises:
            ValueError: guidance is on, and there is no negative prompt.
        """
        option = replace(option, method=self.method)
        by_passes = self.method == "i2v" and (references or option.guidance != 1)
        if negative is None and by_passes:
            raise ValueError(f"guidance={option.guidance} needs the features of a negative prompt, as those of ''")

        def predict(x: Tensor, t: Tensor, known: Conditions) -> Tensor:
            # What is told of known frames is passed on as it came; a pass that may not know them has none.
            frames = cond if cond is None or known.reference is not None else torch.zeros_like(cond)
            text = prompt if negative is None or known.text is prompt.txt else negative
            return model(
                img=x,
                img_ids=img_ids,
                txt=known.text,
                txt_ids=text.txt_ids,
                timesteps=t,
                y_vec=known.pooled,
                cond=frames,
                guidance=known.guidance,
                txt_mask=known.text_mask,
                context=known.context,
            )

        known = replace(prompt.conditions(), reference=cond)
        guidance = build_guidance(
            option, references=references, steps=len(timesteps) - 1, latent_frames=latent_frames, positions=img_ids
        )
        null = negative.conditions() if negative else None
        return denoise(predict, img, Euler(timesteps), guidance, known, null, progress=progress, run=run, watch=watch)


class DistilledDenoiser(I2VDenoiser):
    """One pass per step; the model reads the guidance scale as an input (Flux-dev), and no negative prompt."""

    method = "distill"


DENOISERS: dict[str, type[I2VDenoiser]] = {"i2v": I2VDenoiser, "distill": DistilledDenoiser}
