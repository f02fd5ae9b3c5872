"""From noise to latents: the inputs of a pass, and Euler steps down the times."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Progress = Callable[[int, int], None]  # (steps done, steps in all)


@dataclass(frozen=True, kw_only=True)
class TextInputs:
    """What one pass of the model reads of a prompt, this process's share of it."""

    txt: Tensor  # (B, L, context_in_dim)
    txt_ids: Tensor  # (B, L, 3)
    y_vec: Tensor  # (B, vec_in_dim)
    txt_mask: Tensor | None = None  # (B, L)
    context: Any = None  # for the attention cores: who holds which tokens


def predict(
    model: Callable[..., Tensor],
    x: Tensor,
    t: float,
    img_ids: Tensor,
    text: TextInputs,
    cond: Tensor | None,
    guidance: Tensor | None = None,
) -> Tensor:
    times = torch.full((x.shape[0],), t, device=x.device, dtype=x.dtype)
    return model(
        img=x,
        img_ids=img_ids,
        txt=text.txt,
        txt_ids=text.txt_ids,
        timesteps=times,
        y_vec=text.y_vec,
        cond=cond,
        guidance=guidance,
        txt_mask=text.txt_mask,
        context=text.context,
    )


def integrate(
    velocity: Callable[[Tensor, float, int], Tensor], img: Tensor, timesteps: list[float], progress: Progress | None
) -> Tensor:
    """Euler steps down the times; the sum is kept in fp32 (fp64 for fp64 img)."""
    x = img if img.dtype == torch.float64 else img.float()
    steps = len(timesteps) - 1
    for step in range(steps):
        now, then = timesteps[step], timesteps[step + 1]
        x = x + (then - now) * velocity(x, now, step)
        if progress is not None:
            progress(step + 1, steps)
    return x
