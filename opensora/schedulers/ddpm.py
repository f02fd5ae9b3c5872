"""Steps down the chain of a diffusion model: DDPM, which draws every step anew, and DDIM, which draws less or nothing.

    DDPM (arXiv:2006.11239): x_{t-1} = mean + sigma noise, with the variance that the model has learned, or a fixed one
    DDIM (arXiv:2010.02502): x_{t-1} = sqrt(abar') x0 + sqrt(1 - abar' - sigma^2) e + sigma noise,
                             sigma = eta sqrt((1 - abar') / (1 - abar)) sqrt(1 - abar / abar')

Steps are those of the whole chain that the job chooses. Libraries have these steps too, for chains of 1000 in fp32 (the
tests compare); here they share their tables with the objective, take any choice of steps, and are exact in fp64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from opensora.schedulers.base import EditStep, SolverOptions, exact
from opensora.schedulers.gaussian_diffusion import Prediction, predicted
from opensora.schedulers.iddpm import IDDPMConfig
from opensora.schedulers.noise_schedule import NoiseSchedule
from opensora.utils.tokens import Grid

CLEAN = -1.0  # the time after the last step


@dataclass(frozen=True)
class Chain:
    """What the two have in common; see ``Solver`` and ``EditingSolver``."""

    cfg: IDDPMConfig
    schedule: NoiseSchedule
    clip_denoised: bool = False  # x0 to [-1, 1]

    @property
    def pure_noise(self) -> float:
        """Of the whole chain."""
        return float(self.cfg.diffusion_steps)

    @property
    def times(self) -> Sequence[float]:
        """Numbers of the steps in the whole chain."""
        return [*map(float, reversed(self.schedule.timesteps.tolist())), CLEAN]

    def level(self, index: int) -> int:
        """The number of a step among those that are used, from the number of the turn."""
        return len(self.schedule) - 1 - index

    def predicted(self, x: Tensor, prediction: Tensor, index: int) -> Prediction:
        """What the prediction at ``times[index]`` says."""
        level = self.level(index)
        return predicted(self.schedule, x, prediction, level, clip=self.clip_denoised, **self.cfg.meaning)

    def noised(self, x0: Tensor, noise: Tensor, index: int) -> Tensor:
        """x0 with the noise of ``times[index]``."""
        return self.schedule.noised(exact(x0), exact(noise), self.level(index))

    def edits(self, ratios: Tensor, index: int) -> EditStep:
        """A frame of ratio r is noised at step int(r steps), counted from the clean end, and made with the others from
        the next one on."""
        first, level = (ratios.float() * len(self.schedule)).int(), self.level(index)
        return EditStep(renoised=first == level, noisy=first > level, kept=first < level)


@dataclass(frozen=True)
class DDPM(Chain):
    """Ancestral sampling."""

    def step(self, x: Tensor, prediction: Tensor, index: int, noise: Callable[[], Tensor]) -> Tensor:
        """See ``Solver``; the last step draws nothing."""
        found = self.predicted(x, prediction, index)
        if self.level(index) == 0:
            return found.mean
        return found.mean + (0.5 * found.log_variance).exp() * exact(noise())


@dataclass(frozen=True)
class DDIM(Chain):
    """Deterministic at eta = 0."""

    eta: float = 0.0

    def step(self, x: Tensor, prediction: Tensor, index: int, noise: Callable[[], Tensor]) -> Tensor:
        """See ``Solver``; draws where eta > 0, but for the last step."""
        found, level = self.predicted(x, prediction, index), self.level(index)
        now, before = (
            self.schedule.at(name, level, found.x_start) for name in ("alphas_cumprod", "alphas_cumprod_prev")
        )
        sigma = self.eta * ((1 - before) / (1 - now)).sqrt() * (1 - now / before).sqrt()
        x = found.x_start * before.sqrt() + (1 - before - sigma**2).sqrt() * found.noise
        return x + sigma * exact(noise()) if level and self.eta else x


def chain_of(objective: IDDPMConfig, options: SolverOptions) -> NoiseSchedule:
    """The steps that a job takes: as many as it says, from the last to the first of the chain, or those it chooses."""
    chosen = options.timestep_respacing
    if chosen is None:
        chosen = str(min(options.num_steps, objective.diffusion_steps))
    return objective.schedule(chosen)


def ddpm(objective: IDDPMConfig, options: SolverOptions, grid: Grid) -> DDPM:
    """With the variance that the model has learned."""
    return DDPM(objective, chain_of(objective, options), options.clip_denoised)


def ddim(objective: IDDPMConfig, options: SolverOptions, grid: Grid) -> DDIM:
    """With the noise that the job wants."""
    return DDIM(objective, chain_of(objective, options), options.clip_denoised, options.eta)
