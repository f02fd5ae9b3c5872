"""What a training objective and a solver are. Models, masks and layouts are no business of theirs.

An objective says at which times a model is trained, what it sees there, and what its prediction is compared with. A
solver walks from noise to data with predictions of a model trained by one of the objectives it fits.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from opensora.utils.tokens import Grid


class Noised(NamedTuple):
    """A training sample at a time, shaped as its latents."""

    x: Tensor  # (B, C, T', H', W'), what the model sees
    targets: dict[str, Tensor]  # by name, (B, C, T', H', W') each: what ``Objective.loss`` compares with


class Objective(Protocol):
    """A kind of training; made from its section of the configuration. Draws belong to (seed, step, sample).

    One whose times are not in [0, 1] has ``latest_time``, and ``whole_times`` if only whole numbers are times; one
    whose times depend on the pixels of clips (``Grid.pixels``) has ``needs_pixels``; one that may be of a part of all
    times has ``time_range``, in parts of the latest.
    """

    solvers: ClassVar[tuple[str, ...]]  # of ``SOLVERS``, those that sample from models it trained; first the default

    @property
    def outputs(self) -> int:
        """Values per latent that it needs of a model, 2 with a learned variance; of more it reads the first."""

    def times(self, seed: int, step: int, sample_ids: tuple[int, ...], grid: Grid) -> Tensor:
        """(B,) fp32 on the CPU: the time of each sample, as the model reads it."""

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor, known: Tensor | None = None) -> Noised:
        """Clean latents and standard normal noise (B, C, T', H', W') at times (B,), in fp32 (fp64 for fp64 latents).

        ``known`` (B, T', H', W') bool: latents that the model is given in the place of noisy ones.
        """

    def loss(self, prediction: Tensor, targets: Mapping[str, Tensor], t: Tensor) -> Tensor:
        """The loss of every value, in fp32 (fp64 if an input is); the caller masks, sums, and divides by their number.

        Args:
            prediction: (..., outputs * C), tokens or latents with their channels last.
            targets: (..., C) each, from ``noised``.
            t: times that broadcast with them.

        Returns:
            (..., C)
        """


class Solver(Protocol):
    """Steps from noise to data. Elementwise, so that every process steps its own tokens.

    One whose times are not from 1 to 0 has ``pure_noise``, the time of pure noise.
    """

    @property
    def times(self) -> Sequence[float]:
        """Falling, as the model reads them; the model is evaluated at all but the last."""

    def step(self, x: Tensor, prediction: Tensor, index: int, noise: Callable[[], Tensor]) -> Tensor:
        """``x`` at ``times[index]``, with the model's prediction there, moved to ``times[index + 1]``.

        Args:
            x: (..., C) in fp32 or fp64; prediction: (..., outputs * C).
            noise: standard normal values like ``x``, other ones at each call.
        """


class EditStep(NamedTuple):
    """What a step does with tokens that are given, and may be edited from some noise on; bool each."""

    renoised: Tensor  # get fresh noise of this time before it
    noisy: Tensor  # are noisy to the model, as all others are (x_mask of Open-Sora 1.1 and 1.2)
    kept: Tensor  # are put back afterwards, as they were before it


@runtime_checkable
class EditingSolver(Protocol):
    """A solver that can keep given frames, or edit them."""

    def noised(self, x0: Tensor, noise: Tensor, index: int) -> Tensor:
        """``x0`` with the noise of ``times[index]``."""

    def edits(self, ratios: Tensor, index: int) -> EditStep:
        """What step ``index`` does with tokens of these edit ratios: 0 is kept, 1 is made anew."""


class SolverOptions(NamedTuple):
    """What a sampling job may say of the steps."""

    num_steps: int
    shift: bool = True  # spend more steps on high noise
    alpha: float | None = None  # by how much; None: as in training
    timestep_respacing: str | None = None  # which steps of a chain, in place of ``num_steps``; see noise_schedule.py
    eta: float = 0.0  # how much noise DDIM draws
    clip_denoised: bool = False  # clean latents to [-1, 1], in every step


def exact(x: Tensor) -> Tensor:
    """fp32, but for fp64."""
    return x if x.dtype == torch.float64 else x.float()


def first_outputs(prediction: Tensor, like: Tensor) -> Tensor:
    """The first C of (..., outputs * C) channels, for ``like`` (..., C): what a learned variance stands beside."""
    return prediction[..., : like.shape[-1]] if prediction.shape[-1] != like.shape[-1] else prediction
