"""Text encoders by name."""

from typing import TYPE_CHECKING

import torch

from opensora.models.text.bytes import ByteTextConfig, ByteTextEncoder
from opensora.models.text.t5_clip import T5ClipConfig, T5ClipTextEncoder, check_folder

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


def check_text_encoder(cfg: TextConfig) -> None:
    """That the files of ``cfg`` may be there, before a run or a model is made; loads nothing.

    Raises:
        UserError: they are not, with the key.
    """
    if isinstance(cfg, T5ClipConfig):
        check_folder("t5_path", cfg.t5_path)
        check_folder("clip_path", cfg.clip_path)


def build_text_encoder(cfg: TextConfig, device: torch.device | str, dtype: torch.dtype) -> "TextEncoder":
    """The frozen encoder of ``cfg`` on ``device``; its features have ``dtype``."""
    if isinstance(cfg, ByteTextConfig):
        return ByteTextEncoder(cfg, device, dtype)
    return T5ClipTextEncoder(cfg, device, dtype)
