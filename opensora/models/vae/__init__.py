"""Autoencoders by kind: the table that everything else asks. A new one is a file, and a line of it."""

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from opensora.models.base import AutoencoderShape
from opensora.models.vae.dc_ae import DCAEAutoencoder, DCAEConfig, check_dc_ae, dc_ae_shape
from opensora.models.vae.dct import DCTAutoencoder, DCTConfig, dct_shape
from opensora.models.vae.flux2d import Flux2DAutoencoder, Flux2DConfig, check_flux2d, flux2d_shape
from opensora.models.vae.hunyuan import HunyuanAutoencoder, HunyuanConfig, check_hunyuan, hunyuan_shape
from opensora.models.vae.opensora_1x.sd import SDAutoencoder, SDConfig, check_sd, sd_shape
from opensora.models.vae.opensora_1x.temporal_decoder import (
    SDTemporalDecoder,
    SDTemporalDecoderConfig,
    check_sd_temporal_decoder,
    sd_temporal_decoder_shape,
)
from opensora.models.vae.opensora_1x.v1_2 import (
    OpenSoraV12Autoencoder,
    OpenSoraV12Config,
    check_opensora_v1_2,
    opensora_v1_2_shape,
)
from opensora.models.vae.opensora_1x.v1_3 import (
    OpenSoraV13Autoencoder,
    OpenSoraV13Config,
    check_opensora_v1_3,
    opensora_v1_3_shape,
)
from opensora.models.vae.wan import Wan22VAEConfig, WanAutoencoder, WanVAEConfig, check_wan, wan_shape

if TYPE_CHECKING:
    from opensora.models.base import Autoencoder

AutoencoderConfig: TypeAlias = (
    DCTConfig
    | HunyuanConfig
    | Flux2DConfig
    | DCAEConfig
    | SDConfig
    | SDTemporalDecoderConfig
    | OpenSoraV12Config
    | OpenSoraV13Config
    | WanVAEConfig
    | Wan22VAEConfig
)
Device: TypeAlias = torch.device | str


class AutoencoderKind(NamedTuple):
    """What can be asked of a kind of autoencoder."""

    config: type
    build: Callable[[Any, Device, torch.dtype], "Autoencoder"]
    shape: Callable[[Any], AutoencoderShape]  # without its weights
    check: Callable[[Any], None] | None = None  # that its weights are there and fit, by headers; None: it has no files
    parameters: int = 0  # of the published one, for forecasts
    patch: int | None = None  # latents along a side of a token of the model behind it; None: any
    later: tuple[str, ...] = ()  # fields that configurations of earlier versions do not have


TILES = ("spatial_tiling", "temporal_tiling", "tile_size", "tile_frames", "tile_overlap")
WORK = ("sample", "compile", "micro_batch", "tiling", *TILES)  # how clips are coded, not by which weights
AUTOENCODERS: dict[str, AutoencoderKind] = {
    "dct": AutoencoderKind(DCTConfig, lambda cfg, device, _: DCTAutoencoder(cfg, device), dct_shape),
    "hunyuan": AutoencoderKind(
        HunyuanConfig,
        HunyuanAutoencoder,
        hunyuan_shape,
        check_hunyuan,
        parameters=246_000_000,
        later=("sample", "compile", "micro_batch", *TILES),
    ),
    "flux2d": AutoencoderKind(
        Flux2DConfig,
        Flux2DAutoencoder,
        flux2d_shape,
        check_flux2d,
        parameters=84_000_000,
        later=("sample", "compile"),
    ),
    "dc_ae": AutoencoderKind(DCAEConfig, DCAEAutoencoder, dc_ae_shape, check_dc_ae, parameters=459_000_000, patch=1),
    "sd": AutoencoderKind(SDConfig, SDAutoencoder, sd_shape, check_sd, parameters=84_000_000),
    "sd_temporal_decoder": AutoencoderKind(
        SDTemporalDecoderConfig,
        SDTemporalDecoder,
        sd_temporal_decoder_shape,
        check_sd_temporal_decoder,
        parameters=98_000_000,
    ),
    "opensora_v1_2": AutoencoderKind(
        OpenSoraV12Config,
        OpenSoraV12Autoencoder,
        opensora_v1_2_shape,
        check_opensora_v1_2,
        parameters=393_000_000,
    ),
    "opensora_v1_3": AutoencoderKind(
        OpenSoraV13Config,
        OpenSoraV13Autoencoder,
        opensora_v1_3_shape,
        check_opensora_v1_3,
        parameters=259_000_000,
    ),
    "wan": AutoencoderKind(WanVAEConfig, WanAutoencoder, wan_shape, check_wan, parameters=126_900_000),
    "wan22": AutoencoderKind(Wan22VAEConfig, WanAutoencoder, wan_shape, check_wan, parameters=704_700_000),
}
AUTOENCODER_CONFIGS: dict[str, type] = {kind: entry.config for kind, entry in AUTOENCODERS.items()}


def autoencoder_shape(cfg: AutoencoderConfig) -> AutoencoderShape:
    """The shape without building or reading weights; ``latent_grid`` accepts it in place of an autoencoder."""
    return AUTOENCODERS[cfg.kind].shape(cfg)


def latents_depend_on(cfg: AutoencoderConfig) -> dict[str, Any]:
    """Key -> value of what latents are a function of, for those who keep them. What is as it always was is left out
    where earlier versions had no key for it, so that what they kept still belongs to the same configuration."""
    later = AUTOENCODERS[cfg.kind].later
    return {
        field.name: getattr(cfg, field.name)
        for field in fields(cfg)
        if field.name not in later or getattr(cfg, field.name) != field.default
    }


def check_autoencoder(cfg: AutoencoderConfig) -> None:
    """That the files of ``cfg`` are there and fit, before a run or a model is made; reads headers only.

    Raises:
        UserError: they are not, with the key.
    """
    if check := AUTOENCODERS[cfg.kind].check:
        check(cfg)


def build_autoencoder(cfg: AutoencoderConfig, device: Device, dtype: torch.dtype) -> "Autoencoder":
    """The frozen autoencoder of ``cfg`` on ``device``; ``dtype`` is what its weights compute in.

    On the meta device it has no weights and needs no files: what is coded there tells shapes and memory.

    Raises:
        UserError: weights that are missing or unreadable.
    """
    return AUTOENCODERS[cfg.kind].build(cfg, device, dtype)
