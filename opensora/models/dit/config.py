"""The shape of a DiT, and the shapes that have names."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from opensora.models.layers.shape_checks import SHAPE_LIMITS, check_shape
from opensora.utils.limits import Limits

_CONDITION = re.compile(r"text|label_([1-9][0-9]{0,6})")


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of the model; the defaults are DiT-XL/2 for prompts, as in Open-Sora 1.0."""

    kind: Literal["dit"] = "dit"
    in_channels: int = 4  # of latents
    patch_size: tuple[int, int, int] = (1, 2, 2)  # latents per token along (t, h, w)
    hidden_size: int = 1152
    depth: int = 28  # blocks
    num_heads: int = 16
    mlp_ratio: float = 4.0
    condition: str = "text"  # what it is told: text, a prompt as one vector; label_N, one of N classes
    caption_channels: int = 512  # of a prompt's vector
    no_temporal_pos_emb: bool = False  # tokens do not know their frame, as for stills
    learn_sigma: bool = True  # gives a variance beside the noise

    LIMITS: ClassVar[Limits] = SHAPE_LIMITS

    def __post_init__(self) -> None:
        check_shape(self)
        if not _CONDITION.fullmatch(self.condition):
            raise ValueError(f"condition={self.condition}: must be text, or label_N for N classes, as label_1000")

    @property
    def num_classes(self) -> int:
        """Of labels; 0: it reads prompts."""
        match = _CONDITION.fullmatch(self.condition)
        assert match is not None
        return int(match[1] or 0)

    @property
    def outputs(self) -> int:
        """Values per latent."""
        return 2 if self.learn_sigma else 1


SIZES = {
    "xl2": DiTConfig(),  # DiT-XL/2
    "xl2x2": DiTConfig(patch_size=(2, 2, 2)),  # DiT-XL/2x2
    "debug": DiTConfig(hidden_size=64, depth=2, num_heads=4, caption_channels=24),  # for tests
}
