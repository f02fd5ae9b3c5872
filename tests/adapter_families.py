"""What LoRA files call the layers of each family, written out from the releases and from diffusers' models.

The truth of the tests is in the release's files: its names, its fused layers, its order of rows. What our model and
diffusers' have is made of that here, by hand.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from opensora.models.base import ModelConfig
from opensora.models.families import MODEL_SIZES, build_model
from opensora.utils.rng import torch_generator

Cut = tuple[str, int, int]  # layer of the release, rows of it

_FLUX: dict[str, tuple[str, ...]] = {
    **{"img_in": ("x_embedder",), "txt_in": ("context_embedder",), "final_layer.linear": ("proj_out",)},
    **{
        rf"{ours}\.{layer}": (f"time_text_embed.{theirs}_embedder.{linear}",)
        for ours, theirs in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance"))
        for layer, linear in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
    },
    r"double_blocks\.(\d+)\.img_attn\.qkv": tuple(rf"transformer_blocks.\1.attn.to_{x}" for x in "qkv"),
    r"double_blocks\.(\d+)\.txt_attn\.qkv": tuple(rf"transformer_blocks.\1.attn.add_{x}_proj" for x in "qkv"),
    r"double_blocks\.(\d+)\.img_attn\.proj": (r"transformer_blocks.\1.attn.to_out.0",),
    r"double_blocks\.(\d+)\.txt_attn\.proj": (r"transformer_blocks.\1.attn.to_add_out",),
    r"double_blocks\.(\d+)\.img_mlp\.0": (r"transformer_blocks.\1.ff.net.0.proj",),
    r"double_blocks\.(\d+)\.img_mlp\.2": (r"transformer_blocks.\1.ff.net.2",),
    r"double_blocks\.(\d+)\.txt_mlp\.0": (r"transformer_blocks.\1.ff_context.net.0.proj",),
    r"double_blocks\.(\d+)\.txt_mlp\.2": (r"transformer_blocks.\1.ff_context.net.2",),
    r"double_blocks\.(\d+)\.img_mod\.lin": (r"transformer_blocks.\1.norm1.linear",),
    r"double_blocks\.(\d+)\.txt_mod\.lin": (r"transformer_blocks.\1.norm1_context.linear",),
    r"single_blocks\.(\d+)\.linear1": (
        *(rf"single_transformer_blocks.\1.attn.to_{x}" for x in "qkv"),
        r"single_transformer_blocks.\1.proj_mlp",
    ),
    r"single_blocks\.(\d+)\.linear2": (r"single_transformer_blocks.\1.proj_out",),
    r"single_blocks\.(\d+)\.modulation\.lin": (r"single_transformer_blocks.\1.norm.linear",),
}
_WAN: dict[str, tuple[str, ...]] = {
    "patch_embedding": ("patch_embedding",),
    r"head\.head": ("proj_out",),
    "time_projection.1": ("condition_embedder.time_proj",),
    **{f"text_embedding.{i}": (f"condition_embedder.text_embedder.linear_{j}",) for i, j in ((0, 1), (2, 2))},
    **{f"time_embedding.{i}": (f"condition_embedder.time_embedder.linear_{j}",) for i, j in ((0, 1), (2, 2))},
    "img_emb.proj.1": ("condition_embedder.image_embedder.ff.net.0.proj",),
    "img_emb.proj.3": ("condition_embedder.image_embedder.ff.net.2",),
    **{rf"blocks\.(\d+)\.self_attn\.{x}": (rf"blocks.\1.attn1.to_{x}",) for x in "qkv"},
    **{rf"blocks\.(\d+)\.cross_attn\.{x}": (rf"blocks.\1.attn2.to_{x}",) for x in "qkv"},
    **{rf"blocks\.(\d+)\.cross_attn\.{x}_img": (rf"blocks.\1.attn2.add_{x}_proj",) for x in "kv"},
    r"blocks\.(\d+)\.self_attn\.o": (r"blocks.\1.attn1.to_out.0",),
    r"blocks\.(\d+)\.cross_attn\.o": (r"blocks.\1.attn2.to_out.0",),
    r"blocks\.(\d+)\.ffn\.0": (r"blocks.\1.ffn.net.0.proj",),
    r"blocks\.(\d+)\.ffn\.2": (r"blocks.\1.ffn.net.2",),
}
_HUNYUAN: dict[str, tuple[str, ...]] = {
    r"img_in\.proj": ("x_embedder.proj",),
    r"final_layer\.linear": ("proj_out",),
    r"txt_in\.input_embedder": ("context_embedder.proj_in",),
    **{
        rf"{ours}\.{layer}": (f"{theirs}_embedder.linear_{number}",)
        for ours, theirs, layers in (
            (r"time_in\.mlp", "time_text_embed.timestep", "02"),
            (r"guidance_in\.mlp", "time_text_embed.guidance", "02"),
            ("vector_in", "time_text_embed.text", ("in_layer", "out_layer")),
            (r"txt_in\.t_embedder\.mlp", "context_embedder.time_text_embed.timestep", "02"),
            (r"txt_in\.c_embedder", "context_embedder.time_text_embed.text", ("linear_1", "linear_2")),
        )
        for number, layer in enumerate(layers, 1)
    },
    **{
        rf"txt_in\.individual_token_refiner\.blocks\.(\d+)\.{ours}": tuple(
            rf"context_embedder.token_refiner.refiner_blocks.\1.{part}" for part in theirs
        )
        for ours, theirs in (
            ("self_attn_qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
            ("self_attn_proj", ("attn.to_out.0",)),
            (r"mlp\.fc1", ("ff.net.0.proj",)),
            (r"mlp\.fc2", ("ff.net.2",)),
            (r"adaLN_modulation\.1", ("norm_out.linear",)),
        )
    },
    **{
        rf"double_blocks\.(\d+)\.{ours}": tuple(rf"transformer_blocks.\1.{part}" for part in theirs)
        for ours, theirs in (
            (r"img_mod\.linear", ("norm1.linear",)),
            (r"txt_mod\.linear", ("norm1_context.linear",)),
            ("img_attn_qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
            ("txt_attn_qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
            ("img_attn_proj", ("attn.to_out.0",)),
            ("txt_attn_proj", ("attn.to_add_out",)),
            (r"img_mlp\.fc1", ("ff.net.0.proj",)),
            (r"img_mlp\.fc2", ("ff.net.2",)),
            (r"txt_mlp\.fc1", ("ff_context.net.0.proj",)),
            (r"txt_mlp\.fc2", ("ff_context.net.2",)),
        )
    },
    **{
        rf"single_blocks\.(\d+)\.{ours}": tuple(rf"single_transformer_blocks.\1.{part}" for part in theirs)
        for ours, theirs in (
            (r"modulation\.linear", ("norm.linear",)),
            ("linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
            ("linear2", ("proj_out",)),
        )
    },
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A small model of a family."""

    model: ModelConfig
    theirs: Mapping[str, tuple[str, ...]]  # layer of the release, a pattern -> diffusers' layers that it is cut into
    to_ours: Callable[[str, Tensor], Tensor] = lambda name, weight: weight  # rows of a layer of ours

    @property
    def hidden(self) -> int:
        return self.model.hidden_size  # type: ignore[attr-defined, no-any-return]

    def linears(self) -> dict[str, tuple[int, int]]:
        """Every linear layer -> (outputs, inputs); the release has the same, under the same names."""
        return _linears(self.model)

    def cuts(self, names: str) -> dict[str, tuple[Cut, ...]]:
        """Layers by the names of the release, or of diffusers -> what they are made of."""
        if names == "original":
            return {layer: ((layer, 0, height),) for layer, (height, _) in self.linears().items()}
        found: dict[str, tuple[Cut, ...]] = {}
        for layer, (height, _) in self.linears().items():
            for pattern, parts in self.theirs.items():
                if match := re.fullmatch(pattern, layer):
                    starts = [i * self.hidden for i in range(len(parts))]
                    for part, start, end in zip(parts, starts, [*starts[1:], height], strict=True):
                        found[match.expand(part)] = ((layer, start, end),)
            if layer == "final_layer.adaLN_modulation.1":  # scale first, the release has shift first
                half = height // 2
                found["norm_out.linear"] = ((layer, half, height), (layer, 0, half))
        return found

    def shape(self, cuts: tuple[Cut, ...]) -> tuple[int, int]:
        return sum(stop - start for _, start, stop in cuts), self.linears()[cuts[0][0]][1]

    def weights(self) -> dict[str, Tensor]:
        """Of the release, in fp64."""
        return {
            layer: torch.randn(shape, generator=torch_generator("base", layer), dtype=torch.float64)
            for layer, shape in self.linears().items()
        }

    def ours(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same in our model."""
        return {layer: self.to_ours(layer, weight) for layer, weight in weights.items()}


@cache
def _linears(model: ModelConfig) -> dict[str, tuple[int, int]]:
    with torch.device("meta"):
        built = build_model(model)
    return {n: (m.out_features, m.in_features) for n, m in built.named_modules() if isinstance(m, nn.Linear)}


def _wan_rows(name: str, weight: Tensor) -> Tensor:
    """The release has a token's outputs as (pt, ph, pw, C), we have (C, pt, ph, pw)."""
    if name != "head.head":
        return weight
    return weight.reshape(1, 2, 2, -1, weight.shape[1]).permute(3, 0, 1, 2, 4).reshape(weight.shape)


_SMALL_WAN: Any = MODEL_SIZES["wan"]["debug"]
CASES = {
    "mmdit": Case(model=replace(MODEL_SIZES["mmdit"]["debug"], guidance_embed=True, cond_embed=False), theirs=_FLUX),
    "hunyuan_video": Case(model=MODEL_SIZES["hunyuan_video"]["debug"], theirs=_HUNYUAN),
    "wan": Case(model=_SMALL_WAN, theirs=_WAN, to_ours=_wan_rows),
    "wan_i2v": Case(
        model=replace(_SMALL_WAN, references="clip", image_dim=28, depth=12), theirs=_WAN, to_ours=_wan_rows
    ),
}
