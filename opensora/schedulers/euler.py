"""Euler steps down the times of a flow, whose prediction is a velocity."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.schedulers.base import EditStep, Solver, SolverOptions, exact, first_outputs
from opensora.schedulers.rectified_flow import RectifiedFlowConfig
from opensora.schedulers.rectified_flow_v1 import RectifiedFlowV1Config, sampling_times
from opensora.schedulers.timesteps import get_schedule
from opensora.utils.tokens import Grid


@dataclass(frozen=True)
class Euler:
    """x <- x + (t' - t) v"""

    times: Sequence[float]

    def step(self, x: Tensor, prediction: Tensor, index: int, noise: Callable[[], Tensor]) -> Tensor:
        """See ``Solver``; draws no noise."""
        return x + (self.times[index + 1] - self.times[index]) * first_outputs(prediction, x)


@dataclass(frozen=True)
class EulerV1:
    """x <- x + (t - t')/n v, for velocities that point to the data; see ``Solver`` and ``EditingSolver``."""

    times: Sequence[float]  # n to 0
    pure_noise: float = 1000.0  # n

    def step(self, x: Tensor, prediction: Tensor, index: int, noise: Callable[[], Tensor]) -> Tensor:
        """See ``Solver``; draws no noise."""
        return x + first_outputs(prediction, x) * ((self.times[index] - self.times[index + 1]) / self.pure_noise)

    def noised(self, x0: Tensor, noise: Tensor, index: int) -> Tensor:
        """x0 with the noise of ``times[index]``."""
        share = self.times[index] / self.pure_noise
        return (1 - share) * exact(x0) + share * exact(noise)

    def edits(self, ratios: Tensor, index: int) -> EditStep:
        """A frame of ratio r is noised at the first time that is at most r n, and made with the others from there on;
        one of ratio 1 is noise already."""
        noisy = self._reached(ratios, index)
        before = self._reached(ratios, index - 1) if index else ratios == 1
        return EditStep(renoised=noisy & ~before, noisy=noisy, kept=~noisy)

    def _reached(self, ratios: Tensor, index: int) -> Tensor:
        # In fp32, as the ratio 0.3 and the time 300 are to meet.
        time = torch.tensor(self.times[index], dtype=torch.float32, device=ratios.device)
        return (ratios.float() * self.pure_noise >= time) | (ratios == 1)


def euler(objective: RectifiedFlowConfig | RectifiedFlowV1Config, options: SolverOptions, grid: Grid) -> Solver:
    """With the shift of times that the model was trained with, unless the job says another."""
    if isinstance(objective, RectifiedFlowV1Config):
        times = sampling_times(objective, options.num_steps, grid, shift=options.shift, alpha=options.alpha)
        return EulerV1(times, float(objective.num_timesteps))
    alpha = objective.flow_shift if options.alpha is None else options.alpha
    times = get_schedule(options.num_steps, grid.places, grid.latent_frames, alpha=alpha, shift=options.shift)
    return Euler(times)
