"""Losses that autoencoders are trained by, as in Open-Sora 2, after VQGAN (Esser et al., arXiv 2012.09841).

e    = |x - y| + w_p LPIPS(x, y)                    of every value, LPIPS being one number per frame
nll  = sum of (e / exp(s) + s) / frames             a sum over pixels, a mean over frames; s = 0 but where it is given
kl   = w_kl mean of KL over clips, or over frames where every frame has a posterior of its own
g    = -mean D(y)
w    = w_d clamp(|d nll / d last| / (|d g / d last| + 1e-4), 0, 1e4)      last: the decoder's last weight
loss = nll + kl + w g                               of the autoencoder
d    = (mean relu(1 - D(x)) + mean relu(1 + D(y))) / 2                    hinge (Lim and Ye, arXiv 1705.02894)
     = (mean softplus(-D(x)) + mean softplus(D(y))) / 2                   vanilla (arXiv 1406.2661)
     = (mean D(y) - mean D(x)) / 2                                        wgan-gp (arXiv 1701.07875), no penalty

and of Open-Sora 1.2 and 1.3 beside these
g    = mean softplus(-D(y))                                              non-saturating (arXiv 1406.2661); d as vanilla
d   += w_l (relu(mean D(x) - f)^2 + relu(r - mean D(y))^2)               LeCam (arXiv 2104.03310); r, f: moving averages
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.models.vae.posterior import Posterior

GanLoss = Literal["hinge", "vanilla", "wgan-gp", "non-saturating"]
MOST_ADAPTIVE = 1e4  # of a ratio of gradients, for one that vanishes
EPSILON = 1e-4


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Scalars: the first is trained, the others are told."""

    nll: Tensor
    recon: Tensor  # sum over pixels of |x - y|, mean over frames
    perceptual: Tensor  # mean LPIPS times the values of a frame, without its weight


def reconstruction_loss(
    pixels: Tensor, made: Tensor, distances: Tensor, *, perceptual_weight: float, log_variance: float = 0.0
) -> Reconstruction:
    """How far reconstructions are from their clips.

    Args:
        pixels: (B, 3, T, H, W) in [-1, 1]; made: the reconstruction of the same shape.
        distances: (B * T,) LPIPS of every frame.
        log_variance: s of the formula.
    """
    frames = pixels.shape[0] * pixels.shape[2]
    values = pixels.numel() // frames
    recon = (pixels - made).abs().sum() / frames
    perceptual = distances.mean() * values
    nll = (recon + perceptual_weight * perceptual) / math.exp(log_variance) + log_variance * values
    return Reconstruction(nll=nll, recon=recon, perceptual=perceptual)


def kl_loss(posterior: Posterior | None, weight: float) -> Tensor:
    """Weighted KL divergence from the standard normal; 0 of an autoencoder without a posterior."""
    return torch.zeros(()) if posterior is None else weight * posterior.kl().mean()


def generator_loss(fake: Tensor, kind: GanLoss = "hinge") -> Tensor:
    """g, of the logits of reconstructions."""
    return F.softplus(-fake).mean() if kind == "non-saturating" else -fake.mean()


def adaptive_weight(nll: Tensor, g: Tensor, last: Tensor, weight: float) -> Tensor:
    """w, which makes the gradients of both at the decoder's last layer ``weight`` to 1; it has no gradient itself."""
    by_nll, by_g = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll, g))
    return (weight * (by_nll / (by_g + EPSILON)).clamp(0.0, MOST_ADAPTIVE)).detach()


def discriminator_loss(kind: GanLoss, real: Tensor, fake: Tensor) -> Tensor:
    """d, of the logits of clips and of their reconstructions, which are to be detached from the autoencoder.

    Raises:
        ValueError: there is no such kind.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    if kind in ("vanilla", "non-saturating"):
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    if kind == "wgan-gp":
        return 0.5 * (fake.mean() - real.mean())
    raise ValueError(f"kind={kind}: must be one of {', '.join(get_args(GanLoss))}")


def lecam_penalty(real: Tensor, fake: Tensor, averages: tuple[float, float], weight: float) -> Tensor:
    """What LeCam adds to d, of logits; ``averages``: of the means of both before (``lecam_averages``)."""
    of_real, of_fake = averages
    return weight * (F.relu(real.mean() - of_fake).square() + F.relu(of_real - fake.mean()).square())


def lecam_averages(
    before: tuple[float, float], means: tuple[float, float], decay: float = 0.999
) -> tuple[float, float]:
    """Moving averages of the means of logits, of real clips and of reconstructions, after one more update."""
    real, fake = (decay * old + (1 - decay) * new for old, new in zip(before, means, strict=True))
    return real, fake


def weight_from(weight: float, step: int, start: int) -> float:
    """``weight`` from update ``start`` on, 0 before: when a discriminator joins."""
    return weight if step >= start else 0.0


def image_probability(ratio: float, devices: int) -> float:
    """With which probability a device other than the first trains on the first frame alone of its clip, so that the
    share of images is ``ratio``; the first device always has a video. Alone it keeps to ``ratio`` itself."""
    return ratio if devices == 1 else ratio * devices / (devices - 1)
