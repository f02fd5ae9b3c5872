"""Euler steps down the times of a flow, whose prediction is a velocity."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from opensora.schedulers.base import SolverOptions, first_outputs
from opensora.schedulers.rectified_flow import RectifiedFlowConfig
from opensora.schedulers.timesteps import get_schedule
from opensora.utils.tokens import Grid


@dataclass(frozen=True)
class Euler:
    """x <- x + (t' - t) v"""

    times: Sequence[float]

    def step(self, x: Tensor, prediction: Tensor, index: int, noise: Callable[[], Tensor]) -> Tensor:
        """See ``Solver``; draws no noise."""
        return x + (self.times[index + 1] - self.times[index]) * first_outputs(prediction, x)


def euler(objective: RectifiedFlowConfig, options: SolverOptions, grid: Grid) -> Euler:
    """With the shift of times that the model was trained with, unless the job says another."""
    alpha = objective.flow_shift if options.alpha is None else options.alpha
    times = get_schedule(options.num_steps, grid.places, grid.latent_frames, alpha=alpha, shift=options.shift)
    return Euler(times)
