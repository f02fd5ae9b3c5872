"""Wan 2.1 and 2.2: the diffusion transformer of video that most people train (arXiv 2503.20314).

* All tokens of a clip attend to each other, then to the text, which is whole everywhere. Text is filled up with zeros
  that are attended to: there is no mask.
* Queries and keys are normalised over the channels of all heads at once, not head by head.
* Time is one vector for all blocks, to which each adds a table of its own; the last layer reads it before it is
  projected. With known frames in the place of noise (TI2V-5B) tokens of a sample have two times: theirs is 0.
* I2V reads known frames as channels: a mask and the latents of a clip in which all else is grey. I2V of 2.1 also
  attends to a picture, by keys and values of its own.
* Tokens stay in fp32 between layers, and so do times, modulations and rotary tables (fp64 for fp64 weights). Rotary
  angles are fp64 always, as they were in training.

Letters: B batch, S rows of times, N image tokens, C latent values of a token, L text tokens, K tokens of a picture,
D hidden.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opensora.models.base import AttentionAxis, Denoising, Family, TensorPlan, TokenAxis, Widths, check_widths
from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.layers.embedding import sinusoid
from opensora.models.layers.init import init_like_dit_, normal_
from opensora.models.layers.rope import RopeTable, rope_table
from opensora.models.layers.stages import RunStages, Stage, run_in_order
from opensora.models.wan.config import MASK_CHANNELS, SIZES, WanConfig
from opensora.models.wan.convert import WEIGHTS
from opensora.models.wan.hub import diffusers_config, published_config, read_config
from opensora.models.wan.layers import ImageEmbedder, WanBlock, WanHead, exact_type

TIME_CHANNELS = 256
LONGEST_TIME = 1000.0  # that forward takes for pure noise
THETA = 10000.0  # longest rotary period
NORMS = (".norm_q.", ".norm_k.", ".norm_k_img.", ".norm3.", "img_emb.proj.0.", "img_emb.proj.4.")
NARROW = ("text_embedding.*.weight", "time_embedding.*.weight")  # what starts with a deviation of 0.02


class WanModel(nn.Module):
    """Velocity of every token, given text tokens, and a picture or known frames where it reads them."""

    block_lists = ("blocks",)
    axis_switches: ClassVar[Mapping[str, TokenAxis]] = {}
    tensor_shared = ()

    def __init__(self, cfg: WanConfig) -> None:
        super().__init__()
        self.cfg = cfg
        hidden = cfg.hidden_size
        self.patch_embedding = nn.Linear(cfg.token_values + cfg.cond_values, hidden)
        self.text_embedding = nn.Sequential(
            nn.Linear(cfg.text_dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, hidden)
        )
        self.time_embedding = nn.Sequential(nn.Linear(TIME_CHANNELS, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))
        reads_image = cfg.image_dim > 0
        self.img_emb = ImageEmbedder(cfg.image_dim, hidden) if reads_image else None
        self.blocks = nn.ModuleList(
            WanBlock(hidden, cfg.num_heads, cfg.ffn_dim, reads_image=reads_image) for _ in range(cfg.depth)
        )
        self.head = WanHead(hidden, cfg.token_values)
        self.run_stages: RunStages = run_in_order
        self.attention_cores: Mapping[str, AttentionAxis] = {
            "blocks.*.self_attn.core": "joint",
            "blocks.*.cross_attn.core": "cross",
            **({"blocks.*.cross_attn.core_img": "cross"} if reads_image else {}),
        }

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor,
        image_tokens: Tensor | None = None,
        cond: Tensor | None = None,
        *,
        positions: Tensor,
        row_of: Tensor | None = None,
        context: Any = None,
    ) -> Tensor:
        """Velocity (B, N, C), in the type of the weights.

        Args:
            x: (B, N, C), noisy latents packed into tokens.
            timestep: (S,) from 0 to 1000, which is pure noise.
            text: (B, L, text_dim), with zeros behind each prompt.
            image_tokens: (B, K, image_dim), given if and only if there is an image_dim.
            cond: (B, N, cond_values), given if and only if there are any: for every token the mask of known frames,
                then their latents, each (channels, pt, ph, pw).
            positions: (B, N, 3), (t, h, w) of every token.
            row_of: (B, N) int64, the row of ``timestep`` that is a token's; None: row b, in sample b.
            context: handed to every attention core untouched.

        Raises:
            ValueError: a picture or known frames are missing, or were given to a model that does not read them.
        """
        self._check_given(image_tokens, cond)
        dtype = self.patch_embedding.weight.dtype
        time = self.time_embedding(sinusoid(timestep.to(exact_type(dtype)), TIME_CHANNELS, scale=1.0).to(dtype))
        vector = self.time_projection(time).unflatten(-1, (6, -1)).to(exact_type(dtype))  # (S, 6, D)
        read = self.text_embedding(text.to(dtype))
        image = None if self.img_emb is None or image_tokens is None else self.img_emb(image_tokens)
        x = self.patch_embedding(x.to(dtype) if cond is None else torch.cat((x.to(dtype), cond.to(dtype)), dim=-1))
        x = x.to(exact_type(dtype), copy=True)  # no view: a compiler would make the first block a graph of its own
        rope = self._rope(positions)
        stage = Stage(
            self.blocks,
            run=lambda block, s: (block(s[0], vector, read, image, rope, row_of, context),),
            image=lambda s: s[0],
            modulated=lambda block, s: block.modulated(s[0], vector, row_of),  # type: ignore[operator]
        )
        # A 3-D linear may return a view, and hooks that sharding puts on a view are lost when somebody writes to it.
        return self.head(self.run_stages([stage], (x,)), time.to(exact_type(dtype)), row_of).clone()

    def _check_given(self, image_tokens: Tensor | None, cond: Tensor | None) -> None:
        for name, given, is_read in (
            ("image_tokens", image_tokens, self.cfg.image_dim > 0),
            ("cond", cond, self.cfg.cond_values > 0),
        ):
            if (given is not None) != is_read:
                what, key = ("is missing", "reads") if is_read else ("was given", "does not read")
                raise ValueError(f"{name} {what}, but a model of this configuration {key} it")

    def _rope(self, positions: Tensor) -> RopeTable:
        table = rope_table(positions.double(), self.cfg.axes_dim, THETA, "interleaved")
        return tuple(part.to(exact_type(self.patch_embedding.weight.dtype)) for part in table)

    def tensor_plan(self) -> TensorPlan:
        """How tensor parallelism cuts the linear layers, and the norms over all heads: {pattern: (kind, parts of (size,
        unit))}."""
        hidden = self.cfg.hidden_size
        heads, units = ((hidden, self.cfg.head_dim),), ((hidden, 1),)
        inner, inner_image = ((self.cfg.ffn_dim, 1),), ((self.cfg.image_dim, 1),)
        plan: TensorPlan = {
            **{f"blocks.*.{kind}_attn.{layer}": ("column", heads) for kind in ("self", "cross") for layer in "qkv"},
            **{f"blocks.*.{kind}_attn.o": ("row", heads) for kind in ("self", "cross")},
            **{f"blocks.*.{kind}_attn.norm_?": ("norm", heads) for kind in ("self", "cross")},
            "blocks.*.ffn.0": ("column", inner),
            "blocks.*.ffn.2": ("row", inner),
            **{f"{name}.0": ("column", units) for name in ("text_embedding", "time_embedding")},
            **{f"{name}.2": ("row", units) for name in ("text_embedding", "time_embedding")},
            "time_projection.1": ("gather", ()),
        }
        if self.cfg.image_dim:
            plan |= {f"blocks.*.cross_attn.{layer}_img": ("column", heads) for layer in "kv"}
            plan |= {"blocks.*.cross_attn.norm_k_img": ("norm", heads)}
            plan |= {"img_emb.proj.1": ("column", inner_image), "img_emb.proj.3": ("row", inner_image)}
        return plan

    @torch.no_grad()
    def init_parameter_(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill ``tensor``, the full value of the parameter called ``name``, in place, as a new model of the family
        starts: norms are the identity, tables of modulations have variance 1 / width, the last layer is zero, biases
        are, all else is Xavier-uniform or narrow."""
        if name.endswith("modulation"):
            normal_(tensor, tensor.shape[-1] ** -0.5, generator)
        elif name.endswith(".weight") and any(norm in name for norm in NORMS):
            tensor.fill_(1.0)
        else:
            init_like_dit_(name, tensor, generator, zero=("head.head.*",), narrow=NARROW)


def describe(cfg: WanConfig) -> Denoising:
    """What others must know of a model of this shape."""
    return Denoising(
        latent_channels=cfg.in_channels,
        patch=cfg.patch_size,
        width=cfg.hidden_size,
        heads=cfg.num_heads,
        text="cross",
        text_dim=cfg.text_dim,
        image_dim=cfg.image_dim,
        times="unit",
        references=cfg.references,
        reusable=frozenset(("blocks", "modulated")),
    )


def check(cfg: WanConfig, given: Widths) -> None:
    """That the model reads what it is given.

    Raises:
        ValueError: a width that does not fit, with the one that does.
    """
    check_widths(cfg, in_channels=given.latents, text_dim=given.text)


def arguments(cfg: WanConfig, tokens: TokenBatch, t: Tensor, conditions: Conditions) -> dict[str, Any]:
    """``WanModel.forward``'s own names. Of text that has a mask, what it hides is zeros; known tokens of a model that
    has them in place of noise are at time 0."""
    text, known = conditions.text, conditions.known
    assert text is not None, "Wan reads text tokens"
    if conditions.text_mask is not None:
        text = text * conditions.text_mask[..., None].to(text.dtype)
    times, row_of = LONGEST_TIME * t, None
    if cfg.references == "in_place" and known is not None:
        samples = torch.arange(len(t), device=known.device)[:, None]
        times, row_of = torch.cat((times, torch.zeros_like(times))), torch.where(known, samples + len(t), samples)
    return {
        "x": tokens.x,
        "timestep": times,
        "text": text,
        "image_tokens": conditions.image_tokens if cfg.image_dim else None,
        "cond": _known_frames(cfg, tokens, conditions) if cfg.references == "clip" else None,
        "positions": tokens.positions,
        "row_of": row_of,
    }


def _known_frames(cfg: WanConfig, tokens: TokenBatch, conditions: Conditions) -> Tensor:
    """(B, N, cond_values); zeros where there is no clip."""
    reference, known = conditions.reference, conditions.known
    if reference is None or known is None:
        return torch.zeros(*tokens.x.shape[:2], cfg.cond_values, device=tokens.x.device)
    mask = known[..., None].expand(*known.shape, MASK_CHANNELS * prod(cfg.patch_size))
    return torch.cat((mask.to(reference), reference), dim=-1)


FAMILY = Family(
    config=WanConfig,
    model=WanModel,
    sizes=SIZES,
    describe=describe,
    check=check,
    arguments=arguments,
    weights=WEIGHTS,
    lora_targets=("blocks.*.self_attn.*", "blocks.*.cross_attn.*", "blocks.*.ffn.*"),
    read_hub=read_config,
    hub=published_config,
    diffusers_hub=diffusers_config,
    encoders=("wan", "wan22", "umt5"),
)
