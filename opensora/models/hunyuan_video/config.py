"""The shape of HunyuanVideo, and the shapes that have names."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from opensora.models.layers.shape_checks import SHAPE_LIMITS, check_rotary_heads, check_sizes
from opensora.utils.limits import Limits


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoConfig:
    """Shape of the model; the defaults are the 13B of HunyuanVideo."""

    kind: Literal["hunyuan_video"] = "hunyuan_video"
    in_channels: int = 16  # of latents
    patch_size: tuple[int, int, int] = (1, 2, 2)  # latents per token along (t, h, w)
    hidden_size: int = 3072
    num_heads: int = 24
    mlp_ratio: float = 4.0
    depth: int = 20  # double-stream blocks
    depth_single_blocks: int = 40
    depth_refiner_blocks: int = 2  # among text tokens, before the other blocks
    axes_dim: tuple[int, int, int] = (16, 56, 56)  # rotary channels for (t, h, w); their sum is the head dim
    theta: int = 256  # longest rotary period
    context_in_dim: int = 4096  # prompt tokens
    vec_in_dim: int = 768  # pooled prompt
    guidance_embed: bool = True  # reads the guidance scale as an input (distilled models)

    LIMITS: ClassVar[Limits] = {
        **{name: SHAPE_LIMITS[name] for name in ("in_channels", "hidden_size", "num_heads", "depth", "mlp_ratio")},
        **dict.fromkeys(("context_in_dim", "vec_in_dim"), SHAPE_LIMITS["hidden_size"]),
        **dict.fromkeys(("depth_single_blocks", "depth_refiner_blocks"), SHAPE_LIMITS["depth"]),
        "theta": (10**9, "the longest period is beyond any clip"),
    }

    def __post_init__(self) -> None:
        check_sizes(self, "depth_single_blocks", "depth_refiner_blocks", "context_in_dim", "vec_in_dim")
        check_rotary_heads(self)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        """Channels inside the MLPs."""
        return int(self.hidden_size * self.mlp_ratio)


SIZES = {
    "debug": HunyuanVideoConfig(  # for tests
        in_channels=4,
        hidden_size=64,
        num_heads=4,
        depth=2,
        depth_single_blocks=2,
        axes_dim=(4, 6, 6),
        context_in_dim=20,
        vec_in_dim=24,
    ),
    "demo": HunyuanVideoConfig(  # learns the rendered shapes on two CPU cores
        in_channels=64,
        patch_size=(1, 1, 1),
        hidden_size=192,
        num_heads=4,
        depth=2,
        depth_single_blocks=4,
        axes_dim=(16, 16, 16),
        context_in_dim=64,
        vec_in_dim=64,
        guidance_embed=False,
    ),
    "13b": HunyuanVideoConfig(),
}
