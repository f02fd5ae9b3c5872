"""The Markov chain of a diffusion model: how much noise each of its steps adds, and which steps are used.

    beta_t             variance that step t adds
    abar_t             product of 1 - beta up to t: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise
    q(x_{t-1} | x_t, x0)  normal, with the mean c1 x0 + c2 x_t and the posterior variance (DDPM, arXiv:2006.11239)

A chain that uses some of its steps alone is a shorter chain with betas of its own (arXiv:2102.09672); the model is told
the numbers that its steps have in the whole one.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from opensora.utils.respacing import spaced_steps

BetaSchedule = Literal["linear", "squaredcos_cap_v2"]
BETA_SCHEDULES: tuple[BetaSchedule, ...] = ("linear", "squaredcos_cap_v2")
Tables = Literal["fp64", "fp32"]
MAX_BETA = 0.999  # of squaredcos_cap_v2


def betas_of(schedule: BetaSchedule, steps: int) -> np.ndarray:
    """(steps,) fp64.

    linear: 1e-4 to 0.02 for 1000 steps, both ends in inverse proportion to other numbers; squaredcos_cap_v2: from
    abar = cos((t + 0.008) / 1.008 pi / 2)^2.
    """
    if schedule == "linear":
        return np.linspace(1000 / steps * 1e-4, 1000 / steps * 0.02, steps)
    left = [math.cos((step / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(steps + 1)]
    return np.array([min(1 - left[step + 1] / left[step], MAX_BETA) for step in range(steps)])


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A chain, of which some steps are used; tables by their numbers among these, 0 with the least noise."""

    timesteps: Tensor  # (n,) int64, numbers of the steps in the whole chain
    index_of: Tensor  # (steps of the whole chain,) int64: the last step used up to each, 0 before the first
    betas: Tensor  # (n,), and so all that follow
    alphas_cumprod: Tensor  # abar
    alphas_cumprod_prev: Tensor  # of the step before; 1 at the first
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor  # of 1 / abar
    sqrt_recipm1_alphas_cumprod: Tensor  # of 1 / abar - 1
    log_betas: Tensor
    fixed_large_log_variance: Tensor  # of betas, but for the first, which is the posterior one
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor  # the first, which is log 0, is that of the second
    posterior_mean_coef1: Tensor  # of x0
    posterior_mean_coef2: Tensor  # of x_t
    _placed: dict[torch.device, "NoiseSchedule"] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.timesteps)

    def on(self, device: torch.device) -> "NoiseSchedule":
        """The same with its tables on a device; moved once."""
        if self.timesteps.device == device:
            return self
        if device not in self._placed:
            tables: Any = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
            self._placed[device] = NoiseSchedule(**tables)
        return self._placed[device]

    def index(self, t: Tensor) -> Tensor:
        """Times as the model reads them -> numbers of steps, int64; a time between two steps is of the lower."""
        return self.on(t.device).index_of[t.long().clamp(0, len(self.index_of) - 1)]

    def at(self, name: str, index: Tensor | int, like: Tensor) -> Tensor:
        """Values of a table, in the precision and on the device of ``like``, with dims to broadcast over it."""
        table: Tensor = getattr(self.on(like.device), name)
        value = table[index].to(like.dtype)
        return value.reshape(*value.shape, *[1] * (like.ndim - value.ndim)) if value.ndim else value

    def noised(self, x0: Tensor, noise: Tensor, index: Tensor | int) -> Tensor:
        """q(x_t | x0)."""
        kept, added = (self.at(f"sqrt_{name}alphas_cumprod", index, x0) for name in ("", "one_minus_"))
        return kept * x0 + added * noise


@lru_cache(maxsize=32)
def noise_schedule(beta_schedule: BetaSchedule, steps: int, respacing: str, tables: Tables) -> NoiseSchedule:
    """The steps of a chain that ``respacing`` chooses.

    Args:
        tables: fp64 throughout, or fp32 from the betas of the chosen steps on.

    Raises:
        ValueError: see ``spaced_steps``.
    """
    chosen = np.array(spaced_steps(respacing, steps))
    whole = np.cumprod(1 - betas_of(beta_schedule, steps))[chosen]
    betas = 1 - whole / np.concatenate((np.ones(1), whole[:-1]))
    # NumPy and torch round roots and logarithms differently: each as in the release that computes so.
    computed = _tables(np, betas) if tables == "fp64" else _tables(torch, torch.from_numpy(betas).float())
    tensors: Any = {name: torch.as_tensor(table) for name, table in computed.items()}
    return NoiseSchedule(
        timesteps=torch.from_numpy(chosen),
        index_of=torch.from_numpy(np.searchsorted(chosen, np.arange(steps), side="right") - 1).clamp(min=0),
        **tensors,
    )


def _tables(xp: Any, betas: Any) -> dict[str, Any]:
    """Of these betas, by ``xp``: numpy or torch."""
    abar = xp.cumprod(1 - betas, 0)
    before = xp.concatenate((xp.ones_like(abar[:1]), abar[:-1]))
    variance = betas * (1 - before) / (1 - abar)
    clipped = xp.concatenate((variance[1:2], variance[1:])) if len(betas) > 1 else betas
    return {
        "betas": betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": xp.sqrt(abar),
        "sqrt_one_minus_alphas_cumprod": xp.sqrt(1 - abar),
        "sqrt_recip_alphas_cumprod": xp.sqrt(1 / abar),
        "sqrt_recipm1_alphas_cumprod": xp.sqrt(1 / abar - 1),
        "log_betas": xp.log(betas),
        "fixed_large_log_variance": xp.log(xp.concatenate((clipped[:1], betas[1:]))),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": xp.log(clipped),
        "posterior_mean_coef1": betas * xp.sqrt(before) / (1 - abar),
        "posterior_mean_coef2": (1 - before) * xp.sqrt(1 - betas) / (1 - abar),
    }
