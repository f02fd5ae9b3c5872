"""From a prompt and a seed to pixels: times, guidance and Euler steps."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tests.reference import draws, mmdit, references, training
from tests.reference.encoders import BlockTransform, Text

OSCILLATION_START = 10


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """What is sampled with which model."""

    weights: mmdit.Weights
    model: mmdit.Shape
    autoencoder: BlockTransform
    steps: int
    guidance: float
    size: tuple[int, int, int]  # frames, height, width
    distilled: bool = False  # the model reads the guidance; else it is made of two passes
    oscillates: bool = False  # guidance is off in odd steps from the eleventh on
    kind: str = "t2v"  # of what references give; another one takes three passes
    guidance_img: float = 1.0
    along_clip: bool = False  # guidance_img grows from 1 along the clip, to a limit that falls to 1 over the steps

    @property
    def grid(self) -> tuple[int, int, int]:
        """(T', H', W'): the first frame is coded on its own."""
        frames, height, width = self.size
        return (frames - 1) // 4 + 1, height // self.autoencoder.spatial, width // self.autoencoder.spatial

    def times(self) -> list[float]:
        """From 1 (noise) to 0 (data), more of them near 1 the more tokens there are."""
        frames, height, width = self.grid
        alpha = training.shift(frames, height * width // training.PATCH**2)
        even = [1 - i / self.steps for i in range(self.steps + 1)]
        return [alpha * t / (1 + (alpha - 1) * t) for t in even]

    @torch.no_grad()
    def pixels(self, prompt: Text, negative: Text, seed: int, given: Tensor | None = None) -> Tensor:
        """(3, T, H, W) fp64 in [-1, 1].

        Args:
            given: frames (3, T, H, W) of which the kind knows those at the ends; None: nothing is known.
        """
        mask, known = torch.zeros(1, *self.grid), torch.zeros(self.autoencoder.channels, *self.grid)
        if given is not None:
            mask, known = references.given(self.kind, given, self.autoencoder, self.grid)
        cond = training.packed(torch.cat([mask.double(), known.double()]))
        noise = draws.normal((1, self.autoencoder.channels, *self.grid), seed, "sampling noise")[0]
        x, times = training.packed(noise.double()), self.times()
        for step, (now, then) in enumerate(pairwise(times)):
            x = x + (then - now) * self._guided(x, now, step, prompt, negative, cond)
        latents = training.unpacked(x, self.grid)
        return self.autoencoder.decode(torch.where(mask.bool(), known.double(), latents))

    def _guided(self, x: Tensor, t: float, step: int, prompt: Text, negative: Text, cond: Tensor) -> Tensor:
        if self.distilled:
            return self._velocity(x, t, prompt, cond, self.guidance)
        off = self.oscillates and step >= OSCILLATION_START and step % 2
        towards, away = self._velocity(x, t, prompt, cond), self._velocity(x, t, negative, cond)
        guided = (1.0 if off else self.guidance) * (towards - away)
        if self.kind == "t2v":
            return away + guided
        nothing = self._velocity(x, t, negative, torch.zeros_like(cond))
        return nothing + self._towards_references(step, bool(off)) * (away - nothing) + guided

    def _towards_references(self, step: int, off: bool) -> Tensor:
        """(N, 1), of every token."""
        frames, height, width = self.grid
        scale = 1.0 if off else self.guidance_img
        along = torch.full((frames,), scale, dtype=torch.float64)
        if self.along_clip and scale > 1:
            top = torch.linspace(scale, 1, self.steps + 1, dtype=torch.float64)[step]
            along = torch.linspace(1, float(top), frames, dtype=torch.float64)
        return along.repeat_interleave(height * width // training.PATCH**2)[:, None]

    def _velocity(self, x: Tensor, t: float, text: Text, cond: Tensor, guidance: float | None = None) -> Tensor:
        return mmdit.velocity(
            self.weights,
            self.model,
            img=x,
            ids=training.coordinates(self.grid),
            txt=text.rows,
            vec=text.vec,
            time=torch.tensor(t, dtype=torch.float64),
            cond=cond,
            guidance=guidance,
        )


def levels(pixels: Tensor) -> Tensor:
    """(T, H, W, 3) uint8 of pixels in [-1, 1]."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0)
