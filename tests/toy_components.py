"""The toys that golden tensors were computed with, written out: an autoencoder of means and a model of one layer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from opensora.utils.tasks import TaskRunner, one_by_one


class ToyAutoencoder:
    """8x8 means over space, of frame 0 and of frames 4k-3 to 4k where it is causal, else of frames 4k to 4k+3, as far
    as they are there. ``mix`` (C, 3) makes channels of colours."""

    stride = (4, 8, 8)
    is_costly = False

    def __init__(self, mix: Tensor, causal: bool = True) -> None:
        self.mix, self.causal, self.channels = mix, causal, len(mix)

    def encode(self, pixels: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        groups = [pixels[:, :, :1], *pixels[:, :, 1:].split(4, dim=2)] if self.causal else pixels.split(4, dim=2)
        frames = torch.stack([group.mean(dim=2) for group in groups if group.shape[2]], dim=2)
        means = frames.unflatten(4, (-1, 8)).unflatten(3, (-1, 8)).mean(dim=(4, 6))
        return torch.einsum("cd,bdthw->bcthw", self.mix.to(means), means)

    def decode(self, latents: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        colours = torch.einsum("cd,bcthw->bdthw", self.mix.to(latents), latents)
        times = [1 if self.causal and t == 0 else 4 for t in range(latents.shape[2])]
        frames = colours.repeat_interleave(torch.tensor(times), dim=2)
        return frames.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)


def toy_velocity(
    w: Mapping[str, Tensor],
    *,
    img: Tensor,
    img_ids: Tensor,
    txt: Tensor,
    timesteps: Tensor,
    y_vec: Tensor,
    cond: Tensor | None,
    guidance: Tensor | None,
) -> Tensor:
    """v = img A + sin(cond B) + mean over tokens(txt) C + y_vec D + t e + 0.05 guidance f + 0.1 img_ids G."""
    whole = (txt.mean(dim=1) @ w["w.C"] + y_vec @ w["w.D"] + timesteps[:, None] * w["w.e"])[:, None]
    v = img @ w["w.A"] + whole + 0.1 * img_ids @ w["w.G"]
    if cond is not None:
        v = v + torch.sin(cond @ w["w.B"])
    return v if guidance is None else v + 0.05 * (guidance[:, None] * w["w.f"])[:, None]
