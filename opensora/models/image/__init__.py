"""Encoders of reference pictures by kind: the table that all else asks. A new one is a file, and a line of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from opensora.models.base import ModelConfig, Width
from opensora.models.families import describe
from opensora.models.image.clip_vision import (
    ClipVisionConfig,
    ClipVisionEncoder,
    check_picture_files,
    stated_picture_width,
)
from opensora.models.text.transformers_encoder import Peers, Visits
from opensora.utils.errors import UserError

Device: TypeAlias = torch.device | str


@dataclass(frozen=True, kw_only=True)
class NoImageEncoder:
    """Models that read no tokens of a picture."""

    kind: Literal["none"] = "none"


ImageEncoderConfig: TypeAlias = NoImageEncoder | ClipVisionConfig


class ImageEncoder(Protocol):
    """Pictures to tokens. Weights are frozen."""

    tokens: int  # of a picture
    dim: int

    def encode(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, tokens, dim)."""


class ImageEncoderKind(NamedTuple):
    """What can be asked of a kind of image encoder."""

    config: type
    build: Callable[..., ImageEncoder] | None = None  # None: there is none
    stated: Callable[[Any], Width] | None = None  # by its files, without loading them, or UserError
    check: Callable[[Any], None] | None = None  # names and shapes in its files, by their headers, or UserError
    parameters: int = 0  # of the published one, for forecasts
    block: int = 0  # of them in one block
    tokens: int = 0  # of a picture, by the published one
    dim: int = 0  # of a token of the published one
    side: int = 0  # of the square that it reads, in pixels


IMAGE_ENCODERS: dict[str, ImageEncoderKind] = {
    "none": ImageEncoderKind(NoImageEncoder),
    "clip_vision": ImageEncoderKind(
        ClipVisionConfig,
        ClipVisionEncoder,
        stated=stated_picture_width,
        check=check_picture_files,
        parameters=611_000_000,
        block=19_677_440,
        tokens=257,
        dim=1280,
        side=224,
    ),
}
IMAGE_ENCODER_CONFIGS: dict[str, type] = {kind: entry.config for kind, entry in IMAGE_ENCODERS.items()}


def check_reads_pictures(cfg: ImageEncoderConfig, model: ModelConfig) -> None:
    """That there is an image encoder where the model reads tokens of a picture, and none elsewhere.

    Raises:
        ValueError: it is not so.
    """
    dim, kind = describe(model).image_dim, IMAGE_ENCODERS[cfg.kind]
    if dim and kind.build is None:
        raise ValueError(
            f"image_encoder.kind=none: model.kind={model.kind} reads tokens of a reference picture, {dim} wide; give "
            "image_encoder.kind=clip_vision and image_encoder.path"
        )
    if not dim and kind.build is not None:
        raise ValueError(
            f"image_encoder.kind={cfg.kind}: model.kind={model.kind} reads no tokens of a picture; must be none"
        )


def check_image_encoder(cfg: ImageEncoderConfig, model: ModelConfig) -> None:
    """That the files of ``cfg`` are there, fit, and give what the denoiser reads; loads nothing.

    Raises:
        UserError: they do not, with the key.
    """
    kind, dim = IMAGE_ENCODERS[cfg.kind], describe(model).image_dim
    if kind.stated is None or kind.check is None:
        return
    width = kind.stated(cfg)
    if width.size not in (None, dim):
        raise UserError(f"{width.key}: gives tokens {width.size} wide, model.kind={model.kind} reads {dim}; must be it")
    kind.check(cfg)


def build_image_encoder(
    cfg: ImageEncoderConfig,
    device: Device,
    dtype: torch.dtype,
    peers: Peers | None = None,
    visits: Callable[..., Visits] | None = None,
) -> ImageEncoder | None:
    """The frozen encoder of ``cfg`` on ``device``; None: there is none. See ``build_text_encoder``."""
    kind = IMAGE_ENCODERS[cfg.kind]
    return None if kind.build is None else kind.build(cfg, device, dtype, peers, visits)
