"""DPM-Solver++ (arXiv:2211.01095), second order, multistep: a probability flow in few steps.

Time is continuous: t in [1/n, 1] of a chain of n steps, whose step k is at (k + 1)/n, with log alpha linear in between;
the model is told n t - 1. With lambda = log(alpha / sigma) and h its growth in a step,

    x' = sigma'/sigma x - alpha' (e^-h - 1) D
    D  = x0                                      the first step; the last one too, where there are fewer than 10
    D  = x0 + (h / 2 h_before) (x0 - x0_before)  all others

Times are equally far apart. Libraries know steps at whole numbers of the chain alone, so this is ours.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from opensora.schedulers.base import SolverOptions, exact, first_outputs
from opensora.schedulers.iddpm import IDDPMConfig
from opensora.schedulers.noise_schedule import betas_of
from opensora.utils.tokens import Grid

FEW = 10  # steps, below which the last is of first order


@dataclass(frozen=True)
class Moment:
    """A time of the flow: x = alpha x0 + sigma noise."""

    time: float  # as the model reads it
    log_alpha: float

    @property
    def alpha(self) -> float:
        return math.exp(self.log_alpha)

    @property
    def sigma(self) -> float:
        return math.sqrt(-math.expm1(2 * self.log_alpha))

    @property
    def log_snr(self) -> float:
        """lambda, half the logarithm of the signal to noise ratio."""
        return self.log_alpha - math.log(self.sigma)


class OnPath(Protocol):
    """A time of any path x = alpha x0 + sigma noise."""

    @property
    def alpha(self) -> float: ...

    @property
    def sigma(self) -> float: ...

    @property
    def log_snr(self) -> float: ...


def multistep(x: Tensor, x0: Tensor, now: OnPath, then: OnPath, before: tuple[OnPath, Tensor] | None) -> Tensor:
    """``x`` moved from ``now`` to ``then``.

    Args:
        x0: the clean latents that are predicted now.
        before: the step before, and those that were predicted there; None: a step of first order.
    """
    h, slope = then.log_snr - now.log_snr, x0
    if before is not None:
        earlier, x0_before = before
        slope = x0 + h / (2 * (now.log_snr - earlier.log_snr)) * (x0 - x0_before)
    return then.sigma / now.sigma * x - then.alpha * math.expm1(-h) * slope


@dataclass
class DPMSolver:
    """See ``Solver``; remembers the clean latents of the step before, so that a clip needs its own."""

    moments: tuple[Moment, ...]
    predict_xstart: bool = False
    pure_noise: float = 999.0
    _before: tuple[int, Tensor] | None = field(default=None, repr=False)  # step, and its clean latents

    @property
    def times(self) -> Sequence[float]:
        """As the model reads them, not whole numbers."""
        return [moment.time for moment in self.moments]

    def step(self, x: Tensor, prediction: Tensor, index: int, noise: Callable[[], Tensor]) -> Tensor:
        """See ``Solver``; draws no noise."""
        x, first = exact(x), exact(first_outputs(prediction, x))
        now, then = self.moments[index], self.moments[index + 1]
        x0 = first if self.predict_xstart else (x - now.sigma * first) / now.alpha
        before = None
        if not self._is_first_order(index):
            assert self._before is not None and self._before[0] == index - 1, "steps follow one another"
            before = self.moments[index - 1], self._before[1]
        self._before = index, x0
        return multistep(x, x0, now, then, before)

    def _is_first_order(self, index: int) -> bool:
        steps = len(self.moments) - 1
        return index == 0 or (steps < FEW and index == steps - 1)


def dpm_solver(objective: IDDPMConfig, options: SolverOptions, grid: Grid) -> DPMSolver:
    """Over the whole chain, whichever of its steps were trained."""
    chain = objective.diffusion_steps
    log_alphas = 0.5 * np.cumsum(np.log(1 - betas_of(objective.noise_schedule, chain)))
    times = np.linspace(1, 1 / chain, options.num_steps + 1)
    places = np.arange(1, chain + 1) / chain
    moments = tuple(Moment(chain * t - 1, float(np.interp(t, places, log_alphas))) for t in times.tolist())
    return DPMSolver(moments, objective.predict_xstart, float(chain - 1))
