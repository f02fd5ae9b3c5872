"""The shape of an MMDiT, and the shapes that have names."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from opensora.models.layers.shape_checks import check_rotary_heads
from opensora.utils.limits import Limits

_WIDTH = (2**17, "no device multiplies wider matrices")


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """Shape of the model; the defaults are the 11B of Open-Sora 2."""

    kind: Literal["mmdit"] = "mmdit"
    in_channels: int = 64  # per token: patch_size^2 * latent channels
    out_channels: int | None = None  # per token; None: as in_channels
    patch_size: int = 2  # latents per token side, for the mask channels of cond
    vec_in_dim: int = 768  # pooled prompt
    context_in_dim: int = 4096  # prompt tokens
    hidden_size: int = 3072
    num_heads: int = 24
    mlp_ratio: float = 4.0
    depth: int = 19  # double-stream blocks
    depth_single_blocks: int = 38
    axes_dim: tuple[int, int, int] = (16, 56, 56)  # rotary channels for (t, h, w); their sum is the head dim
    theta: int = 10000  # longest rotary period
    qkv_bias: bool = True
    guidance_embed: bool = False  # reads the guidance scale as an input (distilled models)
    cond_embed: bool = True  # reads reference latents and their mask
    fused_qkv: bool = True  # one projection for q, k, v (Flux files) or one each (Open-Sora 2 files)
    rope_layout: Literal["interleaved", "half"] = "interleaved"  # channel pairs: Flux files, Open-Sora 2 files

    LIMITS: ClassVar[Limits] = {
        **dict.fromkeys(("in_channels", "out_channels", "vec_in_dim", "context_in_dim"), _WIDTH),
        **dict.fromkeys(("hidden_size", "num_heads"), _WIDTH),
        **dict.fromkeys(("depth", "depth_single_blocks"), (1000, "every block is built one by one")),
        "patch_size": (64, "a token would span more than a frame"),
        "mlp_ratio": (64.0, "the hidden layer would be wider than any matrix product wants"),
        "theta": (10**9, "the longest period is beyond any clip"),
    }

    def __post_init__(self) -> None:
        self._check_ranges()
        check_rotary_heads(self)
        if self.in_channels % self.patch_size**2:
            raise ValueError(f"in_channels={self.in_channels}: must be a multiple of patch_size^2={self.patch_size**2}")

    def _check_ranges(self) -> None:
        for name in ("in_channels", "patch_size", "vec_in_dim", "context_in_dim", "hidden_size", "num_heads", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be an integer >= 1")
        if self.depth_single_blocks < 0:
            raise ValueError(f"depth_single_blocks={self.depth_single_blocks}: must be an integer >= 0")
        if self.out_channels is not None and self.out_channels < 1:
            raise ValueError(f"out_channels={self.out_channels}: must be an integer >= 1, or null for in_channels")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio={self.mlp_ratio}: must be a number > 0")
        if self.hidden_size * self.mlp_ratio < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio}: leaves no hidden unit of hidden_size={self.hidden_size}")
        for name, allowed in (("kind", ("mmdit",)), ("rope_layout", ("interleaved", "half"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)}: must be one of {', '.join(allowed)}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def cond_channels(self) -> int:
        """Per token: the mask (one channel per latent position) and the reference latents, packed like img."""
        return self.in_channels + self.patch_size**2


SIZES = {
    "debug": MMDiTConfig(  # for tests
        in_channels=16,
        vec_in_dim=24,
        context_in_dim=32,
        hidden_size=64,
        num_heads=4,
        depth=2,
        depth_single_blocks=2,
        axes_dim=(4, 6, 6),
    ),
    "demo": MMDiTConfig(  # learns the rendered shapes on two CPU cores
        in_channels=64,
        patch_size=1,
        vec_in_dim=64,
        context_in_dim=64,
        hidden_size=192,
        num_heads=4,
        depth=2,
        depth_single_blocks=4,
        axes_dim=(16, 16, 16),
        cond_embed=False,
    ),
    "1b": MMDiTConfig(hidden_size=1536, num_heads=12, depth=6, depth_single_blocks=14),
    "3b": MMDiTConfig(hidden_size=2048, num_heads=16, depth=11, depth_single_blocks=22),
    "11b": MMDiTConfig(),
}
