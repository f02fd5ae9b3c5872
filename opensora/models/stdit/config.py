"""The shapes of the Open-Sora 1.x models, under the names that the family's configurations and config.json have."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

from opensora.models.layers.shape_checks import SHAPE_LIMITS, check_shape
from opensora.utils.limits import Limits

_SCALES: Limits = {
    "space_scale": (1e6, "all places would be one"),
    "time_scale": (1e6, "all frames would be one"),
    "input_sq_size": (2**20, "no clip is as large"),
}
Freeze = Literal["not_temporal", "text"]


@dataclass(frozen=True, kw_only=True)
class ShapeConfig:
    """What all of them have."""

    in_channels: int = 4  # of latents
    patch_size: tuple[int, int, int] = (1, 2, 2)  # latents per token along (t, h, w)
    hidden_size: int = 1152
    depth: int = 28  # blocks; of STDiT3 spatial and temporal ones each
    num_heads: int = 16
    mlp_ratio: float = 4.0
    caption_channels: int = 4096  # of a text token
    model_max_length: int = 120  # rows of the null text
    pred_sigma: bool = True  # predicts a variance beside every value

    def __post_init__(self) -> None:
        check_shape(self)
        if self.head_dim % 2:
            raise ValueError(
                f"num_heads={self.num_heads}: must leave an even head dim, not hidden_size/num_heads={self.head_dim}"
            )
        for name in ("space_scale", "time_scale", "input_sq_size"):
            if not getattr(self, name, 1) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number > 0")
        if getattr(self, "freeze", None) not in (None, "not_temporal", "text"):
            raise ValueError(f"freeze={self.freeze}: must be one of not_temporal, text, or null")  # type: ignore[attr-defined]

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


@dataclass(frozen=True, kw_only=True)
class STDiTConfig(ShapeConfig):
    """Open-Sora 1.0; the defaults are XL/2."""

    kind: Literal["stdit"] = "stdit"
    space_scale: float = 1.0  # positions in a frame are divided by it: 0.5 for 256 pixels, 1 for 512
    time_scale: float = 1.0  # positions in time are: 1 for 16 frames, 2/3 for 64
    freeze: Freeze | None = None
    # not_temporal: only attention along time is trained; text: attention to the text is not

    LIMITS: ClassVar[Limits] = {**SHAPE_LIMITS, **{name: _SCALES[name] for name in ("space_scale", "time_scale")}}


@dataclass(frozen=True, kw_only=True)
class STDiT2Config(ShapeConfig):
    """Open-Sora 1.1; the defaults are XL/2 as published."""

    kind: Literal["stdit2"] = "stdit2"
    model_max_length: int = 200  # rows of the null text
    input_sq_size: int = 512  # pixels: the side of a square clip whose positions are not scaled
    qk_norm: bool = True  # queries and keys are normalised
    qk_norm_legacy: bool = True  # along time after they are rotated, as the published weights were trained
    freeze: Freeze | None = None
    # not_temporal: only attention along time is trained; text: attention to the text is not

    LIMITS: ClassVar[Limits] = {**SHAPE_LIMITS, "input_sq_size": _SCALES["input_sq_size"]}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % 3:
            raise ValueError(f"hidden_size={self.hidden_size}: must be a multiple of 3, for height, width and ratio")


@dataclass(frozen=True, kw_only=True)
class STDiT3Config(ShapeConfig):
    """Open-Sora 1.2 and 1.3; the defaults are XL/2 of 1.2."""

    kind: Literal["stdit3"] = "stdit3"
    model_max_length: int = 300  # rows of the null text
    input_sq_size: int = 512  # pixels: the side of a square clip whose positions are not scaled
    qk_norm: bool = True  # queries and keys are normalised, before they are rotated
    kernel_size: tuple[int, int, int] | None = None  # tokens of a window of temporal blocks along (h, w, t); t=-1: all
    use_spatial_rope: bool = False  # spatial blocks rotate by row and column
    cond_embed: bool = False  # reads known frames beside the noise (1.3); else they are in its place
    skip_temporal: bool = False  # temporal blocks are kept as they are, and do not run
    skip_y_embedder: bool = False  # text comes as wide as the model, projected before
    freeze_y_embedder: bool = False  # the projection of text is not trained
    only_train_temporal: bool = False  # only temporal blocks are trained

    LIMITS: ClassVar[Limits] = {**SHAPE_LIMITS, "input_sq_size": _SCALES["input_sq_size"]}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_spatial_rope and self.kernel_size is None:
            raise ValueError("use_spatial_rope=true: rotates by thirds of a head, as windows do; set kernel_size too")
        if self.kernel_size is None:
            return
        size = tuple(self.kernel_size)
        if len(size) != 3 or any(not 1 <= side <= 1024 for side in size[:2]) or not (size[2] == -1 or size[2] >= 1):
            raise ValueError(
                f"kernel_size={size}: must be two integers from 1 to 1024 for (h, w), and one >= 1 for t, or -1, which "
                "is all frames"
            )
        if self.head_dim % 6:
            raise ValueError(
                f"num_heads={self.num_heads}: must leave a head dim that is a multiple of 6 where kernel_size is set, "
                f"for time, row and column, not hidden_size/num_heads={self.head_dim}"
            )

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that one axis rotates."""
        return self.head_dim if self.kernel_size is None else self.head_dim // 3


STDIT_SIZES = {
    "xl2": STDiTConfig(),
    "debug": STDiTConfig(hidden_size=64, depth=2, num_heads=4, caption_channels=24, model_max_length=8),  # for tests
}
STDIT2_SIZES = {
    "xl2": STDiT2Config(),
    "debug": STDiT2Config(hidden_size=96, depth=2, num_heads=4, caption_channels=24, model_max_length=8),
}
STDIT3_SIZES = {
    "xl2": STDiT3Config(),
    "3b2": STDiT3Config(hidden_size=1872, num_heads=26),
    "xl2_v1_3": STDiT3Config(in_channels=16, kernel_size=(8, 8, -1), use_spatial_rope=True, cond_embed=True),
    "debug": STDiT3Config(hidden_size=96, depth=2, num_heads=4, caption_channels=24, model_max_length=8),
    "debug_v1_3": STDiT3Config(
        hidden_size=96,
        depth=2,
        num_heads=4,
        caption_channels=24,
        model_max_length=8,
        kernel_size=(2, 3, -1),
        use_spatial_rope=True,
        cond_embed=True,
    ),
}
