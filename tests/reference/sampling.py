"""From a prompt and a seed to pixels: times, guidance and Euler steps."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tests.reference import draws, mmdit, training
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
    def pixels(self, prompt: Text, negative: Text, seed: int) -> Tensor:
        """(3, T, H, W) fp64 in [-1, 1]."""
        noise = draws.normal((1, self.autoencoder.channels, *self.grid), seed, "sampling noise")[0]
        x, times = training.packed(noise.double()), self.times()
        for step, (now, then) in enumerate(pairwise(times)):
            x = x + (then - now) * self._guided(x, now, step, prompt, negative)
        return self.autoencoder.decode(training.unpacked(x, self.grid))

    def _guided(self, x: Tensor, t: float, step: int, prompt: Text, negative: Text) -> Tensor:
        if self.distilled:
            return self._velocity(x, t, prompt, self.guidance)
        off = self.oscillates and step >= OSCILLATION_START and step % 2
        towards, away = self._velocity(x, t, prompt), self._velocity(x, t, negative)
        return away + (1.0 if off else self.guidance) * (towards - away)

    def _velocity(self, x: Tensor, t: float, text: Text, guidance: float | None = None) -> Tensor:
        return mmdit.velocity(
            self.weights,
            self.model,
            img=x,
            ids=training.coordinates(self.grid),
            txt=text.rows,
            vec=text.vec,
            time=torch.tensor(t, dtype=torch.float64),
            cond=torch.zeros(len(x), x.shape[1] + training.PATCH**2),
            guidance=guidance,
        )


def levels(pixels: Tensor) -> Tensor:
    """(T, H, W, 3) uint8 of pixels in [-1, 1]."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0)
