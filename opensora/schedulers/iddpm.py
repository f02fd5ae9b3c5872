"""IDDPM (arXiv:2102.09672): noise, or clean latents, and the variance of every step, as in Open-Sora 1.0 and 1.1.

    x_t  = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise
    loss = (e - noise)^2 + bound(mean without gradient, learned variance)      of every value; the bound in bits

Times are the numbers of steps, as the model reads them. Latents that are known stand in x_t with the noise of the first
step, which is not quite none: abar_0 is 0.9999.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from opensora.schedulers.base import Noised, exact
from opensora.schedulers.gaussian_diffusion import Prediction, predicted, variational_bound
from opensora.schedulers.noise_schedule import (
    BETA_SCHEDULES,
    BetaSchedule,
    NoiseSchedule,
    Tables,
    noise_schedule,
)
from opensora.utils.limits import Limits
from opensora.utils.respacing import DIFFUSION_STEPS, spaced_steps
from opensora.utils.rng import numpy_generator
from opensora.utils.tokens import Grid


@dataclass(frozen=True, kw_only=True)
class IDDPMConfig:
    """The objective."""

    kind: Literal["iddpm"] = "iddpm"
    diffusion_steps: int = DIFFUSION_STEPS  # of the whole chain
    noise_schedule: BetaSchedule = "linear"  # betas: linear, or squaredcos_cap_v2
    timestep_respacing: str = ""  # steps that are trained: "" all, "100", "10,20,30" of equal sections, "ddim50"
    learn_sigma: bool = True  # the model's second output is the variance; false: it is not trained
    sigma_small: bool = False  # without learn_sigma: the posterior variance, not beta
    predict_xstart: bool = False  # the first output is the clean latents, not the noise
    use_kl: bool = False  # the loss is the variational bound alone, times the number of steps
    rescale_learned_sigmas: bool = False  # the bound counts 1/1000 for each step
    speed: bool = False  # times and weights of SpeeD (arXiv:2405.17403, iddpm-speed)
    tables: Tables = "fp64"  # of the chain; fp32: rounded as in Open-Sora 1.1 and later

    LIMITS: ClassVar[Limits] = {"diffusion_steps": (100_000, "more change nothing that fp32 could show")}

    def __post_init__(self) -> None:
        if self.diffusion_steps < 21:  # the linear schedule ends at beta = 20 / steps
            raise ValueError(f"diffusion_steps={self.diffusion_steps}: must be an integer >= 21")
        if self.noise_schedule not in BETA_SCHEDULES:
            raise ValueError(f"noise_schedule={self.noise_schedule}: must be one of {', '.join(BETA_SCHEDULES)}")
        if self.tables not in ("fp64", "fp32"):
            raise ValueError(f"tables={self.tables}: must be fp64 or fp32")
        try:
            spaced_steps(self.timestep_respacing, self.diffusion_steps)
        except ValueError as error:
            raise ValueError(f"timestep_respacing={self.timestep_respacing!r:.60}: {error}") from None
        if self.use_kl and not self.learn_sigma:
            raise ValueError("use_kl=true: needs learn_sigma=true")
        if self.use_kl and self.rescale_learned_sigmas:
            raise ValueError("rescale_learned_sigmas=true: must be false with use_kl, which scales the bound itself")
        if self.speed and self.use_kl:
            raise ValueError("speed=true: weighs squared differences, of which use_kl has none; set one of them")

    def schedule(self, respacing: str | None = None) -> NoiseSchedule:
        """The chain, of which ``respacing`` chooses steps; None: those that are trained."""
        chosen = self.timestep_respacing if respacing is None else respacing
        return noise_schedule(self.noise_schedule, self.diffusion_steps, chosen, self.tables)

    @property
    def meaning(self) -> dict[str, Any]:
        """What a prediction is, as ``gaussian_diffusion.predicted`` wants it."""
        return {name: getattr(self, name) for name in ("predict_xstart", "learn_sigma", "sigma_small")}


@dataclass(frozen=True)
class IDDPM:
    """See ``Objective``."""

    cfg: IDDPMConfig
    solvers: ClassVar[tuple[str, ...]] = ("ddpm", "ddim", "dpm_solver")
    whole_times: ClassVar[bool] = True

    @property
    def outputs(self) -> int:
        """Two with a learned variance."""
        return 2 if self.cfg.learn_sigma else 1

    @property
    def latest_time(self) -> float:
        """Times are below."""
        return float(self.cfg.diffusion_steps)

    def times(self, seed: int, step: int, sample_ids: tuple[int, ...], grid: Grid) -> Tensor:
        """Of steps that are trained, all alike, or as SpeeD weighs them."""
        schedule = self.cfg.schedule()
        drawn = [self._draw(schedule, numpy_generator(seed, step, sample, "timestep")) for sample in sample_ids]
        return schedule.timesteps[torch.tensor(drawn, dtype=torch.int64)].float()

    def _draw(self, schedule: NoiseSchedule, rng: np.random.Generator) -> int:
        if not self.cfg.speed:
            return int(rng.integers(len(schedule)))
        speed = speed_tables(self.cfg)
        index = min(int(np.searchsorted(speed.cumulative, rng.random(), side="right")), len(schedule) - 1)
        return int(speed.mirror[index]) if rng.random() < 0.5 else index

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor, known: Tensor | None = None) -> Noised:
        """x_t; the targets are what the loss is computed from."""
        x0, noise, schedule = exact(x0), exact(noise), self.cfg.schedule()
        x = schedule.noised(x0, noise, schedule.index(t))
        if known is not None:
            x = torch.where(known[:, None], schedule.noised(x0, noise, 0), x)
        return Noised(x, {"x_start": x0, "noise": noise, "x_t": x})

    def loss(self, prediction: Tensor, targets: Mapping[str, Tensor], t: Tensor) -> Tensor:
        """Squared differences and the variational bound, of every value."""
        return self.terms(prediction, targets, t)["loss"]

    def terms(self, prediction: Tensor, targets: Mapping[str, Tensor], t: Tensor) -> dict[str, Tensor]:
        """loss, and what it is the sum of where there is more than one: mse and vb, (..., C) each."""
        cfg, schedule = self.cfg, self.cfg.schedule()
        prediction = exact(prediction)
        dtype = torch.promote_types(prediction.dtype, targets["x_t"].dtype)
        x_start, noise, x_t = (targets[name].to(dtype) for name in ("x_start", "noise", "x_t"))
        index = schedule.index(t)
        if cfg.use_kl:
            return {"loss": self._bound(schedule, prediction, x_start, x_t, index) * len(schedule)}
        wanted = x_start if cfg.predict_xstart else noise
        squared = (prediction[..., : wanted.shape[-1]] - wanted).square()
        if cfg.speed:
            squared = squared * torch.as_tensor(speed_tables(cfg).weights).to(squared)[index]
        if not cfg.learn_sigma:
            return {"loss": squared, "mse": squared}
        frozen = torch.cat((prediction[..., : wanted.shape[-1]].detach(), prediction[..., wanted.shape[-1] :]), dim=-1)
        bound = self._bound(schedule, frozen, x_start, x_t, index)
        if cfg.rescale_learned_sigmas:
            bound = bound * (len(schedule) / 1000)
        return {"loss": squared + bound, "mse": squared, "vb": bound}

    def _bound(
        self, schedule: NoiseSchedule, prediction: Tensor, x_start: Tensor, x_t: Tensor, index: Tensor
    ) -> Tensor:
        found: Prediction = predicted(schedule, x_t, prediction, index, **self.cfg.meaning)
        return variational_bound(schedule, x_start, x_t, found, index)


@dataclass(frozen=True)
class SpeedTables:
    """SpeeD, by step: where the noise grows fast is drawn more often, each time with its mirror image."""

    probabilities: np.ndarray  # add up to 1
    cumulative: np.ndarray
    mirror: np.ndarray  # int64, the step at the same distance on the other side of ``meaningful`` steps
    meaningful: int  # steps in which the noise still grows: 700 of the linear chain of 1000
    weights: np.ndarray  # of squared differences: 1 - abar, which is 1 / (1 + signal to noise)


@lru_cache(maxsize=8)
def speed_tables(cfg: IDDPMConfig) -> SpeedTables:
    """Of the steps that ``cfg`` trains."""
    schedule = replace(cfg, speed=False).schedule()
    left = 1 - schedule.alphas_cumprod
    growth = torch.gradient(left.sqrt())[0]
    chances = torch.tanh(1e6 * (growth - 1e-4)) + 1.5
    probabilities = (chances / chances.sum()).numpy()
    falls = np.flatnonzero(growth.numpy() < 5e-5)
    meaningful = int(falls[0]) + 1 if len(falls) else len(schedule)
    mirror = np.abs(meaningful - np.arange(len(schedule))).clip(max=len(schedule) - 1)
    weights = 1 / (1 + (1 / left - 1))
    cumulative = np.cumsum(probabilities, dtype=np.float64)
    return SpeedTables(probabilities, cumulative, mirror, meaningful, weights.numpy())
