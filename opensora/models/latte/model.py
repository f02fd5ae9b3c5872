"""Latent diffusion transformer for video that attends in space and in time by turns (Latte, arXiv 2401.03048).

* Blocks are DiT's. In the first, third, ... of them the tokens of a frame attend to each other, in the others the
  frames of a place. Time costs T^2 per place, and space S^2 per frame, in place of (T S)^2.
* Rows and columns enter with the tokens. The table of frames is added in front of the first block along time, and stays
  in the stream from there on: so published weights were trained.
* One vector of time and prompt, or class, modulates all tokens of a sample.

Tokens are frames x places: (B, T, S, C), cut over processes along S; behind a switch to space along T.
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
    space_and_time_pairs,
)
from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.dit import model as dit
from opensora.models.latte.config import SIZES, LatteConfig
from opensora.models.layers.adaln_block import AdaLNBlock
from opensora.models.layers.embedding import TimestepEmbedder
from opensora.models.layers.init import init_like_dit_
from opensora.models.layers.last_layer import DiTLastLayer
from opensora.models.layers.sincos import sincos, sincos_2d
from opensora.models.layers.stages import RunStages, Stage, Streams, run_in_order
from opensora.models.weights.patches import PatchWeights


class Latte(nn.Module):
    """Noise (and its variance) of every token."""

    block_lists = (("spatial_blocks", "temporal_blocks"),)
    attention_cores: ClassVar[Mapping[str, AttentionAxis]] = {
        "spatial_blocks.*.attn.core": "space",
        "temporal_blocks.*.attn.core": "time",
    }
    axis_switches: ClassVar[Mapping[str, TokenAxis]] = {
        "spatial_blocks.*.to_space": "space",
        "spatial_blocks.*.to_time": "time",
    }
    tensor_shared = ()

    def __init__(self, cfg: LatteConfig) -> None:
        super().__init__()
        self.cfg = cfg
        hidden, values, inner = cfg.hidden_size, dit.token_values(cfg), int(cfg.hidden_size * cfg.mlp_ratio)
        self.x_embedder = nn.Linear(values, hidden)
        self.t_embedder = TimestepEmbedder(hidden)
        self.y_embedder = dit.prompt_embedder(cfg)
        spatial, temporal = -(-cfg.depth // 2), cfg.depth // 2
        self.spatial_blocks = nn.ModuleList(AdaLNBlock(hidden, cfg.num_heads, inner, "space") for _ in range(spatial))
        self.temporal_blocks = nn.ModuleList(AdaLNBlock(hidden, cfg.num_heads, inner, "time") for _ in range(temporal))
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
        """(B, T, S, outputs * C), in the dtype of the weights.

        Args:
            x: (B, T, S, C), noisy latents packed into tokens; all frames, the places of this process.
            t: (B,) in [0, 1000).
            y: (B, caption_channels), the prompt; or (B,) int64, its class.
            positions: (B, T, S, 3), (t, h, w) of every token.
            dropped: (B,) bool, samples that are told nothing.
            context: handed to every attention core and axis switch untouched.
        """
        hidden, dtype = self.cfg.hidden_size, self.x_embedder.weight.dtype
        vector = self.t_embedder(t) + dit.embedded_prompt(self.y_embedder, y, dropped)  # (B, D)
        x = self.x_embedder(x.to(dtype)) + sincos_2d(positions[..., 1], positions[..., 2], hidden).to(dtype)
        frames = None if self.cfg.no_temporal_pos_emb else sincos(positions[..., 0], hidden).to(dtype)
        first = self.temporal_blocks[0] if len(self.temporal_blocks) else None

        def run(block: nn.Module, streams: Streams) -> Streams:
            (tokens,) = streams
            if block is first and frames is not None:
                tokens = tokens + frames
            return (block(tokens, vector, context),)

        x = self.run_stages([Stage(self._in_turns(), run=run, image=lambda s: s[0])], (x,))
        return self.final_layer(x, vector).clone()

    def _in_turns(self) -> list[nn.Module]:
        blocks: list[nn.Module] = list(self.spatial_blocks)
        for index, block in enumerate(self.temporal_blocks):
            blocks.insert(2 * index + 1, block)
        return blocks

    def tensor_plan(self) -> TensorPlan:
        """How tensor parallelism cuts the linear layers: {pattern: (kind, parts of (size, unit))}."""
        return dit.adaln_tensor_plan(self.cfg, "*_blocks")

    @torch.no_grad()
    def init_parameter_(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill ``tensor``, the full value of the parameter called ``name``, in place: see ``init_like_dit_``."""
        init_like_dit_(name, tensor, generator, zero=dit.ZERO, narrow=dit.NARROW)


def describe(cfg: LatteConfig) -> Denoising:
    """What others must know of a model of this shape."""
    return Denoising(
        latent_channels=cfg.in_channels,
        patch=cfg.patch_size,
        width=cfg.hidden_size,
        heads=cfg.num_heads,
        token_axes="factored",
        text="none",
        pooled_dim=0 if cfg.num_classes else cfg.caption_channels,
        num_classes=cfg.num_classes,
        outputs=cfg.outputs,
        times="steps",
        null_text="learned",
        reusable=frozenset(("blocks",)),
        attention_pairs=space_and_time_pairs,
    )


def check(cfg: LatteConfig, given: Widths) -> None:
    """That the model reads what it is given; as for DiT."""
    dit.check(cfg, given)


def arguments(cfg: LatteConfig, tokens: TokenBatch, t: Tensor, conditions: Conditions) -> dict[str, Any]:
    """``Latte.forward``'s own names, which are DiT's."""
    return dit.arguments(cfg, tokens, t, conditions)


def to_ours(name: str) -> str:
    """``blocks.N`` of files -> the block of ours that runs as number N."""
    words = name.split(".")
    if words[0] == "blocks" and len(words) > 2 and words[1].isdecimal():
        number = int(words[1])
        kind = "temporal_blocks" if number % 2 else "spatial_blocks"
        return ".".join((kind, str(number // 2), *words[2:]))
    return name


def to_theirs(name: str) -> str:
    """The inverse of ``to_ours``."""
    words = name.split(".")
    if words[0] in ("spatial_blocks", "temporal_blocks") and len(words) > 2 and words[1].isdecimal():
        number = 2 * int(words[1]) + (words[0] == "temporal_blocks")
        return ".".join(("blocks", str(number), *words[2:]))
    return name


FAMILY = Family(
    config=LatteConfig,
    model=Latte,
    sizes=SIZES,
    describe=describe,
    check=check,
    arguments=arguments,
    weights=PatchWeights(
        top_level=(*dit.TOP_LEVEL, "spatial_blocks", "temporal_blocks", "temp_embed"),
        example_layer="spatial_blocks.0.attn.qkv",
        advice="choose the size, patch_size and condition of this file",
        to_ours=to_ours,
        to_theirs=to_theirs,
    ),
    lora_targets=("*_blocks.*.attn.*", "*_blocks.*.mlp.*"),
    objective="iddpm",
    per_job=frozenset(("no_temporal_pos_emb",)),
)
