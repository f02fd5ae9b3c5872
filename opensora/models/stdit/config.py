"""What the configurations of the Open-Sora 1.x models have in common, and what follows from them alone."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from opensora.models.base import Widths
from opensora.utils.limits import Limits

_WIDTH = (2**17, "no device multiplies wider matrices")
LIMITS: Limits = {
    **dict.fromkeys(("in_channels", "hidden_size", "num_heads", "caption_channels"), _WIDTH),
    "depth": (1000, "every block is built one by one"),
    "model_max_length": (2**20, "no prompt is as long"),
    "mlp_ratio": (64.0, "the hidden layer would be wider than any matrix product wants"),
}


@dataclass(frozen=True, kw_only=True)
class ShapeConfig:
    """Widths and depth under the names that the family's configurations and config.json have."""

    in_channels: int = 4  # of latents
    patch_size: tuple[int, int, int] = (1, 2, 2)  # latents per token along (t, h, w)
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    caption_channels: int = 4096  # of a text token
    model_max_length: int = 120  # rows of the null text
    pred_sigma: bool = True  # predicts a variance beside every value

    def __post_init__(self) -> None:
        for name in ("in_channels", "hidden_size", "depth", "num_heads", "caption_channels", "model_max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be an integer >= 1")
        if len(self.patch_size) != 3 or any(not 1 <= side <= 64 for side in self.patch_size):
            raise ValueError(f"patch_size={tuple(self.patch_size)}: must be three integers from 1 to 64, for (t, h, w)")
        if self.hidden_size % (4 * self.num_heads) and self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads}: must be a divisor of hidden_size={self.hidden_size}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size={self.hidden_size}: must be a multiple of 4, for sines and cosines of places")
        if self.head_dim % 2:
            raise ValueError(
                f"num_heads={self.num_heads}: must leave an even head dim, not hidden_size/num_heads={self.head_dim}"
            )
        if not self.mlp_ratio > 0 or self.inner < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio}: must leave a hidden unit of hidden_size={self.hidden_size}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def inner(self) -> int:
        """Hidden units of an MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def token_values(self) -> int:
        """Latent values of a token."""
        return self.in_channels * prod(self.patch_size)

    @property
    def outputs(self) -> int:
        """Values per latent."""
        return 2 if self.pred_sigma else 1


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


def freeze(model: nn.Module, is_trained: Callable[[str], bool]) -> None:
    """Train only the parameters that ``is_trained`` names, of those that train at all."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and is_trained(name))


def frozen_by(model: nn.Module, kind: str | None) -> None:
    """The family's ``freeze``."""
    rules: dict[Any, Callable[[str], bool]] = {
        None: lambda name: True,
        "not_temporal": lambda name: "attn_temp" in name,
        "text": lambda name: "cross_attn" not in name,
    }
    freeze(model, rules[kind])
