"""Diffusion transformer for latents of stills and clips (DiT, arXiv 2212.09748; with time as in Open-Sora 1.0).

* All tokens of a clip attend to each other, whatever their frames. Where a token is enters once, as sines of its row,
  its column and its frame (``layers/sincos.py``).
* Time and prompt (as one vector) or class make up one vector, which shifts, scales and gates every block. Gates and the
  last layer are zero at the start: an untrained model gives zeros.
* A dropped prompt is a text of the model's own, a dropped class the last row of the table of classes.
* Tokens arrive with their coordinates and meet only in the attention cores, so a process with a share of the tokens
  runs these same lines.

Letters: B batch, N tokens, C latent values of a token, D hidden.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opensora.models.base import AttentionAxis, Denoising, Family, TensorPlan, TokenAxis, Widths, check_widths
from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.dit.config import SIZES, DiTConfig
from opensora.models.layers.adaln_block import AdaLNBlock
from opensora.models.layers.caption import CaptionEmbedder
from opensora.models.layers.embedding import LabelEmbedder, TimestepEmbedder
from opensora.models.layers.init import init_like_dit_
from opensora.models.layers.last_layer import DiTLastLayer
from opensora.models.layers.sincos import sincos, sincos_2d
from opensora.models.layers.stages import RunStages, Stage, run_in_order
from opensora.models.weights.patches import PatchWeights

ZERO = ("*.adaLN_modulation.*", "final_layer.linear.*")  # what starts at zero
NARROW = ("t_embedder.mlp.*", "y_embedder.y_proj.*", "y_embedder.embedding_table.weight")  # with a deviation of 0.02
TOP_LEVEL = (  # of names in files
    *("x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer"),
    *("pos_embed", "pos_embed_spatial", "pos_embed_temporal"),
)


class DiT(nn.Module):
    """Noise (and its variance) of every token."""

    block_lists = ("blocks",)
    attention_cores: ClassVar[Mapping[str, AttentionAxis]] = {"blocks.*.attn.core": "joint"}
    axis_switches: ClassVar[Mapping[str, TokenAxis]] = {}
    tensor_shared = ()

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.cfg = cfg
        hidden, values = cfg.hidden_size, token_values(cfg)
        self.x_embedder = nn.Linear(values, hidden)
        self.t_embedder = TimestepEmbedder(hidden)
        self.y_embedder = prompt_embedder(cfg)
        self.blocks = nn.ModuleList(
            AdaLNBlock(hidden, cfg.num_heads, int(hidden * cfg.mlp_ratio)) for _ in range(cfg.depth)
        )
        self.final_layer = DiTLastLayer(hidden, cfg.outputs * values)
        self.run_stages: RunStages = run_in_order

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        positions: Tensor,
        dropped: Tensor | None = None,
        context: Any = None,
    ) -> Tensor:
        """(B, N, outputs * C), in the dtype of the weights.

        Args:
            x: (B, N, C), noisy latents packed into tokens.
            t: (B,) in [0, 1000).
            y: (B, caption_channels), the prompt; or (B,) int64, its class.
            positions: (B, N, 3), (t, h, w) of every token.
            dropped: (B,) bool, samples that are told nothing.
            context: handed to every attention core untouched.
        """
        dtype = self.x_embedder.weight.dtype
        vector = self.t_embedder(t) + embedded_prompt(self.y_embedder, y, dropped)  # (B, D)
        places = sincos_2d(positions[..., 1], positions[..., 2], self.cfg.hidden_size)
        x = self.x_embedder(x.to(dtype)) + places.to(dtype)
        if not self.cfg.no_temporal_pos_emb:
            x = x + sincos(positions[..., 0], self.cfg.hidden_size).to(dtype)
        stage = Stage(
            self.blocks,
            run=lambda block, s: (block(s[0], vector, context),),
            image=lambda s: s[0],
            modulated=lambda block, s: block.modulated(s[0], vector),  # type: ignore[operator]
        )
        # A 3-D linear may return a view, and hooks that sharding puts on a view are lost when somebody writes to it.
        return self.final_layer(self.run_stages([stage], (x,)), vector).clone()

    def tensor_plan(self) -> TensorPlan:
        """How tensor parallelism cuts the linear layers: {pattern: (kind, parts of (size, unit))}."""
        return adaln_tensor_plan(self.cfg, "blocks")

    @torch.no_grad()
    def init_parameter_(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill ``tensor``, the full value of the parameter called ``name``, in place: see ``init_like_dit_``."""
        init_like_dit_(name, tensor, generator, zero=ZERO, narrow=NARROW)


def token_values(cfg: Any) -> int:
    """Latent values of a token."""
    pt, ph, pw = cfg.patch_size
    return int(cfg.in_channels * pt * ph * pw)


def prompt_embedder(cfg: Any) -> nn.Module:
    """Of a class, or of a prompt that is one vector."""
    if cfg.num_classes:
        return LabelEmbedder(cfg.num_classes, cfg.hidden_size)
    return CaptionEmbedder(cfg.caption_channels, cfg.hidden_size, rows=1)


def embedded_prompt(embedder: nn.Module, y: Tensor, dropped: Tensor | None) -> Tensor:
    """(B,) classes or (B, C) prompts -> (B, D)."""
    if isinstance(embedder, LabelEmbedder):
        return embedder(y, dropped)
    return embedder(y[:, None], dropped)[:, 0]


def adaln_tensor_plan(cfg: Any, blocks: str) -> TensorPlan:
    """Of a model of ``AdaLNBlock``; attention is cut at heads, hidden units anywhere."""
    hidden = cfg.hidden_size
    heads, inner = (hidden, hidden // cfg.num_heads), (int(hidden * cfg.mlp_ratio), 1)
    plan: TensorPlan = {
        f"{blocks}.*.attn.qkv": ("column", (heads, heads, heads)),
        f"{blocks}.*.attn.proj": ("row", (heads,)),
        f"{blocks}.*.mlp.fc1": ("column", (inner,)),
        f"{blocks}.*.mlp.fc2": ("row", (inner,)),
        f"{blocks}.*.adaLN_modulation.1": ("gather", ()),
        "final_layer.adaLN_modulation.1": ("gather", ()),
        "t_embedder.mlp.0": ("column", ((hidden, 1),)),
        "t_embedder.mlp.2": ("row", ((hidden, 1),)),
    }
    if not cfg.num_classes:
        plan["y_embedder.y_proj.fc1"] = ("column", ((hidden, 1),))
        plan["y_embedder.y_proj.fc2"] = ("row", ((hidden, 1),))
    return plan


def describe(cfg: DiTConfig) -> Denoising:
    """What others must know of a model of this shape."""
    return Denoising(
        latent_channels=cfg.in_channels,
        patch=cfg.patch_size,
        width=cfg.hidden_size,
        heads=cfg.num_heads,
        text="none",
        pooled_dim=0 if cfg.num_classes else cfg.caption_channels,
        num_classes=cfg.num_classes,
        outputs=cfg.outputs,
        times="steps",
        null_text="learned",
        reusable=frozenset(("blocks", "modulated")),
    )


def check(cfg: DiTConfig, given: Widths) -> None:
    """That the model reads what it is given.

    Raises:
        ValueError: a width that does not fit, with the one that does.
    """
    told = {} if cfg.num_classes else {"caption_channels": given.pooled}
    check_widths(cfg, in_channels=given.latents, **told)


def arguments(cfg: DiTConfig, tokens: TokenBatch, t: Tensor, conditions: Conditions) -> dict[str, Any]:
    """``DiT.forward``'s own names."""
    return {
        "x": tokens.x,
        "t": t,
        "y": conditions.label if cfg.num_classes else conditions.pooled,
        "positions": tokens.positions,
        "dropped": conditions.dropped,
    }


FAMILY = Family(
    config=DiTConfig,
    model=DiT,
    sizes=SIZES,
    describe=describe,
    check=check,
    arguments=arguments,
    weights=PatchWeights(
        top_level=TOP_LEVEL,
        example_layer="blocks.0.attn.qkv",
        advice="choose the size, patch_size and condition of this file",
    ),
    lora_targets=("blocks.*.attn.*", "blocks.*.mlp.*"),
    objective="iddpm",
    per_job=frozenset(("no_temporal_pos_emb",)),
)
