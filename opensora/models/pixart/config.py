"""The shapes of PixArt, PixArt-MS and PixArt-Sigma, and the shapes that have names."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from opensora.models.layers.shape_checks import SHAPE_LIMITS, check_shape
from opensora.utils.limits import Limits


@dataclass(frozen=True, kw_only=True)
class PixArtConfig:
    """Shape of the model; the defaults are PixArt-XL/2, as in Open-Sora 1.0."""

    kind: Literal["pixart"] = "pixart"
    in_channels: int = 4  # of latents
    patch_size: tuple[int, int, int] = (1, 2, 2)  # latents per token along (t, h, w)
    hidden_size: int = 1152
    depth: int = 28  # blocks
    num_heads: int = 16
    mlp_ratio: float = 4.0
    caption_channels: int = 4096  # of a text token
    model_max_length: int = 120  # text tokens of the null text
    input_size: tuple[int, int, int] | None = None  # latents (t, h, w) that it is made for; null: those of each clip
    base_size: int | None = None  # side in latents that positions are stretched to; null: the root of input_size's area
    space_scale: float = 1.0  # divides rows and columns: 0.5 for 256px, 1 for 512px, 2 for 1024px of published weights
    time_scale: float = 1.0  # divides frames
    no_temporal_pos_emb: bool = False  # tokens do not know their frame, as for stills
    pred_sigma: bool = True  # gives a variance beside the noise
    freeze: Literal["text"] | None = None  # text: attention to the text is not trained

    LIMITS: ClassVar[Limits] = {
        **SHAPE_LIMITS,
        "base_size": (10**6, "no grid is as large"),
        "space_scale": (1e6, "all positions would be one"),
        "time_scale": (1e6, "all frames would be one"),
    }

    def __post_init__(self) -> None:
        check_shape(self)
        for name in ("space_scale", "time_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number > 0")
        _, ph, pw = self.patch_size
        if self.base_size is not None and self.base_size < ph:
            raise ValueError(f"base_size={self.base_size}: must be latents of at least a patch, {ph}, or null")
        if self.input_size is not None and not (
            len(self.input_size) == 3 and self.input_size[1] >= ph and self.input_size[2] >= pw
        ):
            raise ValueError(
                f"input_size={tuple(self.input_size)}: must be latents (t, h, w) of at least a patch, "
                f"{tuple(self.patch_size)}, or null"
            )

    @property
    def outputs(self) -> int:
        """Values per latent."""
        return 2 if self.pred_sigma else 1


@dataclass(frozen=True, kw_only=True)
class PixArtMSConfig(PixArtConfig):
    """PixArt that is told the size and the aspect ratio of its clips."""

    kind: Literal["pixart_ms"] = "pixart_ms"  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % 3:
            raise ValueError(
                f"hidden_size={self.hidden_size}: must be a multiple of 3, for height, width and aspect ratio"
            )


@dataclass(frozen=True, kw_only=True)
class PixArtSigmaConfig(PixArtConfig):
    """PixArt whose tokens may attend to a coarser grid, and may normalise queries and keys."""

    kind: Literal["pixart_sigma"] = "pixart_sigma"  # type: ignore[assignment]
    model_max_length: int = 300
    qk_norm: bool = False  # RMS norm of queries and keys
    kv_compress_sampling: Literal["conv", "ave", "uniform", "uniform_every"] | None = None  # of keys and values
    kv_compress_scale_factor: int = 1  # places along a side (uniform_every: tokens in a row) that become one
    kv_compress_layer: tuple[int, ...] = ()  # blocks that do so, counted from 0

    LIMITS: ClassVar[Limits] = {**PixArtConfig.LIMITS, "kv_compress_scale_factor": (64, "nothing would be left")}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv_compress_scale_factor < 1:
            raise ValueError(f"kv_compress_scale_factor={self.kv_compress_scale_factor}: must be an integer >= 1")
        wrong = [block for block in self.kv_compress_layer if not 0 <= block < self.depth]
        if wrong:
            raise ValueError(f"kv_compress_layer={wrong[0]}: must be blocks from 0 to {self.depth - 1}")

    @property
    def compressed(self) -> frozenset[int]:
        """Blocks that thin out keys and values."""
        is_on = self.kv_compress_sampling is not None and self.kv_compress_scale_factor > 1
        return frozenset(self.kv_compress_layer) if is_on else frozenset()


_ONE_B: dict[str, Any] = {"hidden_size": 1872, "num_heads": 26, "model_max_length": 300}
_DEBUG: dict[str, Any] = {"hidden_size": 72, "depth": 2, "num_heads": 4, "caption_channels": 20, "model_max_length": 8}
SIZES = {
    "xl2": PixArtConfig(),  # PixArt-XL/2
    "1b2": PixArtConfig(**_ONE_B),  # PixArt-1B/2
    "debug": PixArtConfig(**_DEBUG),  # for tests
}
MS_SIZES = {"xl2": PixArtMSConfig(), "debug": PixArtMSConfig(**_DEBUG)}
SIGMA_SIZES = {"xl2": PixArtSigmaConfig(), "debug": PixArtSigmaConfig(**_DEBUG)}
