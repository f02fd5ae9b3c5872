"""PixArt: a diffusion transformer that reads text by cross-attention (PixArt-alpha, arXiv 2310.00426).

* All tokens of a clip attend to each other, then to the text, which has a mask. Text of a frozen encoder is projected
  once. A dropped prompt is the model's own null text, of the length of the prompt and behind the prompt's own mask.
* Time is one vector for all blocks (adaLN-single), to which each adds a table of its own.
* Where a token is enters once, as sines of its row, column and frame. Rows and columns are stretched, so that grids of
  all sizes and shapes cover what the model was trained on: see ``_places``.
* PixArt-MS is told height, width and aspect ratio. PixArt-Sigma may have blocks whose keys and values are of a coarser
  grid; all tokens of a clip then have to be on one process.

Letters: B batch, N tokens, C latent values of a token, L text tokens, D hidden.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opensora.models.base import AttentionAxis, Denoising, Family, TensorPlan, TokenAxis, Widths, check_widths
from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.layers.caption import CaptionEmbedder, for_every_sample
from opensora.models.layers.embedding import SizeEmbedder, TimestepEmbedder
from opensora.models.layers.init import init_like_dit_
from opensora.models.layers.last_layer import PixArtLastLayer
from opensora.models.layers.sincos import base_side, scaled, sincos, sincos_2d
from opensora.models.layers.stages import RunStages, Stage, run_in_order
from opensora.models.pixart.config import (
    MS_SIZES,
    SIGMA_SIZES,
    SIZES,
    PixArtConfig,
    PixArtMSConfig,
    PixArtSigmaConfig,
)
from opensora.models.pixart.layers import PixArtBlock, Sides
from opensora.models.weights.patches import PatchWeights

ZERO = ("*.cross_attn.proj.*", "final_layer.linear.*")  # what starts at zero
NARROW = (  # what starts with a deviation of 0.02
    *("t_embedder.mlp.*", "csize_embedder.mlp.*", "ar_embedder.mlp.*", "t_block.1.weight", "y_embedder.y_proj.*"),
)


class PixArt(nn.Module):
    """Noise (and its variance) of every token, given text tokens."""

    block_lists = ("blocks",)
    attention_cores: ClassVar[Mapping[str, AttentionAxis]] = {
        "blocks.*.attn.core": "joint",
        "blocks.*.cross_attn.core": "cross",
    }
    axis_switches: ClassVar[Mapping[str, TokenAxis]] = {}

    def __init__(self, cfg: PixArtConfig) -> None:
        super().__init__()
        self.cfg = cfg
        hidden, (pt, ph, pw) = cfg.hidden_size, cfg.patch_size
        values = cfg.in_channels * pt * ph * pw
        self.x_embedder = nn.Linear(values, hidden)
        self.t_embedder = TimestepEmbedder(hidden)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))
        self.y_embedder = CaptionEmbedder(cfg.caption_channels, hidden, cfg.model_max_length)
        if isinstance(cfg, PixArtMSConfig):
            self.csize_embedder, self.ar_embedder = SizeEmbedder(hidden // 3), SizeEmbedder(hidden // 3)
        self.blocks = nn.ModuleList(self._block(index) for index in range(cfg.depth))
        self.final_layer = PixArtLastLayer(hidden, cfg.outputs * values)
        self.run_stages: RunStages = run_in_order
        # Norms of queries and keys, but for those of attention that tensor parallelism leaves whole.
        self.tensor_shared = tuple(f"blocks.{index}.attn.?_norm.weight" for index in self._cut_attention())
        if cfg.freeze == "text":
            for name, parameter in self.named_parameters():
                parameter.requires_grad_("cross_attn" not in name and parameter.requires_grad)

    def _block(self, index: int) -> PixArtBlock:
        cfg, more = self.cfg, dict[str, Any]()
        if isinstance(cfg, PixArtSigmaConfig):
            more["qk_norm"] = cfg.qk_norm
            if index in cfg.compressed:
                more |= {"sampling": cfg.kv_compress_sampling, "factor": cfg.kv_compress_scale_factor}
        return PixArtBlock(cfg.hidden_size, cfg.num_heads, int(cfg.hidden_size * cfg.mlp_ratio), **more)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        data_info: Mapping[str, Tensor] | None = None,
        *,
        positions: Tensor,
        grid: Sides | None = None,
        dropped: Tensor | None = None,
        context: Any = None,
    ) -> Tensor:
        """(B, N, outputs * C), in the dtype of the weights.

        Args:
            x: (B, N, C), noisy latents packed into tokens.
            timestep: (B,) in [0, 1000).
            y: (B, L, caption_channels).
            mask: (B, L) bool, True for text that is attended to; None: all. Fewer rows are repeated.
            data_info: of PixArt-MS alone: {"hw": (B, 2) pixels, "ar": (B, 1) height / width}.
            positions: (B, N, 3), (t, h, w) of every token.
            grid: tokens of the whole clip along (t, h, w); None: a square as the model was configured for.
            dropped: (B,) bool, samples whose text is the null text.
            context: handed to every attention core untouched.
        """
        dtype = self.x_embedder.weight.dtype
        time = self.t_embedder(timestep)  # (B, D)
        if isinstance(self.cfg, PixArtMSConfig):
            assert data_info is not None, "PixArt-MS is told the size of its clips"
            time = time + torch.cat((self.csize_embedder(data_info["hw"]), self.ar_embedder(data_info["ar"])), dim=-1)
        vector = self.t_block(time)  # (B, 6 D)
        text = self.y_embedder(y, dropped)
        mask = None if mask is None else for_every_sample(mask, len(y))
        x = self.x_embedder(x.to(dtype)) + self._places(positions, grid).to(dtype)
        if not self.cfg.no_temporal_pos_emb:
            x = x + sincos(scaled(positions[..., 0], self.cfg.time_scale), self.cfg.hidden_size).to(dtype)
        stage = Stage(
            self.blocks,
            run=lambda block, s: (block(s[0], vector, text, mask, grid, context),),
            image=lambda s: s[0],
            modulated=lambda block, s: block.modulated(s[0], vector),  # type: ignore[operator]
        )
        # A 3-D linear may return a view, and hooks that sharding puts on a view are lost when somebody writes to it.
        return self.final_layer(self.run_stages([stage], (x,)), time).clone()

    def _places(self, positions: Tensor, grid: Sides | None) -> Tensor:
        """(B, N, D) fp32 of rows and columns: i / space_scale * base / n on an axis of n tokens, where ``base`` is the
        side of the square that the model was made for."""
        cfg, base, (rows, columns) = self.cfg, None, (1, 1)
        if grid is not None:
            _, rows, columns = grid
            base = self._base(rows * columns)
        h = scaled(positions[..., 1], cfg.space_scale, base, rows)
        w = scaled(positions[..., 2], cfg.space_scale, base, columns)
        return sincos_2d(h, w, cfg.hidden_size)

    def _base(self, places: int) -> int:
        """In tokens."""
        _, ph, pw = self.cfg.patch_size
        if self.cfg.base_size is not None:
            return self.cfg.base_size // ph
        if self.cfg.input_size is not None:
            places = (self.cfg.input_size[1] // ph) * (self.cfg.input_size[2] // pw)
        return base_side(places)

    def _cut_attention(self) -> list[str]:
        """Patterns of the numbers of blocks whose attention tensor parallelism cuts."""
        whole = self.cfg.compressed if isinstance(self.cfg, PixArtSigmaConfig) else frozenset[int]()
        return [str(index) for index in range(self.cfg.depth) if index not in whole] if whole else ["*"]

    def tensor_plan(self) -> TensorPlan:
        """How tensor parallelism cuts the linear layers: {pattern: (kind, parts of (size, unit))}. Attention with
        compressed keys is not cut: the norm of these is over all heads."""
        cfg, hidden = self.cfg, self.cfg.hidden_size
        heads, inner = (hidden, hidden // cfg.num_heads), (int(hidden * cfg.mlp_ratio), 1)
        plan: TensorPlan = {
            **{f"blocks.{index}.attn.qkv": ("column", (heads, heads, heads)) for index in self._cut_attention()},
            **{f"blocks.{index}.attn.proj": ("row", (heads,)) for index in self._cut_attention()},
            "blocks.*.cross_attn.q_linear": ("column", (heads,)),
            "blocks.*.cross_attn.kv_linear": ("column", (heads, heads)),
            "blocks.*.cross_attn.proj": ("row", (heads,)),
            "blocks.*.mlp.fc1": ("column", (inner,)),
            "blocks.*.mlp.fc2": ("row", (inner,)),
            "t_block.1": ("gather", ()),
            "t_embedder.mlp.0": ("column", ((hidden, 1),)),
            "t_embedder.mlp.2": ("row", ((hidden, 1),)),
            "y_embedder.y_proj.fc1": ("column", ((hidden, 1),)),
            "y_embedder.y_proj.fc2": ("row", ((hidden, 1),)),
        }
        return plan

    @torch.no_grad()
    def init_parameter_(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill ``tensor``, the full value of the parameter called ``name``, in place: see ``init_like_dit_``. A
        convolution over keys starts as their average."""
        if name.endswith(".attn.sr.weight"):
            tensor.fill_(1 / tensor[0].numel())
        else:
            init_like_dit_(name, tensor, generator, zero=ZERO, narrow=NARROW)


def describe(cfg: PixArtConfig) -> Denoising:
    """What others must know of a model of this shape."""
    return Denoising(
        latent_channels=cfg.in_channels,
        patch=cfg.patch_size,
        width=cfg.hidden_size,
        heads=cfg.num_heads,
        text="cross",
        text_dim=cfg.caption_channels,
        outputs=cfg.outputs,
        times="steps",
        null_text="learned",
        wants=frozenset(("size",) if isinstance(cfg, PixArtMSConfig) else ()),
        cuts_tokens=not (isinstance(cfg, PixArtSigmaConfig) and cfg.compressed),
        reusable=frozenset(("blocks", "modulated")),
    )


def check(cfg: PixArtConfig, given: Widths) -> None:
    """That the model reads what it is given.

    Raises:
        ValueError: a width that does not fit, with the one that does.
    """
    check_widths(cfg, in_channels=given.latents, caption_channels=given.text)


def arguments(cfg: PixArtConfig, tokens: TokenBatch, t: Tensor, conditions: Conditions) -> dict[str, Any]:
    """``PixArt.forward``'s own names."""
    given: dict[str, Any] = {
        "x": tokens.x,
        "timestep": t,
        "y": conditions.text,
        "mask": conditions.text_mask,
        "positions": tokens.positions,
        "grid": tokens.grid,
        "dropped": conditions.dropped,
    }
    if isinstance(cfg, PixArtMSConfig):
        assert conditions.size is not None, "PixArt-MS is told the size of its clips"
        given["data_info"] = {"hw": conditions.size, "ar": conditions.size[:, :1] / conditions.size[:, 1:]}
    return given


PER_JOB = frozenset(("input_size", "base_size", "space_scale", "time_scale", "no_temporal_pos_emb", "freeze"))


def _family(config: type, sizes: Mapping[str, Any]) -> Family:
    return Family(
        config=config,
        model=PixArt,
        sizes=sizes,
        describe=describe,
        check=check,
        arguments=arguments,
        weights=PatchWeights(
            top_level=(
                *("x_embedder", "t_embedder", "t_block", "y_embedder", "csize_embedder", "ar_embedder", "blocks"),
                *("final_layer", "pos_embed", "pos_embed_temporal"),
            ),
            example_layer="blocks.0.attn.qkv",
            advice="choose the kind, size and keys of the model of this file",
        ),
        lora_targets=("blocks.*.attn.*", "blocks.*.cross_attn.*", "blocks.*.mlp.*"),
        objective="iddpm",
        per_job=PER_JOB,
        fitted=frozenset(("model_max_length",)),
    )


FAMILY = _family(PixArtConfig, SIZES)
MS_FAMILY = _family(PixArtMSConfig, MS_SIZES)
SIGMA_FAMILY = _family(PixArtSigmaConfig, SIGMA_SIZES)
