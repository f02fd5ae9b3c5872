"""The normal distribution that an autoencoder gives for a clip: its mode, samples of it, and its KL divergence."""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """Independent normals, one for each latent; not scaled as latents are."""

    mean: Tensor  # (B, C, T', H', W')
    logvar: Tensor  # the same shape, within LOGVAR_RANGE
    per_frame: bool = False  # every frame was coded as an image
    deterministic: bool = False  # no deviation: all of a distribution is in its mean

    @classmethod
    def of(cls, moments: Tensor, *, per_frame: bool = False, deterministic: bool = False) -> "Posterior":
        """(B, 2C, T', H', W'): means, then logarithms of variances, as encoders give them."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean=mean, logvar=logvar.clamp(*LOGVAR_RANGE), per_frame=per_frame, deterministic=deterministic)

    @property
    def std(self) -> Tensor:
        """Standard deviations."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor) -> Tensor:
        """A draw, given standard normal ``noise`` of the shape of the mean."""
        return self.mean + self.std * noise.to(self.mean)

    def kl(self, other: "Posterior | None" = None) -> Tensor:
        """KL divergence from ``other`` (None: from the standard normal), summed over latents: (B,), or (B * T',) where
        frames are images. 0 of what is deterministic."""
        if other is None:
            terms = 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar)
        else:
            difference = (self.mean - other.mean).square() * torch.exp(-other.logvar)
            ratio = self.logvar - other.logvar
            terms = 0.5 * (difference + ratio.exp() - 1 - ratio)
        return self._summed(terms)

    def nll(self, sample: Tensor) -> Tensor:
        """Negative logarithm of the density at ``sample``, summed as of ``kl``."""
        squares = (sample - self.mean).square() * torch.exp(-self.logvar)
        return self._summed(0.5 * (math.log(2 * math.pi) + self.logvar + squares))

    def _summed(self, terms: Tensor) -> Tensor:
        if self.deterministic:
            terms = torch.zeros_like(terms)
        if self.per_frame:
            terms = rearrange(terms, "b c t h w -> (b t) c h w")
        return terms.flatten(1).sum(1)
