"""What the three models tell the rest of the project in the same way."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from opensora.models.base import Widths
from opensora.models.stdit.config import Freeze, ShapeConfig


def check_widths(cfg: ShapeConfig, given: Widths, text: str = "caption_channels") -> None:
    """That the model reads latents and text as wide as it is given.

    Raises:
        ValueError: it does not, with what would.
    """
    for key, width in (("in_channels", given.latents), (text, given.text)):
        if width.size not in (None, getattr(cfg, key)):
            raise ValueError(f"{key}={getattr(cfg, key)}: {width.key} gives {width.size}; set model.{key}={width.size}")


def noisy_frames(known: Tensor | None) -> Tensor | None:
    """Known tokens (B, T, S) bool -> the family's ``x_mask`` (B, T), True for frames that are noisy."""
    return None if known is None else ~known.any(dim=2)


def train_only(model: nn.Module, is_trained: Callable[[str], bool]) -> None:
    """Freeze every parameter that ``is_trained`` does not name."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and is_trained(name))


def freeze(model: nn.Module, kind: Freeze | None) -> None:
    """The family's option ``freeze``."""
    rules: dict[Any, Callable[[str], bool]] = {
        None: lambda name: True,
        "not_temporal": lambda name: "attn_temp" in name,
        "text": lambda name: "cross_attn" not in name,
    }
    train_only(model, rules[kind])
