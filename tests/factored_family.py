"""A family that keeps time and space apart, for tests alone: everything that the MMDiT is not.

Spatial and temporal blocks in turns, text by cross-attention, an embedding of its own for no text, clean frames in the
place of noisy ones with a time of their own, a learned variance, sizes and frame rates as conditions. Importing this
file registers it, as a package with a family of its own would.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from opensora.models import families
from opensora.models.base import AttentionAxis, Denoising, Family, TokenAxis, Widths
from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.layers.attention import SDPACore
from opensora.models.layers.axis_switch import AxisSwitch
from opensora.models.layers.embedding import MLPEmbedder, sinusoid
from opensora.models.layers.norm import QKNorm
from opensora.models.layers.rope import RopeTable, apply_rope, rope_table
from opensora.models.layers.stages import RunStages, Stage, run_in_order
from opensora.models.weights.plain import PlainWeights
from opensora.schedulers import register_objective
from opensora.schedulers.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from opensora.utils.limits import Limits
from opensora.utils.tokens import Grid

KIND, OBJECTIVE = "toy_factored", "toy_gaussian_flow"
SINUSOID = 16


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Shape of the model."""

    kind: Literal["toy_factored"] = "toy_factored"
    channels: int = 4  # of latents
    text_dim: int = 12
    width: int = 32
    heads: int = 4
    depth: int = 2  # of each kind of block

    LIMITS: ClassVar[Limits] = {"depth": (1000, "every block is built one by one")}

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(f"width={self.width}: must be a multiple of 4 heads={4 * self.heads}")


class Attention(nn.Module):
    """Along space or time; ``rope`` is for the latter."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = QKNorm(self.head_dim)
        self.core = SDPACore()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: RopeTable | None, context: Any) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = self.norm(q, k)
        if rope is not None:
            q, k = apply_rope(q, rope, "half"), apply_rope(k, rope, "half")
        return self.proj(self.core(q, k, v, context=context).flatten(2))


class CrossAttention(nn.Module):
    """All tokens of a sample over its text."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.core = SDPACore()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None, context: Any) -> Tensor:
        q = self.q(x).flatten(1, 2).unflatten(-1, (-1, self.head_dim))  # (B, T * S, H, Dh)
        k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.kv(text).chunk(2, dim=-1))
        return self.proj(self.core(q, k, v, key_mask=mask, context=context).flatten(2)).unflatten(1, x.shape[1:3])


class Block(nn.Module):
    """Modulated attention along an axis, cross-attention to the text, modulated MLP."""

    def __init__(self, width: int, heads: int, axis: TokenAxis) -> None:
        super().__init__()
        self.axis = axis
        if axis == "space":
            self.to_space, self.to_time = AxisSwitch(), AxisSwitch()
        self.table = nn.Parameter(torch.empty(6, width))
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.cross = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width))

    def forward(
        self,
        x: Tensor,
        times: tuple[Tensor, ...],
        known: Tensor | None,
        text: Tensor,
        mask: Tensor | None,
        rope: RopeTable,
        context: Any,
    ) -> Tensor:
        """x (B, T, S, D); times (B, 6 D) of noisy and, if known is given, of known frames; known (B, T, S) bool."""
        x = x.to(self.table.dtype)
        if self.axis == "space":
            x = self.to_space(x, context)
            known = None if known is None else self.to_space(known, context)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulations(self.table, times, known)
        h = self.norm1(x) * (1 + scale) + shift
        if self.axis == "space":
            h = self.attention(h.flatten(0, 1), None, context).unflatten(0, x.shape[:2])
        else:
            h = self.attention(h.transpose(1, 2).flatten(0, 1), rope, context).unflatten(0, (x.shape[0], x.shape[2]))
            h = h.transpose(1, 2)
        x = x + gate * h
        x = x + self.cross(x, text, mask, context)
        x = x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)
        return self.to_time(x, context) if self.axis == "space" else x


def modulations(table: Tensor, times: tuple[Tensor, ...], known: Tensor | None) -> list[Tensor]:
    """Rows of ``table`` (n, D) plus those of a time: (B, 1, 1, D) each, or (B, T, S, D) where frames are known."""
    rows, *clean = ((table + time.unflatten(-1, table.shape))[:, None, None] for time in times)  # (B, 1, 1, n, D)
    if known is not None:
        rows = torch.where(known[..., None, None], clean[0], rows)
    return list(rows.unbind(-2))


class ToyFactored(nn.Module):
    """Mean and log variance of the velocity of every token."""

    block_lists = (("spatial_blocks", "temporal_blocks"),)
    attention_cores: ClassVar[Mapping[str, AttentionAxis]] = {
        "spatial_blocks.*.attention.core": "space",
        "temporal_blocks.*.attention.core": "time",
        "*_blocks.*.cross.core": "cross",
    }
    axis_switches: ClassVar[Mapping[str, TokenAxis]] = {
        "spatial_blocks.*.to_space": "space",
        "spatial_blocks.*.to_time": "time",
    }
    tensor_shared = ("*_blocks.*.attention.norm.*.scale",)

    def __init__(self, cfg: ToyConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width, values = cfg.width, 4 * cfg.channels
        self.x_in = nn.Linear(values, width)
        self.time_in = MLPEmbedder(SINUSOID, width)
        self.fps_in = MLPEmbedder(SINUSOID, width)
        self.size_in = MLPEmbedder(2 * SINUSOID, width)
        self.time_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.text_in = nn.Sequential(
            nn.Linear(cfg.text_dim, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.null_text = nn.Parameter(torch.empty(cfg.text_dim))
        self.spatial_blocks = nn.ModuleList(Block(width, cfg.heads, "space") for _ in range(cfg.depth))
        self.temporal_blocks = nn.ModuleList(Block(width, cfg.heads, "time") for _ in range(cfg.depth))
        self.final_table = nn.Parameter(torch.empty(2, width))
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.final = nn.Linear(width, 2 * values)
        self.run_stages: RunStages = run_in_order

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        timestep: Tensor,
        y: Tensor,
        y_mask: Tensor | None,
        dropped: Tensor,
        fps: Tensor,
        size: Tensor,
        known: Tensor | None = None,
        *,
        context: Any = None,
    ) -> Tensor:
        """(B, T, S, 2 C): the velocity, and the logarithm of its variance.

        Args:
            x: (B, T, S, C), positions: (B, T, S, 3); frames whole, places as this process has them.
            timestep, fps: (B,); size: (B, 2).
            y: (B, L, text_dim), y_mask: (B, L) bool; whole.
            dropped: (B,) bool, samples without a text.
            known: (B, T, S) bool, tokens that are clean.
        """
        dtype = self.x_in.weight.dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        given = self.fps_in(sinusoid(fps.to(exact), SINUSOID, scale=1.0))
        given = given + self.size_in(torch.cat([sinusoid(s.to(exact), SINUSOID, scale=1.0) for s in size.T], dim=-1))
        both = (timestep,) if known is None else (timestep, torch.zeros_like(timestep))  # of noisy and of known frames
        vectors = tuple(self.time_in(sinusoid(t.to(exact), SINUSOID)) + given for t in both)
        times = tuple(self.time_block(vector) for vector in vectors)
        text = torch.where(dropped[:, None, None], self.null_text, y.to(dtype))
        text = self.text_in(text)
        mask = None if y_mask is None else y_mask | dropped[:, None]
        positions = positions.to(exact)
        h = self.x_in(x.to(dtype)) + self._places(positions).to(dtype)
        along = positions[..., :1].transpose(1, 2).flatten(0, 1)  # (B * S, T, 1)
        rope = rope_table(along, (self.cfg.width // self.cfg.heads,), 100.0, "half")
        pairs = zip(self.spatial_blocks, self.temporal_blocks, strict=True)
        stage = Stage(
            [block for pair in pairs for block in pair],
            run=lambda block, s: (block(s[0], times, known, text, mask, rope, context),),
            image=lambda s: s[0],
        )
        h = self.run_stages([stage], (h,))
        shift, scale = modulations(self.final_table, tuple(vector.repeat(1, 2) for vector in vectors), known)
        return self.final(self.final_norm(h) * (1 + scale) + shift).clone()

    def _places(self, positions: Tensor) -> Tensor:
        """(B, T, S, width): sines and cosines of height and width."""
        quarter = self.cfg.width // 4
        steps = 100.0 ** (-torch.arange(quarter, device=positions.device, dtype=positions.dtype) / quarter)
        angles = (positions[..., 1:, None] * steps).flatten(-2)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)

    def tensor_plan(self) -> dict[str, tuple[str, tuple[tuple[int, int], ...]]]:
        width = self.cfg.width
        heads, inner = (width, width // self.cfg.heads), (2 * width, 1)
        return {
            "*_blocks.*.attention.qkv": ("column", (heads, heads, heads)),
            "*_blocks.*.attention.proj": ("row", (heads,)),
            "*_blocks.*.cross.q": ("column", (heads,)),
            "*_blocks.*.cross.kv": ("column", (heads, heads)),
            "*_blocks.*.cross.proj": ("row", (heads,)),
            "*_blocks.*.mlp.0": ("column", (inner,)),
            "*_blocks.*.mlp.2": ("row", (inner,)),
            "time_block.1": ("gather", ()),
            "*_in.in_layer": ("column", ((width, 1),)),
            "*_in.out_layer": ("row", ((width, 1),)),
        }

    @torch.no_grad()
    def init_parameter_(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        if name.endswith(".scale"):
            tensor.fill_(1.0)
        elif name.endswith((".bias", "table")) or name.startswith("final."):
            tensor.zero_()
        else:
            bound = math.sqrt(3.0 / tensor.shape[-1])
            draw = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
            tensor.copy_(draw.uniform_(-bound, bound, generator=generator))


def pairs(grid: Grid) -> int:
    """T S^2 + S T^2."""
    return grid.frames * grid.places**2 + grid.places * grid.frames**2


def describe(cfg: ToyConfig) -> Denoising:
    return Denoising(
        latent_channels=cfg.channels,
        patch=(1, 2, 2),
        width=cfg.width,
        heads=cfg.heads,
        token_axes="factored",
        text="cross",
        text_dim=cfg.text_dim,
        outputs=2,
        null_text="learned",
        references="in_place",
        wants=frozenset(("fps", "size")),
        reusable=frozenset(("blocks",)),
        attention_pairs=pairs,
    )


def check(cfg: ToyConfig, given: Widths) -> None:
    for key, width in (("channels", given.latents), ("text_dim", given.text)):
        if width.size not in (None, getattr(cfg, key)):
            raise ValueError(f"{key}={getattr(cfg, key)}: {width.key} gives {width.size}; set model.{key}={width.size}")


def arguments(cfg: ToyConfig, tokens: TokenBatch, t: Tensor, conditions: Conditions) -> dict[str, Any]:
    return {
        "x": tokens.x,
        "positions": tokens.positions,
        "timestep": t,
        "y": conditions.text,
        "y_mask": conditions.text_mask,
        "dropped": conditions.dropped,
        "fps": conditions.fps,
        "size": conditions.size,
        "known": conditions.known,
    }


@dataclass(frozen=True, kw_only=True)
class GaussianFlowConfig(RectifiedFlowConfig):
    """Rectified flow with a learned variance."""

    kind: Literal["toy_gaussian_flow"] = "toy_gaussian_flow"  # type: ignore[assignment]


class GaussianFlow(RectifiedFlow):
    """The velocity is normal around the one half of the prediction, with the logarithm of its variance in the other."""

    outputs: ClassVar[int] = 2

    def loss(self, prediction: Tensor, targets: Mapping[str, Tensor], t: Tensor) -> Tensor:
        """Negative log likelihood, but for a constant."""
        target = targets["velocity"]
        exact = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
        mean, log_variance = prediction.to(exact).chunk(2, dim=-1)
        return 0.5 * (log_variance + (mean - target).square() * (-log_variance).exp())


def _parameter_names() -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in ToyFactored(ToyConfig()).named_parameters()]


FAMILY = Family(
    config=ToyConfig,
    model=ToyFactored,
    sizes={"tiny": ToyConfig()},
    describe=describe,
    check=check,
    arguments=arguments,
    weights=PlainWeights(
        top_level=tuple(dict.fromkeys(name.split(".")[0] for name in _parameter_names())),
        example_layer="spatial_blocks.0.attention.qkv",
    ),
    lora_targets=("*_blocks.*.attention.*", "*_blocks.*.cross.*", "*_blocks.*.mlp.*"),
    objective=OBJECTIVE,
)
families.register(KIND, FAMILY)
register_objective(OBJECTIVE, GaussianFlowConfig, GaussianFlow)
