"""Frames that are given to a clip that is sampled, and what a step does with them: around the steps of the loop.

Elementwise, so every process works on its own tokens. What is drawn is that of a step, whether or not it is used.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from opensora.models.conditions import Conditions
from opensora.schedulers.base import EditingSolver

StepNoise = Callable[[int], Tensor]  # number of a step -> standard normal values like x


class GivenFrames(Protocol):
    """What the loop asks."""

    def before(self, x: Tensor, known: Conditions, index: int) -> tuple[Tensor, Conditions]:
        """What step ``index`` starts from, and what the model is told then."""

    def after(self, before: Tensor, x: Tensor, index: int) -> Tensor:
        """What becomes of ``x``, which the step has made; ``before``: what it was at its beginning."""


@dataclass(frozen=True)
class EditedFrames:
    """Clean frames in the place of noisy ones (Open-Sora 1.1, 1.2): each is kept until the noise has fallen to its edit
    ratio, gets noise there, and is made with the others from then on. Ratio 0 keeps a frame, 1 makes it anew."""

    ratios: Tensor  # (B, N) or (B, T, S), of this process's tokens
    solver: EditingSolver
    noise: StepNoise

    def before(self, x: Tensor, known: Conditions, index: int) -> tuple[Tensor, Conditions]:
        edits = self.solver.edits(self.ratios, index)
        noisy = self.solver.noised(x, self.noise(index), index)
        return torch.where(edits.renoised[..., None], noisy, x), replace(known, known=~edits.noisy)

    def after(self, before: Tensor, x: Tensor, index: int) -> Tensor:
        kept = self.solver.edits(self.ratios, index).kept
        return torch.where(kept[..., None], before, x)


@dataclass(frozen=True)
class CleanFrames:
    """Known frames in the place of noisy ones along a flow (Wan TI2V-5B): clean from the first step to the last, and
    the model is told in every pass which they are."""

    def before(self, x: Tensor, known: Conditions, index: int) -> tuple[Tensor, Conditions]:
        return self._kept(x, known), known

    def after(self, before: Tensor, x: Tensor, index: int) -> Tensor:
        return x  # what is known is put back before the next step, and at the end

    def _kept(self, x: Tensor, known: Conditions) -> Tensor:
        if known.reference is None or known.known is None:
            return x
        return torch.where(known.known[..., None], known.reference.to(x), x)


@dataclass(frozen=True)
class SDEdit:
    """Frames that the model reads beside the noise stand in it too, with the noise of each step (use_sdedit of 1.3)."""

    solver: EditingSolver
    noise: StepNoise

    def before(self, x: Tensor, known: Conditions, index: int) -> tuple[Tensor, Conditions]:
        if known.reference is None or known.known is None:
            return x, known
        noisy = self.solver.noised(known.reference.to(x), self.noise(index), index)
        return torch.where(known.known[..., None], noisy, x), known

    def after(self, before: Tensor, x: Tensor, index: int) -> Tensor:
        return x
