"""STDiT2: the transformer of Open-Sora 1.1, for clips of any size, length and frame rate.

What differs from STDiT:

* The model is told the size of a clip, its ratio, length and frame rate. Size and ratio are added to the time that
  modulates attention in space and the MLP; length and frame rate to that of attention along time, which has a norm,
  shift, scale and gate of its own. The last layer is told the time alone.
* Frames are told by rotary positions in attention along time, places by sines that are stretched over any size.
* Queries and keys are normalised; in 1.1 after they are rotated (``qk_norm_legacy``, as the published weights want it),
  later before.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opensora.models.base import (
    AttentionAxis,
    Denoising,
    Family,
    TensorPlan,
    TokenAxis,
    Widths,
    check_widths,
    space_and_time_pairs,
)
from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.layers.axis_switch import AxisSwitch
from opensora.models.layers.caption import CaptionEmbedder, for_every_sample
from opensora.models.layers.embedding import SizeEmbedder, TimestepEmbedder
from opensora.models.layers.init import init_like_dit_
from opensora.models.layers.last_layer import PixArtLastLayer
from opensora.models.layers.modulation import modulate
from opensora.models.layers.norm import plain_norm
from opensora.models.layers.rope import RopeTable
from opensora.models.layers.stages import RunStages, Stage, run_in_order
from opensora.models.layers.transformer import CrossAttention, Mlp, SelfAttention, along_time, within_frames
from opensora.models.stdit.config import STDIT2_SIZES, STDiT2Config
from opensora.models.stdit.convert import STDIT2_WEIGHTS
from opensora.models.stdit.freezing import freeze
from opensora.models.stdit.hub import published_config, read_config
from opensora.models.stdit.layers import (
    SHARED_NORMS,
    Modulations,
    RotaryFrequencies,
    known_frames,
    noisy_frames,
    pixel_scale,
    stretched,
    tensor_plan,
    told_fps,
)


class STDiT2Block(nn.Module):
    """Attention within frames, along time, to the text; MLP."""

    def __init__(self, cfg: STDiT2Config) -> None:
        super().__init__()
        width, heads = cfg.hidden_size, cfg.num_heads
        norms: dict[str, bool] = {"qk_norm": cfg.qk_norm}
        self.norm1 = plain_norm(width)
        self.to_space, self.to_time = AxisSwitch(), AxisSwitch()
        self.attn = SelfAttention(width, heads, **norms)
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = plain_norm(width)
        self.mlp = Mlp(width, cfg.inner, width)
        self.norm_temp = plain_norm(width)
        self.attn_temp = SelfAttention(width, heads, **norms, norm_after_rope=cfg.qk_norm_legacy)
        self.scale_shift_table_temporal = nn.Parameter(torch.empty(3, width))

    def forward(
        self,
        x: Tensor,
        times: Modulations,
        times_along: Modulations,
        text: Tensor,
        mask: Tensor | None,
        rope: RopeTable,
        context: Any,
    ) -> Tensor:
        """x (B, T, S, D); ``times`` for attention in space and the MLP, ``times_along`` for attention along time."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = times.rows(self.scale_shift_table)
        h = self.to_space(modulate(self.norm1(x), shift, scale), context)
        x = x + gate * self.to_time(within_frames(self.attn, h, context=context), context)
        shift, scale, gate = times_along.rows(self.scale_shift_table_temporal)
        h = modulate(self.norm_temp(x), shift, scale)
        x = x + gate * along_time(self.attn_temp, h, rope=rope, context=context)
        x = x + self.cross_attn(x, text, mask, context)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class STDiT2(nn.Module):
    """Prediction and its variance for every latent."""

    block_lists = ("blocks",)
    attention_cores: ClassVar[Mapping[str, AttentionAxis]] = {
        "blocks.*.attn.core": "space",
        "blocks.*.attn_temp.core": "time",
        "blocks.*.cross_attn.core": "cross",
    }
    axis_switches: ClassVar[Mapping[str, TokenAxis]] = {"blocks.*.to_space": "space", "blocks.*.to_time": "time"}
    tensor_shared = SHARED_NORMS

    def __init__(self, cfg: STDiT2Config) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.hidden_size
        self.x_embedder = nn.Linear(cfg.token_values, width)
        self.t_embedder = TimestepEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.t_block_temp = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))
        self.y_embedder = CaptionEmbedder(cfg.caption_channels, width, cfg.model_max_length)
        self.rope = RotaryFrequencies(cfg.head_dim)
        self.blocks = nn.ModuleList(STDiT2Block(cfg) for _ in range(cfg.depth))
        self.final_layer = PixArtLastLayer(width, cfg.outputs * cfg.token_values)
        self.csize_embedder = SizeEmbedder(width // 3)
        self.ar_embedder = SizeEmbedder(width // 3)
        self.fl_embedder = SizeEmbedder(width)
        self.fps_embedder = SizeEmbedder(width)
        self.run_stages: RunStages = run_in_order
        freeze(self, cfg.freeze)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        *,
        num_frames: Tensor,
        height: Tensor,
        width: Tensor,
        ar: Tensor,
        fps: Tensor,
        grid: tuple[int, int, int],
        dropped: Tensor | None = None,
        context: Any = None,
    ) -> Tensor:
        """(B, T, S, outputs * C), in the dtype of the weights.

        Args:
            x: (B, T, S, C), positions: (B, T, S, 3); frames whole, places as this process has them.
            timestep: (B,) in [0, 1000).
            y: (B, L, caption_channels), mask: (B, L), 1 for real tokens; fewer rows are repeated.
            x_mask: (B, T) bool, False for frames that are clean.
            num_frames, height, width, ar, fps: (B,) frames and pixels of the clip, height/width, frames per second.
            grid: tokens of the whole clip along (t, h, w).
            dropped: (B,) bool, samples that read the null text.
        """
        known = known_frames(x_mask)
        sizes = self.csize_embedder(torch.stack((height, width), dim=-1))
        of_place = torch.cat((sizes, self.ar_embedder(ar)), dim=-1)  # (B, D)
        of_time = self.fl_embedder(num_frames) + self.fps_embedder(fps)
        noisy = clean = self.t_embedder(timestep)
        if known is not None:
            clean = self.t_embedder(torch.zeros_like(timestep))

        def modulations(block: nn.Module, told: Tensor) -> Modulations:
            if known is None:
                return Modulations(block(noisy + told))
            return Modulations(block(noisy + told), block(clean + told), known)

        times, times_along = modulations(self.t_block, of_place), modulations(self.t_block_temp, of_time)
        text = self.y_embedder(y, dropped)
        text_mask = None if mask is None else for_every_sample(mask, len(text))

        h = self.x_embedder(x.to(self.x_embedder.weight.dtype))
        scale = pixel_scale(height, width, self.cfg.input_sq_size)
        h = h + stretched(positions, grid, scale, self.cfg.hidden_size).to(h.dtype)
        rope = self.rope(torch.arange(x.shape[1], device=x.device)[None])
        stage = Stage(
            self.blocks,
            run=lambda block, s: (block(s[0], times, times_along, text, text_mask, rope, context),),
            image=lambda s: s[0],
        )
        h = self.run_stages([stage], (h,))
        return self.final_layer(h, noisy, clean=clean + of_place, known=known).clone()

    def tensor_plan(self) -> TensorPlan:
        return tensor_plan(self.cfg.hidden_size, self.cfg.inner, self.cfg.head_dim)

    @torch.no_grad()
    def init_parameter_(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Attention along time and to the text, and the last layer, start at zero."""
        if name == "rope.freqs":
            return RotaryFrequencies.fill_(tensor)
        zero = ("*.attn_temp.proj.weight", "*.cross_attn.proj.weight", "final_layer.linear.weight")
        narrow = ("*_embedder.mlp.*", "t_block*", "y_embedder.y_proj.*")
        init_like_dit_(name, tensor, generator, zero=zero, narrow=narrow)


def describe(cfg: STDiT2Config) -> Denoising:
    """What others must know of a model of this shape."""
    return Denoising(
        latent_channels=cfg.in_channels,
        patch=cfg.patch_size,
        pads=True,
        width=cfg.hidden_size,
        heads=cfg.num_heads,
        token_axes="factored",
        text="cross",
        text_dim=cfg.caption_channels,
        outputs=cfg.outputs,
        null_text="learned",
        references="in_place",
        wants=frozenset(("fps", "size", "num_frames")),
        reusable=frozenset(("blocks",)),
        attention_pairs=space_and_time_pairs,
    )


def check(cfg: STDiT2Config, given: Widths) -> None:
    """That the model reads what it is given.

    Raises:
        ValueError: it does not, with what would.
    """
    check_widths(cfg, in_channels=given.latents, caption_channels=given.text)


def arguments(cfg: STDiT2Config, tokens: TokenBatch, t: Tensor, conditions: Conditions) -> dict[str, Any]:
    """``STDiT2.forward``'s own names."""
    told = conditions
    assert told.text is not None and told.size is not None and told.fps is not None and told.num_frames is not None
    height, width = told.size.unbind(-1)
    return {
        "x": tokens.x,
        "positions": tokens.positions,
        "timestep": t,
        "y": told.text,
        "mask": told.text_mask,
        "x_mask": noisy_frames(told.known),
        "num_frames": told.num_frames,
        "height": height,
        "width": width,
        "ar": height / width,
        "fps": told_fps(told.fps, told.num_frames),
        "grid": tokens.grid,
        "dropped": told.dropped,
    }


FAMILY = Family(
    config=STDiT2Config,
    model=STDiT2,
    sizes=STDIT2_SIZES,
    describe=describe,
    check=check,
    arguments=arguments,
    weights=STDIT2_WEIGHTS,
    lora_targets=("blocks.*.attn.*", "blocks.*.attn_temp.*", "blocks.*.cross_attn.*", "blocks.*.mlp.*"),
    objective="iddpm",
    per_job=frozenset(("input_sq_size", "freeze")),
    fitted=frozenset(("model_max_length",)),
    read_hub=read_config,
    hub=published_config,
)
