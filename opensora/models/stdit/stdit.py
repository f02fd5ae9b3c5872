"""STDiT: the spatial-temporal transformer of Open-Sora 1.0, PixArt with attention along time in every block.

What is unusual:

* A block attends within each frame, then along time at each place, then to the text. The step along time has no norm
  and no modulation of its own: it reads the stream as it is and is added through the gate of the step in space.
* Positions in time are added to what the first block's step along time reads, and are not kept in the stream.
* One time for a sample, or two: where frames are known (``x_mask``), they are modulated as at time 0, but for the step
  along time.
* Attention along time starts at zero (its last layer does), so the model starts from PixArt's weights as PixArt applied
  to every frame.

Letters: B batch, T frames, S places of a frame, D hidden, L text tokens.
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
from opensora.models.layers.embedding import TimestepEmbedder
from opensora.models.layers.init import init_like_dit_
from opensora.models.layers.last_layer import PixArtLastLayer
from opensora.models.layers.modulation import modulate
from opensora.models.layers.norm import plain_norm
from opensora.models.layers.sincos import scaled, sincos, sincos_2d
from opensora.models.layers.stages import RunStages, Stage, run_in_order
from opensora.models.layers.transformer import CrossAttention, Mlp, SelfAttention, along_time, within_frames
from opensora.models.stdit.config import STDIT_SIZES, STDiTConfig
from opensora.models.stdit.convert import STDIT_WEIGHTS
from opensora.models.stdit.freezing import freeze
from opensora.models.stdit.layers import Modulations, known_frames, noisy_frames, tensor_plan


class STDiTBlock(nn.Module):
    """Attention within frames, along time, to the text; MLP."""

    def __init__(self, cfg: STDiTConfig) -> None:
        super().__init__()
        width, heads = cfg.hidden_size, cfg.num_heads
        self.norm1 = plain_norm(width)
        self.to_space, self.to_time = AxisSwitch(), AxisSwitch()
        self.attn = SelfAttention(width, heads)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = plain_norm(width)
        self.mlp = Mlp(width, cfg.inner, width)
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))
        self.attn_temp = SelfAttention(width, heads)

    def forward(
        self, x: Tensor, times: Modulations, text: Tensor, mask: Tensor | None, frames: Tensor | None, context: Any
    ) -> Tensor:
        """x (B, T, S, D); ``frames`` (1, T, 1, D): positions in time, for the first block."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = times.rows(self.scale_shift_table)
        h = self.to_space(modulate(self.norm1(x), shift, scale), context)
        x = x + gate * self.to_time(within_frames(self.attn, h, context=context), context)
        gate = times.noisy_rows(self.scale_shift_table)[2]
        h = x if frames is None else x + frames
        x = x + gate * along_time(self.attn_temp, h, context=context)
        x = x + self.cross_attn(x, text, mask, context)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class STDiT(nn.Module):
    """Prediction and its variance for every latent."""

    block_lists = ("blocks",)
    attention_cores: ClassVar[Mapping[str, AttentionAxis]] = {
        "blocks.*.attn.core": "space",
        "blocks.*.attn_temp.core": "time",
        "blocks.*.cross_attn.core": "cross",
    }
    axis_switches: ClassVar[Mapping[str, TokenAxis]] = {"blocks.*.to_space": "space", "blocks.*.to_time": "time"}
    tensor_shared = ()

    def __init__(self, cfg: STDiTConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.hidden_size
        self.x_embedder = nn.Linear(cfg.token_values, width)
        self.t_embedder = TimestepEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(cfg.caption_channels, width, cfg.model_max_length)
        self.blocks = nn.ModuleList(STDiTBlock(cfg) for _ in range(cfg.depth))
        self.final_layer = PixArtLastLayer(width, cfg.outputs * cfg.token_values)
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
        dropped: Tensor | None = None,
        context: Any = None,
    ) -> Tensor:
        """(B, T, S, outputs * C), in the dtype of the weights.

        Args:
            x: (B, T, S, C), positions: (B, T, S, 3); frames whole, places as this process has them.
            timestep: (B,) in [0, 1000).
            y: (B, L, caption_channels), mask: (B, L), 1 for real tokens; fewer rows are repeated.
            x_mask: (B, T) bool, False for frames that are clean.
            dropped: (B,) bool, samples that read the null text.
        """
        width, known = self.cfg.hidden_size, known_frames(x_mask)
        vectors = [self.t_embedder(timestep)]
        if known is not None:
            vectors.append(self.t_embedder(torch.zeros_like(timestep)))
        times = Modulations(*(self.t_block(vector) for vector in vectors), *((known,) if known is not None else ()))
        text = self.y_embedder(y, dropped)
        text_mask = None if mask is None else for_every_sample(mask, len(text))

        rows, columns = (scaled(positions[..., dim], self.cfg.space_scale) for dim in (1, 2))
        h = self.x_embedder(x.to(self.x_embedder.weight.dtype))
        h = h + sincos_2d(rows, columns, width).to(h.dtype)
        in_time = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
        frames = sincos(scaled(in_time, self.cfg.time_scale), width)[None, :, None].to(h.dtype)
        first = self.blocks[0]
        stage = Stage(
            self.blocks,
            run=lambda block, s: (block(s[0], times, text, text_mask, frames if block is first else None, context),),
            image=lambda s: s[0],
        )
        h = self.run_stages([stage], (h,))
        return self.final_layer(h, vectors[0], clean=vectors[-1], known=known).clone()

    def tensor_plan(self) -> TensorPlan:
        return tensor_plan(self.cfg.hidden_size, self.cfg.inner, self.cfg.head_dim)

    @torch.no_grad()
    def init_parameter_(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Attention along time and to the text, and the last layer, start at zero."""
        zero = ("*.attn_temp.proj.weight", "*.cross_attn.proj.weight", "final_layer.linear.weight")
        init_like_dit_(name, tensor, generator, zero=zero, narrow=("t_embedder.*", "t_block.*", "y_embedder.y_proj.*"))


def describe(cfg: STDiTConfig) -> Denoising:
    """What others must know of a model of this shape."""
    return Denoising(
        latent_channels=cfg.in_channels,
        patch=cfg.patch_size,
        width=cfg.hidden_size,
        heads=cfg.num_heads,
        token_axes="factored",
        text="cross",
        text_dim=cfg.caption_channels,
        outputs=cfg.outputs,
        null_text="learned",
        references="in_place",
        reusable=frozenset(("blocks",)),
        attention_pairs=space_and_time_pairs,
    )


def check(cfg: STDiTConfig, given: Widths) -> None:
    """That the model reads what it is given.

    Raises:
        ValueError: it does not, with what would.
    """
    check_widths(cfg, in_channels=given.latents, caption_channels=given.text)


def arguments(cfg: STDiTConfig, tokens: TokenBatch, t: Tensor, conditions: Conditions) -> dict[str, Any]:
    """``STDiT.forward``'s own names."""
    assert conditions.text is not None, "STDiT reads text tokens"
    return {
        "x": tokens.x,
        "positions": tokens.positions,
        "timestep": t,
        "y": conditions.text,
        "mask": conditions.text_mask,
        "x_mask": noisy_frames(conditions.known),
        "dropped": conditions.dropped,
    }


FAMILY = Family(
    config=STDiTConfig,
    model=STDiT,
    sizes=STDIT_SIZES,
    describe=describe,
    check=check,
    arguments=arguments,
    weights=STDIT_WEIGHTS,
    lora_targets=("blocks.*.attn.*", "blocks.*.attn_temp.*", "blocks.*.cross_attn.*", "blocks.*.mlp.*"),
    objective="iddpm",
    per_job=frozenset(("space_scale", "time_scale", "freeze")),
    fitted=frozenset(("model_max_length",)),
)
