"""The normal distribution that an autoencoder gives for a clip: its mode, samples of it, and its KL divergence."""

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

    @classmethod
    def of(cls, moments: Tensor, *, per_frame: bool = False) -> "Posterior":
        """(B, 2C, T', H', W'): means, then logarithms of variances, as encoders give them."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean=mean, logvar=logvar.clamp(*LOGVAR_RANGE), per_frame=per_frame)

    def sample(self, noise: Tensor) -> Tensor:
        """A draw, given standard normal ``noise`` of the shape of the mean."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, summed over latents: (B,), or (B * T',) where frames are images."""
        terms = 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar)
        if self.per_frame:
            terms = rearrange(terms, "b c t h w -> (b t) c h w")
        return terms.flatten(1).sum(1)
