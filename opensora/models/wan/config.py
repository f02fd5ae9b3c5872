"""The shape of a Wan, and the shapes that have names."""

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

from opensora.utils.limits import Limits

MASK_CHANNELS = 4  # of known frames: one for each frame that a latent frame of the published autoencoder stands for
_WIDTH = (2**17, "no device multiplies wider matrices")
_REFERENCES = ("none", "clip", "in_place")


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Shape of the model; the defaults are Wan 2.1 T2V-14B."""

    kind: Literal["wan"] = "wan"
    in_channels: int = 16  # of latents
    patch_size: tuple[int, int, int] = (1, 2, 2)  # latents per token along (t, h, w)
    hidden_size: int = 5120
    num_heads: int = 40
    depth: int = 40  # blocks
    ffn_dim: int = 13824  # hidden units of the MLPs
    text_dim: int = 4096  # of a text token
    image_dim: int = 0  # of a token of the reference picture (I2V of 2.1); 0: not read
    references: Literal["none", "clip", "in_place"] = "none"
    # known frames: none; clip: a mask and a coded clip beside the noise (I2V); in_place: at time 0 (TI2V-5B)

    LIMITS: ClassVar[Limits] = {
        **dict.fromkeys(("in_channels", "hidden_size", "num_heads", "text_dim", "image_dim"), _WIDTH),
        "ffn_dim": (2**20, "the hidden layer would be wider than any matrix product wants"),
        "depth": (1000, "every block is built one by one"),
    }

    def __post_init__(self) -> None:
        for name in ("in_channels", "hidden_size", "num_heads", "depth", "ffn_dim", "text_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be an integer >= 1")
        if self.image_dim < 0:
            raise ValueError(f"image_dim={self.image_dim}: must be an integer >= 0")
        if len(self.patch_size) != 3 or not all(1 <= size <= 64 for size in self.patch_size):
            raise ValueError(f"patch_size={tuple(self.patch_size)}: must be three integers from 1 to 64, for (t, h, w)")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads}: must be a divisor of hidden_size={self.hidden_size}")
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"num_heads={self.num_heads}: must leave an even head dim >= 6, for positions along three axes, not "
                f"hidden_size/num_heads={self.head_dim}"
            )
        if self.references not in _REFERENCES:
            raise ValueError(f"references={self.references}: must be one of {', '.join(_REFERENCES)}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def axes_dim(self) -> tuple[int, int, int]:
        """Rotary channels of a head for (t, h, w): about a third each, what is left over for time."""
        side = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * side, side, side

    @property
    def token_values(self) -> int:
        """Latent values of a token."""
        return self.in_channels * prod(self.patch_size)

    @property
    def cond_values(self) -> int:
        """Values per token of the mask and the latents of known frames, beside the noise."""
        return (MASK_CHANNELS + self.in_channels) * prod(self.patch_size) if self.references == "clip" else 0


_I2V: dict[str, Any] = {"references": "clip"}
SIZES = {
    "debug": WanConfig(  # for tests
        in_channels=4, hidden_size=64, num_heads=4, depth=2, ffn_dim=96, text_dim=24
    ),
    "demo": WanConfig(  # learns the rendered shapes on two CPU cores
        in_channels=64, patch_size=(1, 1, 1), hidden_size=192, num_heads=4, depth=6, ffn_dim=768, text_dim=64
    ),
    "t2v_1_3b": WanConfig(hidden_size=1536, num_heads=12, depth=30, ffn_dim=8960),  # 2.1
    "t2v_14b": WanConfig(),  # 2.1
    "i2v_14b": WanConfig(**_I2V, image_dim=1280),  # 2.1, for 480p and 720p
    "t2v_a14b": WanConfig(),  # 2.2, each of two experts
    "i2v_a14b": WanConfig(**_I2V),  # 2.2, each of two experts
    "ti2v_5b": WanConfig(  # 2.2
        in_channels=48, hidden_size=3072, num_heads=24, depth=30, ffn_dim=14336, references="in_place"
    ),
}
