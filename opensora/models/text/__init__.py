"""Text encoders by name."""

from typing import TYPE_CHECKING

import torch

from opensora.models.text.bytes import ByteTextConfig, ByteTextEncoder
from opensora.models.text.t5_clip import T5ClipConfig, T5ClipTextEncoder, stated_width
from opensora.utils.errors import UserError

if TYPE_CHECKING:
    from opensora.models.base import TextEncoder

TextConfig = ByteTextConfig | T5ClipConfig

TEXT_ENCODERS = {
    "bytes": (ByteTextConfig, ByteTextEncoder),
    "t5_clip": (T5ClipConfig, T5ClipTextEncoder),
}


def text_tokens(cfg: TextConfig) -> int:
    """Tokens of a prompt, padding included."""
    return cfg.max_words if isinstance(cfg, ByteTextConfig) else cfg.max_tokens


def check_text_encoder(cfg: TextConfig, context_in_dim: int, vec_in_dim: int) -> None:
    """That the files of ``cfg`` may be there and give what the denoiser reads, before either is made; loads nothing.

    Raises:
        UserError: they are not, or give other widths; with the key.
    """
    if not isinstance(cfg, T5ClipConfig):
        return  # its widths are in the configuration: opensora.config.run.check_fit
    for key, path, name, wanted, stated in (
        ("context_in_dim", "t5_path", cfg.t5_path, context_in_dim, "d_model"),
        ("vec_in_dim", "clip_path", cfg.clip_path, vec_in_dim, "hidden_size"),
    ):
        width = stated_width(path, name, stated)
        if width is not None and width != wanted:
            raise UserError(f"model.{key}={wanted}: text.{path}={name} gives {width}; set model.{key}={width}")


def build_text_encoder(cfg: TextConfig, device: torch.device | str, dtype: torch.dtype) -> "TextEncoder":
    """The frozen encoder of ``cfg`` on ``device``; its features have ``dtype``."""
    if isinstance(cfg, ByteTextConfig):
        return ByteTextEncoder(cfg, device, dtype)
    return T5ClipTextEncoder(cfg, device, dtype)
