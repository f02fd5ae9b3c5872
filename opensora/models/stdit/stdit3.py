"""STDiT3: the transformer of Open-Sora 1.2 and 1.3.

What differs from STDiT2:

* Spatial and temporal blocks in turns, each PixArt's: attention, attention to the text, MLP, with a table of its own.
  One time, with the frame rate in it, modulates all of them and the last layer.
* 1.3 reads known frames beside the noise (``cond_embed``): their latents and a mask are embedded and added to the
  tokens, and these frames read the null text in place of the prompt.
* 1.3 attends along time within windows of places (``kernel_size``), and rotates queries and keys by time, row and
  column in a third of the head each; so do its spatial blocks (``use_spatial_rope``), by row and column.

Which axis must be whole: places in a spatial block, frames in a temporal one, and places and frames where a temporal
block has windows; there places are exchanged for heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
from opensora.models.layers.transformer import Mlp, SelfAttention, along_time, within_frames
from opensora.models.stdit.config import STDIT3_SIZES, STDiT3Config
from opensora.models.stdit.convert import STDIT3_WEIGHTS
from opensora.models.stdit.freezing import train_only
from opensora.models.stdit.hub import published_config, read_config
from opensora.models.stdit.layers import (
    SHARED_NORMS,
    FrameCrossAttention,
    FrameText,
    Modulations,
    RotaryFrequencies,
    WindowAttention,
    known_frames,
    noisy_frames,
    pixel_scale,
    stretched,
    tensor_plan,
    text_rows,
    told_fps,
)
from opensora.models.stdit.windows import pairs as window_pairs
from opensora.utils.tokens import Grid


class STDiT3Block(nn.Module):
    """Attention along an axis, to the text; MLP."""

    def __init__(self, cfg: STDiT3Config, axis: TokenAxis) -> None:
        super().__init__()
        width, heads = cfg.hidden_size, cfg.num_heads
        norms: dict[str, bool] = {"qk_norm": cfg.qk_norm}
        self.axis = axis
        if axis == "space":
            self.to_space, self.to_time = AxisSwitch(), AxisSwitch()
        self.norm1 = plain_norm(width)
        self.attn: SelfAttention
        if axis == "time" and cfg.kernel_size is not None:
            self.attn = WindowAttention(width, heads, cfg.kernel_size, **norms)
        else:
            self.attn = SelfAttention(width, heads, **norms)
        self.cross_attn = FrameCrossAttention(width, heads)
        self.norm2 = plain_norm(width)
        self.mlp = Mlp(width, cfg.inner, width)
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))

    def forward(
        self,
        x: Tensor,
        times: Modulations,
        text: FrameText,
        rope: RopeTable | None,
        grid: tuple[int, int, int],
        context: Any,
    ) -> Tensor:
        """x (B, T, S, D); ``rope``: of the tokens that this block's attention sees."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = times.rows(self.scale_shift_table)
        h = self._attend(modulate(self.norm1(x), shift, scale), rope, grid, context)
        x = x + gate * h
        x = x + self.cross_attn.of_frames(x, text, context)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))

    def _attend(self, h: Tensor, rope: RopeTable | None, grid: tuple[int, int, int], context: Any) -> Tensor:
        if self.axis == "space":
            h = self.to_space(h, context)
            return self.to_time(within_frames(self.attn, h, rope=rope, context=context), context)
        if isinstance(self.attn, WindowAttention):
            assert rope is not None
            return self.attn.in_windows(h, rope, grid, context)
        return along_time(self.attn, h, rope=rope, context=context)


class STDiT3(nn.Module):
    """Prediction and its variance for every latent."""

    tensor_shared = SHARED_NORMS

    def __init__(self, cfg: STDiT3Config) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.hidden_size
        self.x_embedder = nn.Linear(cfg.token_values, width)
        if cfg.cond_embed:
            self.x_embedder_cond = nn.Linear(cfg.token_values, width)
            self.x_embedder_cond_mask = nn.Linear(cfg.token_values, width)
        self.t_embedder = TimestepEmbedder(width)
        self.fps_embedder = SizeEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(cfg.caption_channels, width, cfg.model_max_length)
        self.rope = RotaryFrequencies(cfg.rotary_dim)
        if cfg.use_spatial_rope:
            self.to_space = AxisSwitch()
        self.spatial_blocks = nn.ModuleList(STDiT3Block(cfg, "space") for _ in range(cfg.depth))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(cfg, "time") for _ in range(cfg.depth))
        self.final_layer = PixArtLastLayer(width, cfg.outputs * cfg.token_values)
        self.run_stages: RunStages = run_in_order
        if cfg.skip_temporal:
            train_only(self, lambda name: not name.startswith("temporal_blocks."))
        if cfg.freeze_y_embedder:
            train_only(self, lambda name: not name.startswith("y_embedder."))
        if cfg.only_train_temporal:
            train_only(self, lambda name: name.startswith("temporal_blocks."))

    @property
    def block_lists(self) -> tuple[str | tuple[str, ...], ...]:
        return ("spatial_blocks",) if self.cfg.skip_temporal else (("spatial_blocks", "temporal_blocks"),)

    @property
    def attention_cores(self) -> Mapping[str, AttentionAxis]:
        return {
            "spatial_blocks.*.attn.core": "space",
            "temporal_blocks.*.attn.core": "time" if self.cfg.kernel_size is None else "window",
            "*_blocks.*.cross_attn.core": "cross",
        }

    @property
    def axis_switches(self) -> Mapping[str, TokenAxis]:
        found: dict[str, TokenAxis] = {"spatial_blocks.*.to_space": "space", "spatial_blocks.*.to_time": "time"}
        return found | ({"to_space": "space"} if self.cfg.use_spatial_rope else {})

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | Sequence[int] | None = None,
        x_mask: Tensor | None = None,
        *,
        fps: Tensor,
        height: Tensor,
        width: Tensor,
        grid: tuple[int, int, int],
        dropped: Tensor | None = None,
        cond: Tensor | None = None,
        cond_mask: Tensor | None = None,
        mask_index: Tensor | Sequence[int] | None = None,
        y_null: Tensor | None = None,
        context: Any = None,
    ) -> Tensor:
        """(B, T, S, outputs * C), in the dtype of the weights.

        Args:
            x: (B, T, S, C), positions: (B, T, S, 3); frames whole, places as this process has them.
            timestep: (B,) in [0, 1000).
            y: (B, L, caption_channels); with ``skip_y_embedder`` (B, L, D), or texts end to end, (1, lengths, D).
            mask: (B, L), 1 for real tokens, fewer rows are repeated; or the lengths of texts that are end to end.
            x_mask: (B, T) bool, False for frames that are clean.
            fps, height, width: (B,) frames per second and pixels; the pixels of the first sample count.
            grid: tokens of the whole clip along (t, h, w).
            dropped: (B,) bool, samples that read the null text.
            cond, cond_mask: (B, T, S, C) latents of known frames and ones where they are; zeros elsewhere.
            mask_index: which frames are known, for all samples or as (B, T) bool. None: nothing of ``cond`` is read,
                while with none in the list it is.
            y_null: (B, L, caption_channels), what known frames read in place of y; None: the model's null text.
        """
        known, told = known_frames(x_mask), self.fps_embedder(fps)
        vectors = [self.t_embedder(timestep) + told]
        if known is not None:
            vectors.append(self.t_embedder(torch.zeros_like(timestep)) + told)
        times = Modulations(*(self.t_block(vector) for vector in vectors), *((known,) if known is not None else ()))

        scale = pixel_scale(height, width, self.cfg.input_sq_size)
        h = self.x_embedder(x.to(self.x_embedder.weight.dtype))
        if self.cfg.cond_embed and mask_index is not None:
            assert cond is not None and cond_mask is not None, "known frames come with cond and cond_mask"
            h = h + self.x_embedder_cond(cond.to(h.dtype)) + self.x_embedder_cond_mask(cond_mask.to(h.dtype))
        h = h + stretched(positions, grid, scale, self.cfg.hidden_size).to(h.dtype)
        text = self._text(y, mask, dropped, mask_index if self.cfg.cond_embed else None, y_null, x.shape[:2])
        ropes = {"space": self._spatial_rope(positions, scale, context), "time": self._temporal_rope(positions, scale)}

        turns = zip(self.spatial_blocks, self.temporal_blocks, strict=True)
        stage = Stage(
            self.spatial_blocks if self.cfg.skip_temporal else [block for turn in turns for block in turn],
            run=lambda block, s: (block(s[0], times, text, ropes[block.axis], grid, context),),  # type: ignore[index]
            image=lambda s: s[0],
        )
        h = self.run_stages([stage], (h,))
        return self.final_layer(h, vectors[0], clean=vectors[-1], known=known).clone()

    def _text(
        self,
        y: Tensor,
        mask: Tensor | Sequence[int] | None,
        dropped: Tensor | None,
        mask_index: Tensor | Sequence[int] | None,
        y_null: Tensor | None,
        tokens: torch.Size,
    ) -> FrameText:
        """What cross-attention reads. ``tokens``: samples and frames."""
        y, mask = text_rows(y, mask)
        text = self._projected(y, dropped) if self.cfg.skip_y_embedder else self.y_embedder(y, dropped)
        text_mask = None if mask is None else for_every_sample(mask, len(text))
        if mask_index is None or len(mask_index) == 0:
            return FrameText(text, text_mask)
        given = mask_index
        if not isinstance(given, Tensor):
            given = torch.zeros(tokens, dtype=torch.bool, device=y.device)
            given[:, list(mask_index)] = True
        if y_null is None:
            y_null = self.y_embedder.null(y.shape[1]).expand(len(y), -1, -1)
        return FrameText(text, text_mask, self.y_embedder(y_null), given)

    def _projected(self, y: Tensor, dropped: Tensor | None) -> Tensor:
        """Text that came as wide as the model; that of dropped samples is the null text, which the model projects."""
        text = y.to(self.x_embedder.weight.dtype)
        if dropped is None:
            return text
        null = self.y_embedder(self.y_embedder.null(y.shape[1])[None])
        return torch.where(dropped[:, None, None], null, text)

    def _spatial_rope(self, positions: Tensor, scale: Tensor, context: Any) -> RopeTable | None:
        """Of the tokens of a frame as attention in space has them: by row and column, and time 0."""
        if not self.cfg.use_spatial_rope:
            return None
        frames = self.to_space(positions.to(self.rope.exact), context).flatten(0, 1)  # (B * T, S, 3), all alike
        whole = frames[:1]
        row, column = whole[..., 1] / scale, whole[..., 2] / scale
        return self.rope(torch.zeros_like(row), row, column)

    def _temporal_rope(self, positions: Tensor, scale: Tensor) -> RopeTable:
        """(1, T, ...) by frame; with windows (1, T, S, ...) by frame, row and column, from each window's first on."""
        if self.cfg.kernel_size is None:
            return self.rope(torch.arange(positions.shape[1], device=positions.device)[None])
        (height, width, length), one = self.cfg.kernel_size, positions[:1]
        time = one[..., 0] if length < 0 else one[..., 0] % length
        return self.rope(time, one[..., 1] % height / scale, one[..., 2] % width / scale)

    def tensor_plan(self) -> TensorPlan:
        return tensor_plan(self.cfg.hidden_size, self.cfg.inner, self.cfg.head_dim)

    @torch.no_grad()
    def init_parameter_(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Temporal blocks, the frame rate and known frames start without effect; the last layer does not."""
        if name == "rope.freqs":
            return RotaryFrequencies.fill_(tensor)
        temporal = ("temporal_blocks.*.proj.weight", "temporal_blocks.*.mlp.fc2.weight")
        zero = ("fps_embedder.mlp.2.weight", "x_embedder_cond*", *temporal)
        init_like_dit_(name, tensor, generator, zero=zero, narrow=("fps_embedder.mlp.*",))


def attention_pairs(cfg: STDiT3Config) -> Any:
    """Tokens that meet: T S^2 + S T^2, or T S^2 and those of windows."""
    return _WindowPairs(cfg.kernel_size) if cfg.kernel_size is not None else space_and_time_pairs


@dataclass(frozen=True)
class _WindowPairs:
    window: tuple[int, int, int]

    def __call__(self, grid: Grid) -> int:
        return grid.frames * grid.places**2 + window_pairs(grid.sides, self.window)


def describe(cfg: STDiT3Config) -> Denoising:
    """What others must know of a model of this shape."""
    return Denoising(
        latent_channels=cfg.in_channels,
        patch=cfg.patch_size,
        pads=True,
        width=cfg.hidden_size,
        heads=cfg.num_heads,
        token_axes="factored",
        text="cross",
        text_dim=cfg.hidden_size if cfg.skip_y_embedder else cfg.caption_channels,
        outputs=cfg.outputs,
        null_text="learned",
        references="channels" if cfg.cond_embed else "in_place",
        wants=frozenset(("fps", "size", "num_frames")),
        reusable=frozenset(("blocks",)),
        attention_pairs=attention_pairs(cfg),
    )


def check(cfg: STDiT3Config, given: Widths) -> None:
    """That the model reads what it is given.

    Raises:
        ValueError: it does not, with what would.
    """
    text = "hidden_size" if cfg.skip_y_embedder else "caption_channels"
    check_widths(cfg, in_channels=given.latents, **{text: given.text})


def arguments(cfg: STDiT3Config, tokens: TokenBatch, t: Tensor, conditions: Conditions) -> dict[str, Any]:
    """``STDiT3.forward``'s own names. Known frames are in place of noisy ones, or beside them with ``cond_embed``."""
    told = conditions
    assert told.text is not None and told.size is not None and told.fps is not None and tokens.grid is not None
    height, width = told.size.unbind(-1)
    given = {
        "x": tokens.x,
        "positions": tokens.positions,
        "timestep": t,
        "y": told.text,
        "mask": told.text_mask,
        "fps": told_fps(told.fps, told.num_frames),
        "height": height,
        "width": width,
        "grid": tokens.grid,
        "dropped": told.dropped,
    }
    if not cfg.cond_embed:
        return given | {"x_mask": noisy_frames(told.known)}
    if told.known is None:
        return given
    reference = torch.zeros_like(tokens.x) if told.reference is None else told.reference
    mask = told.known[..., None].expand(tokens.x.shape).to(tokens.x.dtype)
    return given | {"cond": reference, "cond_mask": mask, "mask_index": told.known.any(dim=2)}


FAMILY = Family(
    config=STDiT3Config,
    model=STDiT3,
    sizes=STDIT3_SIZES,
    describe=describe,
    check=check,
    arguments=arguments,
    weights=STDIT3_WEIGHTS,
    lora_targets=("*_blocks.*.attn.*", "*_blocks.*.cross_attn.*", "*_blocks.*.mlp.*"),
    objective="rectified_flow_v1",
    per_job=frozenset(("input_sq_size", "freeze_y_embedder", "only_train_temporal")),
    fitted=frozenset(("model_max_length",)),
    read_hub=read_config,
    hub=published_config,
)
