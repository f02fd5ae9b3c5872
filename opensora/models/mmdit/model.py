"""MMDiT: the multimodal diffusion transformer of Open-Sora 2 (11B), weight-compatible with Flux.

What is unusual:

* Text and image tokens attend to each other in every layer; there is no cross-attention. The first ``depth`` blocks
  keep two streams with weights of their own, the following ``depth_single_blocks`` treat both as one.
* Tokens arrive with their coordinates. Packing pixels into tokens, padding and distributing tokens over processes
  happen outside, so a process with a share of the tokens, even with no text or no image token, runs these same lines.
  Tokens meet only in the attention cores (``attention_cores``), whose modules may be replaced.
* A sequence may hold several samples, each with its text, time and prompt. ``sample_of`` then says which sample a token
  is of, and ``context`` keeps them apart in attention; nothing else in the model knows.
* The conditioning vector (time, pooled prompt, guidance) enters by modulation only, zero at the start: an untrained
  block is the identity, and the untrained model returns zeros.
* Inputs are cast to the dtype of the weights where they are used. Times, coordinates and rotary tables stay in fp32
  (fp64 for fp64 weights) whatever the weights are: in bf16 neighbouring times near t=1 are the same number.

Letters: B batch, S samples (B, unless sequences hold several), N image tokens, L text tokens, D hidden, H heads,
Dh head dim.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opensora.models.base import AttentionAxis, Denoising, Family, TensorPlan, TokenAxis, Widths
from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.layers.embedding import MLPEmbedder, sinusoid
from opensora.models.layers.init import unit_
from opensora.models.layers.joint_blocks import JointLastLayer
from opensora.models.layers.rope import RopeTable, rope_table
from opensora.models.layers.stages import RunStages, Stage, run_in_order
from opensora.models.mmdit.config import SIZES, MMDiTConfig
from opensora.models.mmdit.convert import WEIGHTS
from opensora.models.mmdit.layers import DoubleStreamBlock, SingleStreamBlock

TIME_CHANNELS = 256
LORA_TARGETS = ("double_blocks.*.*_attn.*", "double_blocks.*.*_mlp.*", "single_blocks.*.*")


class MMDiTModel(nn.Module):
    """Velocity of every image token, given the text tokens."""

    block_lists = ("double_blocks", "single_blocks")
    attention_cores: ClassVar[Mapping[str, AttentionAxis]] = {
        "double_blocks.*.core": "joint",
        "single_blocks.*.core": "joint",
    }
    axis_switches: ClassVar[Mapping[str, TokenAxis]] = {}
    tensor_shared = ("double_blocks.*.*_attn.norm.*.scale", "single_blocks.*.norm.*.scale")

    def __init__(self, cfg: MMDiTConfig) -> None:
        super().__init__()
        self.cfg = cfg
        hidden, mlp_hidden = cfg.hidden_size, int(cfg.hidden_size * cfg.mlp_ratio)
        self.img_in = nn.Linear(cfg.in_channels, hidden)
        self.time_in = MLPEmbedder(TIME_CHANNELS, hidden)
        self.vector_in = MLPEmbedder(cfg.vec_in_dim, hidden)
        self.guidance_in = MLPEmbedder(TIME_CHANNELS, hidden) if cfg.guidance_embed else None
        self.cond_in = nn.Linear(cfg.cond_channels, hidden) if cfg.cond_embed else None
        self.txt_in = nn.Linear(cfg.context_in_dim, hidden)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(
                hidden,
                cfg.num_heads,
                mlp_hidden,
                qkv_bias=cfg.qkv_bias,
                fused_qkv=cfg.fused_qkv,
                rope_layout=cfg.rope_layout,
                updates_text=cfg.depth_single_blocks > 0 or index < cfg.depth - 1,
            )
            for index in range(cfg.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(
                hidden,
                cfg.num_heads,
                mlp_hidden,
                qkv_bias=cfg.qkv_bias,
                fused_qkv=cfg.fused_qkv,
                rope_layout=cfg.rope_layout,
            )
            for _ in range(cfg.depth_single_blocks)
        )
        self.final_layer = JointLastLayer(hidden, cfg.out_channels or cfg.in_channels)
        self.run_stages: RunStages = run_in_order

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y_vec: Tensor,
        cond: Tensor | None = None,
        guidance: Tensor | None = None,
        *,
        txt_mask: Tensor | None = None,
        sample_of: tuple[Tensor, Tensor] | None = None,
        context: Any = None,
    ) -> Tensor:
        """Velocity (B, N, out_channels), in the dtype of the weights.

        Args:
            img: (B, N, in_channels), noisy latents packed into tokens.
            img_ids: (B, N, 3), their (t, h, w).
            txt: (B, L, context_in_dim).
            txt_ids: (B, L, 3), zeros.
            timesteps: (S,) in [0, 1], 1 is pure noise; fp32.
            y_vec: (S, vec_in_dim), the pooled prompt.
            cond: (B, N, cond_channels), given if and only if ``cond_embed``; zeros where nothing is known.
            guidance: (S,), given if and only if ``guidance_embed``.
            txt_mask: (B, L) bool, True for text that is attended to; None: all.
            sample_of: (B, L) and (B, N) int64, the row of timesteps, y_vec and guidance that a token belongs to; None:
                all of sequence b to row b. Given if and only if the context has segments.
            context: handed to every attention core untouched.
        """
        if (sample_of is None) != (getattr(context, "segments", None) is None):
            raise ValueError("sample_of and context.segments belong together: one says what the other keeps apart")
        img, txt, vec, rope = self.prepare_block_inputs(
            img, img_ids, txt, txt_ids, timesteps, y_vec, cond=cond, guidance=guidance
        )
        key_mask = None  # (B, L + N)
        if txt_mask is not None:
            key_mask = torch.cat((txt_mask, txt_mask.new_ones(img.shape[:2])), dim=1)

        img = self.run_stages(self._stages(txt.shape[1], vec, rope, key_mask, context, sample_of), (img, txt))
        # A 3-D linear may return a view, and hooks that sharding puts on a view are lost when somebody writes to it.
        return self.final_layer(img, vec, None if sample_of is None else sample_of[1]).clone()

    def prepare_block_inputs(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y_vec: Tensor,
        cond: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, RopeTable]:
        """What the first block reads; arguments as those of ``forward``.

        Returns:
            img (B, N, D) and txt (B, L, D), projected to the hidden width; vec (S, D), which modulates; and the rotary
            table of all tokens, text first.

        Raises:
            ValueError: ``cond`` or ``guidance`` is missing, or was given to a model that does not read it.
        """
        for name, given, wanted in (("cond", cond, self.cond_in), ("guidance", guidance, self.guidance_in)):
            if (given is None) != (wanted is None):
                raise ValueError(f"{name} {'is missing' if given is None else 'was given'}, but {name}_embed says not")
        dtype = self.img_in.weight.dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32

        vec = self.time_in(sinusoid(timesteps.to(exact), TIME_CHANNELS)) + self.vector_in(y_vec)  # (S, D)
        if self.guidance_in is not None and guidance is not None:
            vec = vec + self.guidance_in(sinusoid(guidance.to(exact), TIME_CHANNELS))
        img = self.img_in(img.to(dtype))  # (B, N, D)
        if self.cond_in is not None and cond is not None:
            img = img + self.cond_in(cond.to(dtype))
        txt = self.txt_in(txt.to(dtype))  # (B, L, D)
        ids = torch.cat((txt_ids.to(exact), img_ids.to(exact)), dim=1)  # (B, L + N, 3)
        return img, txt, vec, rope_table(ids, self.cfg.axes_dim, self.cfg.theta, self.cfg.rope_layout)

    def _stages(
        self,
        txt_tokens: int,
        vec: Tensor,
        rope: RopeTable,
        key_mask: Tensor | None,
        context: Any,
        sample_of: tuple[Tensor, Tensor] | None,
    ) -> list[Stage]:
        """The double blocks on (img, txt), then the single blocks on (cat(txt, img),)."""
        double = Stage(
            self.double_blocks,
            run=lambda block, s: block(s[0], s[1], vec, rope, key_mask, context, sample_of),
            image=lambda s: s[0],
            modulated=lambda block, s: block.modulated(s[0], vec, sample_of and sample_of[1]),  # type: ignore[operator]
        )
        if not len(self.single_blocks):
            return [double]
        joined = None if sample_of is None else torch.cat(sample_of, dim=1)  # (B, L + N)
        single = Stage(
            self.single_blocks,
            run=lambda block, s: (block(s[0], vec, rope, key_mask, context, joined),),
            image=lambda s: s[0][:, txt_tokens:],
            enter=lambda s: (torch.cat((s[1], s[0]), dim=1),),  # (B, L + N, D)
        )
        return [double, single]

    def tensor_plan(self) -> TensorPlan:
        """How tensor parallelism cuts the linear layers: {pattern: (kind, parts of (size, unit))}.

        Parts of heads are cut at heads, parts of hidden units anywhere; what is fused is cut part by part.
        """
        hidden = self.cfg.hidden_size
        heads, inner = (hidden, self.cfg.head_dim), (int(hidden * self.cfg.mlp_ratio), 1)
        return {
            "double_blocks.*.*_attn.qkv": ("column", (heads, heads, heads)),
            "double_blocks.*.*_attn.?_proj": ("column", (heads,)),
            "double_blocks.*.*_attn.proj": ("row", (heads,)),
            "double_blocks.*.*_mlp.0": ("column", (inner,)),
            "double_blocks.*.*_mlp.2": ("row", (inner,)),
            "double_blocks.*.*_mod.lin": ("gather", ()),
            "single_blocks.*.linear1": ("column", (heads, heads, heads, inner)),
            "single_blocks.*.?_proj": ("column", (heads,)),
            "single_blocks.*.v_mlp": ("column", (heads, inner)),
            "single_blocks.*.linear2": ("row", (heads, inner)),
            "single_blocks.*.modulation.lin": ("gather", ()),
            "*_in.in_layer": ("column", ((hidden, 1),)),
            "*_in.out_layer": ("row", ((hidden, 1),)),
            "final_layer.adaLN_modulation.1": ("gather", ()),
        }

    @torch.no_grad()
    def init_parameter_(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill ``tensor``, the full value of the parameter called ``name``, in place.

        Norm scales are one; biases zero; modulations, ``cond_in`` and the last layer zero, so that every block
        starts as the identity and references start without effect; every other matrix as ``unit_`` has it, which is
        right for embedders of any width too (the usual 0.02 for those is 1/sqrt(fan_in) of a wide model, and makes
        a narrow one deaf to time and prompt). The generator must be a CPU one.
        """
        if name.endswith(".scale"):
            tensor.fill_(1.0)
        elif name.endswith(".bias") or _starts_at_zero(name):
            tensor.zero_()
        else:
            unit_(tensor, generator)


def _starts_at_zero(name: str) -> bool:
    return name.startswith(("cond_in.", "final_layer.")) or name.split(".")[-2] == "lin"


def describe(cfg: MMDiTConfig) -> Denoising:
    """What others must know of a model of this shape."""
    return Denoising(
        latent_channels=cfg.in_channels // cfg.patch_size**2,
        patch=(1, cfg.patch_size, cfg.patch_size),
        width=cfg.hidden_size,
        heads=cfg.num_heads,
        text_dim=cfg.context_in_dim,
        pooled_dim=cfg.vec_in_dim,
        times="unit",
        references="channels" if cfg.cond_embed else "none",
        wants=frozenset(("guidance",) if cfg.guidance_embed else ()),
        packs=True,
        reusable=frozenset(("blocks", "modulated")),
    )


def check(cfg: MMDiTConfig, given: Widths) -> None:
    """That the model reads what it is given.

    Raises:
        ValueError: a width that does not fit, with the one that does. One output channel would be taken for all of
            them without an error.
    """
    assert given.latents.size is not None
    per_token = given.latents.size * cfg.patch_size**2
    if cfg.in_channels != per_token:
        raise ValueError(
            f"in_channels={cfg.in_channels}: {given.latents.key} with model.patch_size={cfg.patch_size} gives "
            f"{per_token} channels per token; set model.in_channels={per_token}"
        )
    if cfg.out_channels not in (None, per_token):
        raise ValueError(
            f"out_channels={cfg.out_channels}: a velocity has the {per_token} channels per token of what it moves; set "
            f"model.out_channels={per_token}, or null"
        )
    for key, width in (("context_in_dim", given.text), ("vec_in_dim", given.pooled)):
        if width.size is not None and getattr(cfg, key) != width.size:
            raise ValueError(f"{key}={getattr(cfg, key)}: {width.key} gives {width.size}; set model.{key}={width.size}")


def arguments(cfg: MMDiTConfig, tokens: TokenBatch, t: Tensor, conditions: Conditions) -> dict[str, Any]:
    """``MMDiTModel.forward``'s own names. Known frames are cat(mask, latents), as the tokens are."""
    text = conditions.text
    assert text is not None and conditions.pooled is not None, "MMDiT reads text tokens and a pooled prompt"
    return {
        "img": tokens.x,
        "img_ids": tokens.positions,
        "txt": text,
        "txt_ids": torch.zeros(*text.shape[:2], 3, device=text.device),
        "timesteps": t,
        "y_vec": conditions.pooled,
        "cond": _known_frames(cfg, tokens, conditions) if cfg.cond_embed else None,
        "guidance": conditions.guidance if cfg.guidance_embed else None,
        "txt_mask": conditions.text_mask,
        "sample_of": tokens.sample_of,
    }


def _known_frames(cfg: MMDiTConfig, tokens: TokenBatch, conditions: Conditions) -> Tensor:
    """(B, N, cond_channels); zeros where nothing is known."""
    reference, known = conditions.reference, conditions.known
    if reference is None or known is None:
        return torch.zeros(*tokens.x.shape[:2], cfg.cond_channels, device=tokens.x.device)
    mask = known[..., None].expand(*known.shape, cfg.patch_size**2)
    return torch.cat((mask.to(reference), reference), dim=-1)


FAMILY = Family(
    config=MMDiTConfig,
    model=MMDiTModel,
    sizes=SIZES,
    describe=describe,
    check=check,
    arguments=arguments,
    weights=WEIGHTS,
    lora_targets=LORA_TARGETS,
    fitted=frozenset(("fused_qkv", "rope_layout")),
    encoders=("hunyuan", "dc_ae", "flux2d", "t5_clip"),
)
