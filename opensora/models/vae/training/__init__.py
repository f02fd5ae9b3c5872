"""What autoencoders are trained by: reconstruction, perceptual distance, KL divergence, and a discriminator.

Building blocks, as functions of tensors and modules; no loop is here, and no autoencoder.
"""

from opensora.models.vae.training.discriminator import PatchDiscriminator
from opensora.models.vae.training.losses import (
    Reconstruction,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    image_probability,
    kl_loss,
    lecam_averages,
    lecam_penalty,
    reconstruction_loss,
    weight_from,
)
from opensora.models.vae.training.lpips import LPIPS

__all__ = [
    "LPIPS",
    "PatchDiscriminator",
    "Reconstruction",
    "adaptive_weight",
    "discriminator_loss",
    "generator_loss",
    "image_probability",
    "kl_loss",
    "lecam_averages",
    "lecam_penalty",
    "reconstruction_loss",
    "weight_from",
]
