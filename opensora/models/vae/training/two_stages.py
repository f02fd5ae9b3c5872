"""Training of Open-Sora 1.2's autoencoder: both networks at once, and the losses of its three stages.

x     = pixels, x_z = their image latents, z = latents of the clip, x_z' and x' = what these decode to
L(a,b) = sum of |a - b| over all values, divided by frames; with w_p LPIPS added to every value where a, b are pixels

stage 1   L(x_z, x_z'), and of images L(x_z, z) as well; the image network is frozen
stage 2   L(x_z, x_z'), by which gradients reach the image encoder from both sides
stage 3   L(x, x') + kl
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from opensora.models.base import Draw
from opensora.models.vae.opensora_1x.clip_coding import PaddedPieces
from opensora.models.vae.opensora_1x.pipeline_network import PipelineVAE
from opensora.models.vae.opensora_1x.sd import FACTOR
from opensora.models.vae.posterior import Posterior
from opensora.models.vae.training.losses import kl_loss, reconstruction_loss

WHOLE = PaddedPieces(None)


@dataclass(frozen=True, kw_only=True)
class Coded:
    """What both networks made of clips; neither image latents nor latents are normalized."""

    pixels: Tensor  # (B, 3, T, H, W), not clamped
    images: Tensor  # (B, 4, T, H', W') as the image encoder made them
    images_again: Tensor  # the same as the temporal decoder made them
    latents: Tensor  # (B, 4, T', H', W')
    posterior: Posterior  # of the latents; of the last piece alone, where there are several


@dataclass(frozen=True, kw_only=True)
class StageLoss:
    """Which terms a stage trains by."""

    of_pixels: bool = False
    of_images: bool = False
    identity: bool = False  # of single frames: latents are to be the image latents
    kl_weight: float = 1e-6
    perceptual_weight: float = 0.1


STAGES = (
    StageLoss(of_images=True, identity=True),
    StageLoss(of_images=True),
    StageLoss(of_pixels=True),
)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Scalars: the first is trained, of the others some are only told."""

    loss: Tensor
    nll: Tensor  # L of pixels
    kl: Tensor  # with its weight
    images_nll: Tensor  # L of image latents
    identity: Tensor | None  # of single frames


def code_both_ways(network: PipelineVAE, pixels: Tensor, draw: Draw, coding: PaddedPieces = WHOLE) -> Coded:
    """(B, 3, T, H, W) in [-1, 1] to latents and back, with gradients where parameters take any.

    Args:
        draw: noise of both posteriors, the stages ``spatial`` and ``temporal``.
        coding: the pieces that are coded together along time.
    """
    clips, count = len(pixels), pixels.shape[2]
    image, temporal = network.spatial_vae.module, network.temporal_vae
    frames = rearrange(pixels, "b c t h w -> (b t) c h w")
    moments = rearrange(image.quant_conv(image.encoder(frames)), "(b t) c h w -> b c t h w", b=clips)  # type: ignore
    found = Posterior.of(moments)
    images = found.sample(draw(tuple(found.mean.shape[1:]), "spatial")) * FACTOR
    posteriors = [Posterior.of(temporal.encode(images[:, :, piece])) for piece in coding.pieces(count)]
    mean = torch.cat([posterior.mean for posterior in posteriors], 2)
    noise = draw(tuple(mean.shape[1:]), "temporal")
    parts = noise.split([posterior.mean.shape[2] for posterior in posteriors], 2)
    latents = torch.cat([one.sample(part) for one, part in zip(posteriors, parts, strict=True)], 2)
    cut = coding.latent_pieces(latents.shape[2])
    asked = coding.asked(count, len(cut))
    again = torch.cat([temporal.decode(latents[:, :, p], n) for p, n in zip(cut, asked, strict=True)], 2)
    z = rearrange(again / FACTOR, "b c t h w -> (b t) c h w")
    made = rearrange(image.decoder(image.post_quant_conv(z)), "(b t) c h w -> b c t h w", b=clips)  # type: ignore
    return Coded(pixels=made, images=images, images_again=again, latents=latents, posterior=posteriors[-1])


def stage_terms(stage: StageLoss, pixels: Tensor, coded: Coded, distances: Tensor) -> Terms:
    """What a stage trains by. ``distances``: (B * T,) LPIPS of every frame."""
    nll = reconstruction_loss(pixels, coded.pixels, distances, perceptual_weight=stage.perceptual_weight).nll
    kl = kl_loss(coded.posterior, stage.kl_weight)
    images_nll = latents_loss(coded.images, coded.images_again)
    identity = latents_loss(coded.images, coded.latents) if pixels.shape[2] == 1 and stage.identity else None
    loss = torch.zeros((), dtype=nll.dtype, device=nll.device)
    if stage.of_pixels:
        loss = loss + nll + kl
    if stage.of_images:
        loss = loss + images_nll
    if identity is not None:
        loss = loss + identity
    return Terms(loss=loss, nll=nll, kl=kl, images_nll=images_nll, identity=identity)


def latents_loss(x: Tensor, y: Tensor) -> Tensor:
    """L of latents (B, C, T, H, W)."""
    none = torch.zeros(len(x) * x.shape[2], dtype=x.dtype, device=x.device)
    return reconstruction_loss(x, y, none, perceptual_weight=0.0).nll
