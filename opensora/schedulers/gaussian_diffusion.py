"""What a diffusion model's prediction says of the step before, and how far that is from the truth.

Of x_t at a step, with the tables of noise_schedule.py:

    x0      = (x_t - sqrt(1 - abar) e) / sqrt(abar)              e: the predicted noise
    mean    = c1 x0 + c2 x_t                                     of x_{t-1}
    log var = f log beta + (1 - f) log posterior, f = (v + 1)/2  v: the model's second output (arXiv:2102.09672)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from opensora.schedulers.base import exact
from opensora.schedulers.noise_schedule import NoiseSchedule

BIN = 1 / 255  # half the width of a value of 8 bits, where all are from -1 to 1
INSIDE = 0.999  # values beyond lie in the first or the last bin
LEAST = 1e-12  # of a probability, before its logarithm


class Prediction(NamedTuple):
    """Of a model at a step; values like x_t."""

    noise: Tensor
    x_start: Tensor
    mean: Tensor  # of the step before, given x_t
    log_variance: Tensor


def predicted(
    schedule: NoiseSchedule,
    x_t: Tensor,
    output: Tensor,
    index: Tensor | int,
    *,
    predict_xstart: bool,
    learn_sigma: bool,
    sigma_small: bool,
    clip: bool = False,
) -> Prediction:
    """What the ``output`` of a model at ``x_t`` (..., C) says.

    Args:
        output: (..., C), or (..., 2 C) with ``learn_sigma``; with fewer demands, what is beyond is not read.
        index: of the step, broadcast from the left.
        predict_xstart: the output is x0, not the noise.
        sigma_small: without ``learn_sigma``: the variance is the posterior one, not beta.
        clip: x0 to [-1, 1].
    """
    x_t, output = exact(x_t), exact(output)
    channels = x_t.shape[-1]
    first = output[..., :channels]
    recip, recipm1 = (schedule.at(f"sqrt_{name}_alphas_cumprod", index, x_t) for name in ("recip", "recipm1"))
    x_start = first if predict_xstart else recip * x_t - recipm1 * first
    if clip:
        x_start = x_start.clamp(-1, 1)
    noise = (recip * x_t - x_start) / recipm1 if predict_xstart or clip else first
    if learn_sigma:
        log_variance = learned_log_variance(schedule, output[..., channels : 2 * channels], index)
    else:
        log_variance = fixed_log_variance(schedule, index, x_t, small=sigma_small)
    return Prediction(noise, x_start, posterior_mean(schedule, x_start, x_t, index), log_variance)


def posterior_mean(schedule: NoiseSchedule, x_start: Tensor, x_t: Tensor, index: Tensor | int) -> Tensor:
    """Of q(x_{t-1} | x_t, x0)."""
    of_start, of_t = (schedule.at(f"posterior_mean_coef{number}", index, x_t) for number in (1, 2))
    return of_start * x_start + of_t * x_t


def learned_log_variance(schedule: NoiseSchedule, v: Tensor, index: Tensor | int) -> Tensor:
    """Between the posterior variance, at v = -1, and beta, at 1."""
    share = (v + 1) / 2
    least, most = (schedule.at(name, index, v) for name in ("posterior_log_variance_clipped", "log_betas"))
    return share * most + (1 - share) * least


def fixed_log_variance(schedule: NoiseSchedule, index: Tensor | int, like: Tensor, *, small: bool) -> Tensor:
    """Of the posterior, or of beta."""
    name = "posterior_log_variance_clipped" if small else "fixed_large_log_variance"
    return schedule.at(name, index, like).expand_as(like)


def variational_bound(schedule: NoiseSchedule, x_start: Tensor, x_t: Tensor, found: Prediction, t: Tensor) -> Tensor:
    """A term of the variational bound for every value, in bits: KL(q(x_{t-1} | x_t, x0), found), and at the first step
    the negative log likelihood of x0.

    Args:
        t: indices of steps, with dims to broadcast over the values.
    """
    mean = posterior_mean(schedule, x_start, x_t, t)
    log_variance = schedule.at("posterior_log_variance_clipped", t, x_t)
    terms = torch.where(
        t == 0,
        -discretized_log_likelihood(x_start, found.mean, 0.5 * found.log_variance),
        normal_kl(mean, log_variance, found.mean, found.log_variance),
    )
    return terms / math.log(2)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, var1), N(mean2, var2)) of every value, in nats."""
    spread = (log_variance1 - log_variance2).exp()
    return 0.5 * (-1 + log_variance2 - log_variance1 + spread + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P of the bin of width 2/255 around each x under N(mean, exp(log_scale)^2); the outer bins are open."""
    inverse = (-log_scale).exp()
    upper, lower = (_normal_cdf(inverse * (x - mean + side)) for side in (BIN, -BIN))
    first, last = upper.clamp(min=LEAST).log(), (1 - lower).clamp(min=LEAST).log()
    inside = (upper - lower).clamp(min=LEAST).log()
    return torch.where(x < -INSIDE, first, torch.where(x > INSIDE, last, inside))


def _normal_cdf(x: Tensor) -> Tensor:
    """By the formula that GELU is approximated with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
