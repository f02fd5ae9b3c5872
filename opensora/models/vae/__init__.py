"""Autoencoders by kind: the table that everything else asks. A new one is a file, and a line of it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from opensora.models.base import AutoencoderShape
from opensora.models.vae.dct import DCTAutoencoder, DCTConfig, dct_shape
from opensora.models.vae.flux2d import Flux2DAutoencoder, Flux2DConfig, flux2d_shape
from opensora.models.vae.folder import check_folder
from opensora.models.vae.hunyuan import HunyuanAutoencoder, HunyuanConfig, hunyuan_shape

if TYPE_CHECKING:
    from opensora.models.base import Autoencoder

AutoencoderConfig: TypeAlias = DCTConfig | HunyuanConfig | Flux2DConfig
Device: TypeAlias = torch.device | str


class AutoencoderKind(NamedTuple):
    """What can be asked of a kind of autoencoder."""

    config: type
    build: Callable[[Any, Device, torch.dtype], "Autoencoder"]
    shape: Callable[[Any], AutoencoderShape]  # without its weights
    diffusers: str = ""  # the class whose folder ``path`` names; none: it has no files
    parameters: int = 0  # of the published one, for forecasts


AUTOENCODERS: dict[str, AutoencoderKind] = {
    "dct": AutoencoderKind(DCTConfig, lambda cfg, device, _: DCTAutoencoder(cfg, device), dct_shape),
    "hunyuan": AutoencoderKind(
        HunyuanConfig, HunyuanAutoencoder, hunyuan_shape, "AutoencoderKLHunyuanVideo", 246_000_000
    ),
    "flux2d": AutoencoderKind(Flux2DConfig, Flux2DAutoencoder, flux2d_shape, "AutoencoderKL", 84_000_000),
}
AUTOENCODER_CONFIGS: dict[str, type] = {kind: entry.config for kind, entry in AUTOENCODERS.items()}


def autoencoder_shape(cfg: AutoencoderConfig) -> AutoencoderShape:
    """The shape without building or reading weights; ``latent_grid`` accepts it in place of an autoencoder."""
    return AUTOENCODERS[cfg.kind].shape(cfg)


def check_autoencoder(cfg: AutoencoderConfig) -> None:
    """That the files of ``cfg`` may be there, before a run or a model is made; loads nothing.

    Raises:
        UserError: they are not, with the key.
    """
    if diffusers := AUTOENCODERS[cfg.kind].diffusers:
        check_folder(cfg.path, diffusers)  # type: ignore[union-attr]


def build_autoencoder(cfg: AutoencoderConfig, device: Device, dtype: torch.dtype) -> "Autoencoder":
    """The frozen autoencoder of ``cfg`` on ``device``; ``dtype`` is what its weights compute in.

    Raises:
        UserError: weights that are missing or unreadable.
    """
    return AUTOENCODERS[cfg.kind].build(cfg, device, dtype)
