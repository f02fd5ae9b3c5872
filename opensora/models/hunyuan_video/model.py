"""HunyuanVideo: a multimodal diffusion transformer whose text is refined first (13B, arXiv 2412.03603).

* The blocks are those of Flux: double-stream, then single-stream, text and image in one attention. Published code puts
  image before text, here text is first, as in all sequences that processes share: attention does not depend on it.
* Text tokens attend to each other in the token refiner before they meet the image. That takes all text of a sample on
  every process; behind it each goes on with its part (``context.text``).
* Padding of the text is hidden from every query, by a key mask. A sequence may hold several samples instead, each with
  its own text and no padding.
* Rotary positions are those of image tokens, with a longest period of 256; text is at (0, 0, 0), which rotates nothing.
* Times and guidance come as numbers up to 1000 and 1000 times the scale. In bf16 they would be others: sines are taken
  in fp32, or fp64 for fp64 weights.

Letters: B batch, S samples (B, unless sequences hold several), N image tokens, L text tokens, D hidden.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opensora.models.base import AttentionAxis, Denoising, Family, TensorPlan, TokenAxis, Widths, check_widths
from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.hunyuan_video.config import SIZES, HunyuanVideoConfig
from opensora.models.hunyuan_video.convert import WEIGHTS
from opensora.models.hunyuan_video.hub import diffusers_config, read_config
from opensora.models.hunyuan_video.layers import DoubleBlock, PatchEmbed, SingleBlock
from opensora.models.hunyuan_video.refiner import TokenRefiner
from opensora.models.layers.embedding import MLPEmbedder, TimestepEmbedder
from opensora.models.layers.init import unit_
from opensora.models.layers.joint_blocks import JointLastLayer
from opensora.models.layers.rope import RopeTable, rope_table
from opensora.models.layers.stages import RunStages, Stage, run_in_order

TIMES = 1000.0  # what times in [0, 1] and guidance scales are multiplied by
LORA_TARGETS = (
    *("double_blocks.*.*_attn_qkv", "double_blocks.*.*_attn_proj", "double_blocks.*.*_mlp.*"),
    *("single_blocks.*.linear1", "single_blocks.*.linear2"),
)


class HunyuanVideoModel(nn.Module):
    """Velocity of every image token, given the text tokens."""

    block_lists = ("double_blocks", "single_blocks")
    attention_cores: ClassVar[Mapping[str, AttentionAxis]] = {
        "double_blocks.*.core": "joint",
        "single_blocks.*.core": "joint",
    }
    axis_switches: ClassVar[Mapping[str, TokenAxis]] = {}
    tensor_shared = ("double_blocks.*.*_attn_?_norm.weight", "single_blocks.*.?_norm.weight")

    def __init__(self, cfg: HunyuanVideoConfig) -> None:
        super().__init__()
        self.cfg = cfg
        hidden, (pt, ph, pw) = cfg.hidden_size, cfg.patch_size
        sizes = (hidden, cfg.num_heads, cfg.mlp_hidden)
        values = cfg.in_channels * pt * ph * pw
        self.img_in = PatchEmbed(values, hidden)
        self.txt_in = TokenRefiner(cfg.context_in_dim, hidden, cfg.num_heads, 4 * hidden, cfg.depth_refiner_blocks)
        self.time_in = TimestepEmbedder(hidden)
        self.vector_in = MLPEmbedder(cfg.vec_in_dim, hidden)
        self.guidance_in = TimestepEmbedder(hidden) if cfg.guidance_embed else None
        self.double_blocks = nn.ModuleList(DoubleBlock(*sizes) for _ in range(cfg.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(*sizes) for _ in range(cfg.depth_single_blocks))
        self.final_layer = JointLastLayer(hidden, values)
        self.run_stages: RunStages = run_in_order

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text_states: Tensor,
        text_mask: Tensor | None,
        text_states_2: Tensor,
        guidance: Tensor | None = None,
        *,
        positions: Tensor,
        sample_of: tuple[Tensor, Tensor] | None = None,
        context: Any = None,
    ) -> Tensor:
        """Velocity (B, N, C), in the dtype of the weights.

        Args:
            x: (B, N, C), noisy latents packed into tokens, (c, pt, ph, pw) each.
            t: (S,) in [0, 1000], 1000 is pure noise.
            text_states: (B, L, context_in_dim), on every process the text of whole samples.
            text_mask: (B, L) bool, True for text that is attended to; None: all.
            text_states_2: (S, vec_in_dim), the pooled prompt.
            guidance: (S,), 1000 times the scale, given if and only if ``guidance_embed``.
            positions: (B, N, 3), (t, h, w) of every token.
            sample_of: (B, L) and (B, N) int64, the row of t, text_states_2 and guidance that a token belongs to; None:
                all of sequence b to row b. Given if and only if the context has segments.
            context: handed to every attention core untouched; ``text`` of it, if it has any, are first and end of the
                text tokens that this process goes on with.
        """
        if (sample_of is None) != (getattr(context, "segments", None) is None):
            raise ValueError("sample_of and context.segments belong together: one says what the other keeps apart")
        txt = self.txt_in(text_states, t, text_mask, sample_of and sample_of[0])  # (B, L, D)
        mine = slice(*(getattr(context, "text", None) or (None,)))
        txt, mask = txt[:, mine], None if text_mask is None else text_mask[:, mine]
        rows = None if sample_of is None else (sample_of[0][:, mine], sample_of[1])
        vec = self._vector(t, text_states_2, guidance)
        img = self.img_in(x)
        key_mask = None if mask is None else torch.cat((mask, mask.new_ones(img.shape[:2])), dim=1)  # (B, L + N)
        stages = self._stages(txt.shape[1], vec, self._rope(txt.shape[1], positions), key_mask, context, rows)
        img = self.run_stages(stages, (img, txt))
        # A 3-D linear may return a view, and hooks that sharding puts on a view are lost when somebody writes to it.
        return self.final_layer(img, vec, None if rows is None else rows[1]).clone()

    def _vector(self, t: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        """(S, D), what modulates the blocks.

        Raises:
            ValueError: guidance is missing, or was given to a model that does not read it.
        """
        if (guidance is None) != (self.guidance_in is None):
            raise ValueError(
                f"guidance {'is missing' if guidance is None else 'was given'}, but guidance_embed says not"
            )
        vec = self.time_in(t) + self.vector_in(pooled)
        return vec if self.guidance_in is None else vec + self.guidance_in(guidance)

    def _rope(self, txt_tokens: int, positions: Tensor) -> RopeTable:
        """Of text, at (0, 0, 0), and image."""
        exact = torch.float64 if self.img_in.proj.weight.dtype == torch.float64 else torch.float32
        places = positions.to(exact)
        ids = torch.cat((places.new_zeros(places.shape[0], txt_tokens, 3), places), dim=1)  # (B, L + N, 3)
        return rope_table(ids, self.cfg.axes_dim, self.cfg.theta, "interleaved")

    def _stages(
        self,
        txt_tokens: int,
        vec: Tensor,
        rope: RopeTable,
        key_mask: Tensor | None,
        context: Any,
        rows: tuple[Tensor, Tensor] | None,
    ) -> list[Stage]:
        """The double blocks on (img, txt), then the single blocks on (cat(txt, img),)."""
        joined = None if rows is None else torch.cat(rows, dim=1)  # (B, L + N)
        return [
            Stage(
                self.double_blocks,
                run=lambda block, s: block(s[0], s[1], vec, rope, key_mask, context, rows),
                image=lambda s: s[0],
                modulated=lambda block, s: block.modulated(s[0], vec, rows and rows[1]),  # type: ignore[operator]
            ),
            Stage(
                self.single_blocks,
                run=lambda block, s: (block(s[0], vec, rope, key_mask, context, joined),),
                image=lambda s: s[0][:, txt_tokens:],
                enter=lambda s: (torch.cat((s[1], s[0]), dim=1),),  # (B, L + N, D)
            ),
        ]

    def tensor_plan(self) -> TensorPlan:
        """How tensor parallelism cuts the linear layers: {pattern: (kind, parts of (size, unit))}.

        Parts of heads are cut at heads, parts of hidden units anywhere; what is fused is cut part by part.
        """
        hidden, refiner = self.cfg.hidden_size, "txt_in.individual_token_refiner.blocks.*"
        heads, inner, width = (hidden, self.cfg.head_dim), (self.cfg.mlp_hidden, 1), (hidden, 1)
        return {
            "double_blocks.*.*_attn_qkv": ("column", (heads, heads, heads)),
            "double_blocks.*.*_attn_proj": ("row", (heads,)),
            "double_blocks.*.*_mlp.fc1": ("column", (inner,)),
            "double_blocks.*.*_mlp.fc2": ("row", (inner,)),
            "double_blocks.*.*_mod.linear": ("gather", ()),
            "single_blocks.*.linear1": ("column", (heads, heads, heads, inner)),
            "single_blocks.*.linear2": ("row", (heads, inner)),
            "single_blocks.*.modulation.linear": ("gather", ()),
            f"{refiner}.self_attn_qkv": ("column", (heads, heads, heads)),
            f"{refiner}.self_attn_proj": ("row", (heads,)),
            f"{refiner}.mlp.fc1": ("column", ((4 * hidden, 1),)),
            f"{refiner}.mlp.fc2": ("row", ((4 * hidden, 1),)),
            f"{refiner}.adaLN_modulation.1": ("gather", ()),
            "txt_in.c_embedder.linear_1": ("column", (width,)),
            "txt_in.c_embedder.linear_2": ("row", (width,)),
            "txt_in.t_embedder.mlp.0": ("column", (width,)),
            "txt_in.t_embedder.mlp.2": ("row", (width,)),
            "*_in.mlp.0": ("column", (width,)),
            "*_in.mlp.2": ("row", (width,)),
            "vector_in.in_layer": ("column", (width,)),
            "vector_in.out_layer": ("row", (width,)),
            "final_layer.adaLN_modulation.1": ("gather", ()),
        }

    @torch.no_grad()
    def init_parameter_(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill ``tensor``, the full value of the parameter called ``name``, in place.

        Norms are one; biases, modulations and the last layer zero, so that every block starts as the identity; every
        other matrix as ``unit_`` has it. The generator must be a CPU one.
        """
        if "norm" in name and name.endswith(".weight"):
            tensor.fill_(1.0)
        elif name.endswith(".bias") or name.startswith("final_layer.") or _modulates(name):
            tensor.zero_()
        else:
            unit_(tensor, generator)


def _modulates(name: str) -> bool:
    return name.endswith(("_mod.linear.weight", ".modulation.linear.weight", ".adaLN_modulation.1.weight"))


def describe(cfg: HunyuanVideoConfig) -> Denoising:
    """What others must know of a model of this shape."""
    return Denoising(
        latent_channels=cfg.in_channels,
        patch=cfg.patch_size,
        width=cfg.hidden_size,
        heads=cfg.num_heads,
        cuts_text=True,
        text_dim=cfg.context_in_dim,
        pooled_dim=cfg.vec_in_dim,
        times="unit",
        wants=frozenset(("guidance",) if cfg.guidance_embed else ()),
        packs=True,
        reusable=frozenset(("blocks", "modulated")),
    )


def check(cfg: HunyuanVideoConfig, given: Widths) -> None:
    """That the model reads what it is given.

    Raises:
        ValueError: a width that does not fit, with the one that does.
    """
    check_widths(cfg, in_channels=given.latents, context_in_dim=given.text, vec_in_dim=given.pooled)


def arguments(cfg: HunyuanVideoConfig, tokens: TokenBatch, t: Tensor, conditions: Conditions) -> dict[str, Any]:
    """``HunyuanVideoModel.forward``'s own names."""
    guidance = conditions.guidance if cfg.guidance_embed else None
    assert conditions.pooled is not None, "HunyuanVideo reads text tokens and a pooled prompt"
    return {
        "x": tokens.x,
        "t": t * TIMES,
        "text_states": conditions.text,
        "text_mask": conditions.text_mask,
        "text_states_2": conditions.pooled,
        "guidance": None if guidance is None else guidance * TIMES,
        "positions": tokens.positions,
        "sample_of": tokens.sample_of,
    }


FAMILY = Family(
    config=HunyuanVideoConfig,
    model=HunyuanVideoModel,
    sizes=SIZES,
    describe=describe,
    check=check,
    arguments=arguments,
    weights=WEIGHTS,
    lora_targets=LORA_TARGETS,
    read_hub=read_config,
    diffusers_hub=diffusers_config,
    encoders=("hunyuan", "llava_clip"),
)
