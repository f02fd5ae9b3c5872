"""The shape of a Latte, and the shapes that have names."""

from dataclasses import dataclass
from typing import Literal

from opensora.models.dit.config import DiTConfig


@dataclass(frozen=True, kw_only=True)
class LatteConfig(DiTConfig):
    """Shape of the model: the keys are DiT's, the defaults Latte-XL/2 for prompts, as in Open-Sora 1.0."""

    kind: Literal["latte"] = "latte"  # type: ignore[assignment]


SIZES = {
    "xl2": LatteConfig(),  # Latte-XL/2
    "debug": LatteConfig(hidden_size=64, depth=4, num_heads=4, caption_channels=24),  # for tests
}
