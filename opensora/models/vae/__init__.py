"""Autoencoders by name, and their shapes without their weights."""

from typing import TYPE_CHECKING

import torch

from opensora.models.base import AutoencoderShape
from opensora.models.vae.dct import TEMPORAL, DCTAutoencoder, DCTConfig
from opensora.models.vae.flux2d import Flux2DAutoencoder, Flux2DConfig, flux2d_shape
from opensora.models.vae.folder import check_folder
from opensora.models.vae.hunyuan import HunyuanAutoencoder, HunyuanConfig, hunyuan_shape

if TYPE_CHECKING:
    from opensora.models.base import Autoencoder

AutoencoderConfig = DCTConfig | HunyuanConfig | Flux2DConfig

AUTOENCODERS = {
    "dct": (DCTConfig, DCTAutoencoder),
    "hunyuan": (HunyuanConfig, HunyuanAutoencoder),
    "flux2d": (Flux2DConfig, Flux2DAutoencoder),
}


def autoencoder_shape(cfg: AutoencoderConfig) -> AutoencoderShape:
    """The shape without building or reading weights; ``latent_grid`` accepts it in place of an autoencoder."""
    if isinstance(cfg, DCTConfig):
        return AutoencoderShape(
            channels=cfg.channels, stride=(TEMPORAL, cfg.spatial, cfg.spatial), causal=DCTAutoencoder.causal
        )
    if isinstance(cfg, HunyuanConfig):
        channels, stride = hunyuan_shape(cfg)
        return AutoencoderShape(channels=channels, stride=stride, causal=HunyuanAutoencoder.causal)
    channels, stride = flux2d_shape(cfg)
    return AutoencoderShape(channels=channels, stride=stride, causal=Flux2DAutoencoder.causal)


def check_autoencoder(cfg: AutoencoderConfig) -> None:
    """That the files of ``cfg`` may be there, before a run or a model is made; loads nothing.

    Raises:
        UserError: they are not, with the key.
    """
    if isinstance(cfg, HunyuanConfig):
        check_folder(cfg.path, "AutoencoderKLHunyuanVideo")
    if isinstance(cfg, Flux2DConfig):
        check_folder(cfg.path, "AutoencoderKL")


def build_autoencoder(cfg: AutoencoderConfig, device: torch.device | str, dtype: torch.dtype) -> "Autoencoder":
    """The frozen autoencoder of ``cfg`` on ``device``; ``dtype`` is what its weights compute in.

    Raises:
        UserError: weights that are missing or unreadable.
    """
    if isinstance(cfg, DCTConfig):
        return DCTAutoencoder(cfg, device)
    if isinstance(cfg, HunyuanConfig):
        return HunyuanAutoencoder(cfg, device, dtype)
    return Flux2DAutoencoder(cfg, device, dtype)
