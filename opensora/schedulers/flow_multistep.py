"""DPM-Solver++ (arXiv:2211.01095) and UniPC (arXiv:2302.04867) for flows: both of second order, multistep.

    x_t = (1 - t) x0 + t noise, and the model predicts v = noise - x0, so that x0 = x_t - t v
    alpha = 1 - t, sigma = t, lambda = log(alpha / sigma), and h is what lambda grows by in a step

DPM-Solver++ is the step of dpm_solver.py. UniPC predicts, with D1 = (x0_before - x0) / r, r = -h_before / h,

    x' = sigma'/sigma x - alpha' (e^-h - 1) (x0 + D1 / 2)

and corrects that once the model has been evaluated there, from the same x, with D' = x0' - x0:

    x' = sigma'/sigma x - alpha' (e^-h - 1) (x0 + a D1 + b D'),  a + b = b_1,  r a + b = b_2
    b_1 = phi_2 / B,  b_2 = 2 phi_3 / B,  B = phi_1 = e^-h - 1,  phi_k+1 = phi_k / -h - 1/k!

The first step has no D1 (b is then 1/2), nor has the last, which ends at the clean latents that the model predicts.

Times are ``time_shift`` of equal distances from 0.999 to 0, as in the samplers that Wan is published with, where lambda
is finite. Schedulers of libraries have these steps too, from tables in fp32, and tell the model whole thousandths (the
tests compare); here the model is told the times as they are, and steps are exact in fp64.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from opensora.schedulers.base import SolverOptions, exact, first_outputs
from opensora.schedulers.dpm_solver import multistep
from opensora.schedulers.rectified_flow import RectifiedFlowConfig
from opensora.schedulers.timesteps import flow_shift, time_shift
from opensora.utils.tokens import Grid

START = 0.999  # before the shift: pure noise, by the published samplers


@dataclass(frozen=True)
class FlowMoment:
    """A time of the flow, as the model reads it."""

    time: float

    @property
    def alpha(self) -> float:
        return 1 - self.time

    @property
    def sigma(self) -> float:
        return self.time

    @property
    def log_snr(self) -> float:
        """lambda; infinite at the end."""
        return math.log(self.alpha) - math.log(self.sigma) if self.time else math.inf


class Past(NamedTuple):
    """A step that was made."""

    number: int
    x: Tensor  # where it started from
    x0: Tensor  # the clean latents that were predicted there


@dataclass
class FlowMultistep:
    """See ``Solver``; remembers the steps before, so that a clip needs its own."""

    moments: tuple[FlowMoment, ...]
    _past: tuple[Past, ...] = field(default=(), repr=False)  # the newest last, two at most

    @property
    def times(self) -> Sequence[float]:
        return [moment.time for moment in self.moments]

    def order(self, index: int) -> int:
        """Of a step: the first knows nothing of those before, the last ends at what is predicted."""
        return 1 if index in (0, len(self.moments) - 2) else 2

    def clean(self, x: Tensor, prediction: Tensor, index: int) -> Tensor:
        """x0 as the model predicts it."""
        assert index == 0 or (self._past and self._past[-1].number == index - 1), "steps follow one another"
        return x - self.moments[index].sigma * exact(first_outputs(prediction, x))

    def remember(self, index: int, x: Tensor, x0: Tensor) -> None:
        """For the steps to come."""
        self._past = (*self._past[-1:], Past(index, x, x0))


@dataclass
class FlowDPMSolver(FlowMultistep):
    """DPM-Solver++, 2M."""

    def step(self, x: Tensor, prediction: Tensor, index: int, noise: Callable[[], Tensor]) -> Tensor:
        """See ``Solver``; draws no noise."""
        x = exact(x)
        x0, before = self.clean(x, prediction, index), None
        if self.order(index) == 2:
            before = self.moments[index - 1], self._past[-1].x0
        self.remember(index, x, x0)
        return multistep(x, x0, self.moments[index], self.moments[index + 1], before)


@dataclass
class UniPC(FlowMultistep):
    """Predictor and corrector; one evaluation of the model in every step serves both."""

    def step(self, x: Tensor, prediction: Tensor, index: int, noise: Callable[[], Tensor]) -> Tensor:
        """See ``Solver``; draws no noise."""
        x = exact(x)
        x0 = self.clean(x, prediction, index)
        if index:
            x = self._corrected(x0, index)
        before = self._past[-1].x0 if self.order(index) == 2 else None
        self.remember(index, x, x0)
        return self._moved(x, x0, index, 0.0 if before is None else (before - x0) / (2 * self._ratio(index)))

    def _corrected(self, arrived: Tensor, index: int) -> Tensor:
        """What ``index`` starts from, made again with the clean latents that were predicted there."""
        last, difference = self._past[-1], arrived - self._past[-1].x0
        if self.order(index - 1) == 1:
            return self._moved(last.x, last.x0, index - 1, 0.5 * difference)
        of_before, of_arrived = self._weights(index - 1)
        slope = (self._past[-2].x0 - last.x0) / self._ratio(index - 1)
        return self._moved(last.x, last.x0, index - 1, of_before * slope + of_arrived * difference)

    def _moved(self, x: Tensor, x0: Tensor, index: int, change: Tensor | float) -> Tensor:
        now, then = self.moments[index], self.moments[index + 1]
        return then.sigma / now.sigma * x - then.alpha * math.expm1(-self._h(index)) * (x0 + change)

    def _h(self, index: int) -> float:
        return self.moments[index + 1].log_snr - self.moments[index].log_snr

    def _ratio(self, index: int) -> float:
        """r of a step."""
        return -self._h(index - 1) / self._h(index)

    def _weights(self, index: int) -> tuple[float, float]:
        """a and b of a step of second order."""
        h, r = self._h(index), self._ratio(index)
        phi_1 = math.expm1(-h)
        phi_2 = phi_1 / -h - 1
        b_1, b_2 = phi_2 / phi_1, 2 * (phi_2 / -h - 0.5) / phi_1
        a = (b_1 - b_2) / (1 - r)
        return a, b_1 - a


def flow_moments(objective: RectifiedFlowConfig, options: SolverOptions, grid: Grid) -> tuple[FlowMoment, ...]:
    """From noise to data, with the shift that the model was trained with, unless the job says another."""
    times = torch.linspace(START, 0, options.num_steps + 1, dtype=torch.float64)
    alpha = objective.flow_shift if options.alpha is None else options.alpha
    if alpha is None:
        alpha = flow_shift(grid.places, grid.latent_frames)
    return tuple(map(FlowMoment, (time_shift(alpha, times) if options.shift else times).tolist()))


def flow_dpm_solver(objective: RectifiedFlowConfig, options: SolverOptions, grid: Grid) -> FlowDPMSolver:
    """Of a model of a rectified flow."""
    return FlowDPMSolver(flow_moments(objective, options, grid))


def unipc(objective: RectifiedFlowConfig, options: SolverOptions, grid: Grid) -> UniPC:
    """Of a model of a rectified flow."""
    return UniPC(flow_moments(objective, options, grid))
