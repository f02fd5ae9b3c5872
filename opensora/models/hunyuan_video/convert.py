"""HunyuanVideo weights in files: under the original names, and under those of diffusers.

Names of our parameters are the original ones, with the same layers fused. What differs elsewhere:

* patches are embedded by a convolution (D, C, pt, ph, pw) in files, by a linear layer (D, C pt ph pw) here;
* diffusers has q, k, v by themselves, and in single blocks the MLP's inner layer too;
* diffusers has scale before shift in the modulation of the last layer.

ComfyUI's own files (behind ``model.model.``) hold the tensors of the original ones under the names of its layers: those
of Flux, with dots where the original has underscores. They are read, and written by nobody but ComfyUI.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Protocol, TypeAlias

from opensora.models.weights.format import WeightFormat
from opensora.models.weights.named_layout import DIFFUSERS, LAYOUTS, ORIGINAL, NamedLayout, stated_layout
from opensora.models.weights.names import of_relative
from opensora.models.weights.patches import Patch
from opensora.models.weights.rows import Shape, Target, height, joined, whole

_Layers: TypeAlias = Mapping[str, str | tuple[str, ...]]
_PATCHES, _LAST = "img_in.proj.weight", "final_layer.adaLN_modulation.1"
_QKV = tuple(f"attn.to_{part}" for part in "qkv")
_ADDED = tuple(f"attn.add_{part}_proj" for part in "qkv")
_ATTENTIONS = ("img_attn", "txt_attn", "self_attn")
# Layers, original -> diffusers; what is fused -> its parts, in order.
_TOP = {
    "img_in.proj": "x_embedder.proj",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    _LAST: "norm_out.linear",
}
_REFINER: _Layers = {
    **{"norm1": "norm1", "norm2": "norm2", "self_attn_qkv": _QKV, "self_attn_proj": "attn.to_out.0"},
    **{"mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2", "adaLN_modulation.1": "norm_out.linear"},
}
_DOUBLE: _Layers = {
    **{"img_mod.linear": "norm1.linear", "txt_mod.linear": "norm1_context.linear"},
    **{"img_attn_qkv": _QKV, "img_attn_proj": "attn.to_out.0"},
    **{"txt_attn_qkv": _ADDED, "txt_attn_proj": "attn.to_add_out"},
    **{f"img_attn_{part}_norm": f"attn.norm_{part}" for part in "qk"},
    **{f"txt_attn_{part}_norm": f"attn.norm_added_{part}" for part in "qk"},
    **{"img_mlp.fc1": "ff.net.0.proj", "img_mlp.fc2": "ff.net.2"},
    **{"txt_mlp.fc1": "ff_context.net.0.proj", "txt_mlp.fc2": "ff_context.net.2"},
}
_SINGLE: _Layers = {
    **{"modulation.linear": "norm.linear", "linear1": (*_QKV, "proj_mlp"), "linear2": "proj_out"},
    **{f"{part}_norm": f"attn.norm_{part}" for part in "qk"},
}
_BLOCKS: tuple[tuple[str, str, _Layers], ...] = (  # lists of blocks, original and diffusers, and the layers of one
    ("double_blocks", "transformer_blocks", _DOUBLE),
    ("single_blocks", "single_transformer_blocks", _SINGLE),
    ("txt_in.individual_token_refiner.blocks", "context_embedder.token_refiner.refiner_blocks", _REFINER),
)
# How names begin in weights of other models that are built like a HunyuanVideo.
_RELATIVES = {
    **dict.fromkeys(("clean_x_embedder.", "image_projection."), "FramePack"),
    **dict.fromkeys(("byt5_in.", "vision_in.", "cond_type_emb", "context_embedder_2."), "HunyuanVideo 1.5"),
}
# Names that differ, original -> ComfyUI's: at the top, and within blocks of any list.
_COMFYUI_TOP = {
    **{f"{part}.mlp.0": f"{part}.in_layer" for part in ("txt_in.t_embedder", "time_in", "guidance_in")},
    **{f"{part}.mlp.2": f"{part}.out_layer" for part in ("txt_in.t_embedder", "time_in", "guidance_in")},
    **{"txt_in.c_embedder.linear_1": "txt_in.c_embedder.in_layer"},
    **{"txt_in.c_embedder.linear_2": "txt_in.c_embedder.out_layer"},
}
_COMFYUI_BLOCK = {
    **{f"{stream}_mod.linear": f"{stream}_mod.lin" for stream in ("img", "txt")},
    **{f"{attention}_{part}": f"{attention}.{part}" for attention in _ATTENTIONS for part in ("qkv", "proj")},
    **{f"{mlp}.fc1": f"{mlp}.0" for mlp in ("img_mlp", "txt_mlp", "mlp")},
    **{f"{mlp}.fc2": f"{mlp}.2" for mlp in ("img_mlp", "txt_mlp", "mlp")},
    "modulation.linear": "modulation.lin",
}
_COMFYUI_NORM = {  # whole parameters
    **{f"{attention}_q_norm.weight": f"{attention}.norm.query_norm.scale" for attention in _ATTENTIONS[:2]},
    **{f"{attention}_k_norm.weight": f"{attention}.norm.key_norm.scale" for attention in _ATTENTIONS[:2]},
    **{"q_norm.weight": "norm.query_norm.scale", "k_norm.weight": "norm.key_norm.scale"},
}


class _Config(Protocol):
    """What a ``HunyuanVideoConfig`` says of its weights."""

    @property
    def patch_size(self) -> Patch: ...


class HunyuanVideoWeights:
    """The family's ``WeightFormat``."""

    top_level: tuple[str, ...] = (
        *("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "double_blocks", "single_blocks", "final_layer"),
        *("x_embedder", "context_embedder", "time_text_embed", "transformer_blocks", "single_transformer_blocks"),
        *("norm_out", "proj_out"),
    )
    original = ORIGINAL
    diffusers = DIFFUSERS
    layouts: Mapping[str, NamedLayout] = LAYOUTS
    may_lack: tuple[str, ...] = ()
    recomputed: tuple[str, ...] = ()
    torch_keys: tuple[str, ...] | None = ("module", "ema")
    advice = "choose the model size of this file, and its guidance_embed"
    example_layer = "single_blocks.0.linear1"
    exports_original = True  # so that other tools read what we export

    def layout(self, cfg: _Config) -> NamedLayout:
        return NamedLayout(linear=True, patch=cfg.patch_size)

    def detect_layout(self, names: Collection[str], metadata: Mapping[str, str]) -> NamedLayout:
        """By the names, but for our own layout, which is stated."""
        return stated_layout(metadata, diffusers=any(_is_diffusers(name) for name in names))

    def targets(self, shapes: Mapping[str, Shape], source: NamedLayout, to: NamedLayout) -> dict[str, Target]:
        patch = to.patch or source.patch or _patch_of(shapes)
        found = {name: whole(name, shape) for name, shape in shapes.items()}
        if not source.diffusers and not source.linear:
            found = {_published(name, shapes): target for name, target in found.items()}
        if source.diffusers and not to.diffusers:
            found = _to_original(found)
        if source.linear != to.linear:
            name = "x_embedder.proj.weight" if source.diffusers and to.diffusers else _PATCHES
            if name in found:
                found[name] = _embedder(found[name], patch, linear=to.linear)
        return dict(_to_diffusers(found)) if to.diffusers and not source.diffusers else found

    def other_format(self, names: Collection[str]) -> str | None:
        return of_relative(names, _RELATIVES, "HunyuanVideo, text to video")

    def adapter_layout(self, layers: Collection[str], metadata: Mapping[str, str]) -> tuple[NamedLayout, bool]:
        """As for weights; what others write is as in files."""
        return self.detect_layout(layers, metadata), False

    def adapter_targets(
        self, shapes: Mapping[str, Shape], layout: NamedLayout, source: NamedLayout
    ) -> dict[str, Target]:
        """Layers may go by either name, fused or by themselves; that of patches is a convolution in files."""
        matrices = {n: shape for n, shape in shapes.items() if n.endswith(".weight") and len(shape) == 2}
        found: dict[str, Target] = {}
        for diffusers in (True, False):
            found |= self.targets(matrices, layout, replace(source, diffusers=diffusers))
        return found

    def aliases(self, known: Collection[str]) -> dict[str, str]:
        """ComfyUI's names of layers -> the original ones."""
        return {theirs: name for name in known if (theirs := _renamed(name, to_comfyui=True)) != name}

    def describe_guess(self, source: NamedLayout, to: NamedLayout) -> str:
        return ""


WEIGHTS: WeightFormat = HunyuanVideoWeights()


def _published(name: str, names: Collection[str]) -> str:
    """The original name of a parameter that may go by ComfyUI's; of two for one place this stays, and fits no model."""
    layer, dot, kind = name.rpartition(".")
    ours = _renamed(name, to_comfyui=False)
    ours = ours if ours != name else _renamed(layer, to_comfyui=False) + dot + kind
    return name if ours in names else ours


def _renamed(name: str, *, to_comfyui: bool) -> str:
    """A layer, or the scale of a norm, under the other name that it has; others stay."""
    match = next((m for ours, _, _ in _BLOCKS if (m := re.match(rf"{re.escape(ours)}\.\d+\.", name))), None)
    start, table = (match[0], _COMFYUI_BLOCK | _COMFYUI_NORM) if match else ("", _COMFYUI_TOP)
    table = table if to_comfyui else {theirs: ours for ours, theirs in table.items()}
    return start + table.get(name[len(start) :], name[len(start) :])


def _is_diffusers(name: str) -> bool:
    return name.startswith(("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out")) or (
        "transformer_blocks" in name
    )


def _patch_of(shapes: Mapping[str, Shape]) -> Patch:
    """Of the file's convolution."""
    shape = shapes.get(_PATCHES) or shapes.get("x_embedder.proj.weight", ())
    return (shape[2], shape[3], shape[4]) if len(shape) == 5 else (1, 1, 1)


def _embedder(target: Target, patch: Patch, *, linear: bool) -> Target:
    """As a product, or as a convolution; what is neither stays, and fits no model."""
    shape, name = target.shape, target.rows[0].tensor
    if linear:
        return whole(name, shape, to=(shape[0], math.prod(shape[1:]))) if shape else target
    return whole(name, shape, to=(shape[0], shape[1] // math.prod(patch), *patch)) if len(shape) == 2 else target


def _swapped(target: Target) -> Target:
    """The last layer's modulation with its halves in the other order."""
    (rows,), half = target.rows, height(target.shape) // 2
    return replace(target, rows=(rows.part(half, rows.count), rows.part(0, half)))


def _to_diffusers(targets: Mapping[str, Target]) -> Iterator[tuple[str, Target]]:
    for name, target in targets.items():
        layer, _, kind = name.rpartition(".")
        theirs = _theirs(layer)
        if isinstance(theirs, tuple):
            weight = targets.get(f"{layer}.weight")
            cut = _cut(target, len(theirs), weight.shape[1] if weight is not None and len(weight.shape) == 2 else 0)
            if len(cut) != len(theirs):
                yield name, target
            yield from ((f"{part}.{kind}", one) for part, one in zip(theirs, cut, strict=False))
        else:
            yield f"{theirs}.{kind}" if theirs else name, _swapped(target) if layer == _LAST else target


def _cut(target: Target, parts: int, hidden: int) -> list[Target]:
    """A fused layer of q, k, v (and the MLP's inner layer) of ``hidden`` channels each; none: it cannot be cut so."""
    count, (rows,) = height(target.shape), target.rows
    ends = [hidden, 2 * hidden, count if parts == 3 else 3 * hidden, count][:parts]
    starts = [0, *ends[:-1]]
    if not hidden or any(start >= end for start, end in zip(starts, ends, strict=True)):
        return []
    pieces = (rows.part(start, end) for start, end in zip(starts, ends, strict=True))
    return [Target((piece.count, *target.shape[1:]), (piece,)) for piece in pieces]


def _to_original(targets: Mapping[str, Target]) -> dict[str, Target]:
    """Parts of fused layers are joined where all of them are there."""
    found: dict[str, Target] = {}
    for name, target in targets.items():
        layer, _, kind = name.rpartition(".")
        ours, parts = _ours(layer)
        names = [f"{part}.{kind}" for part in parts]
        if not ours or not all(part in targets for part in names):
            found[name] = target
        elif len(parts) == 1:
            found[f"{ours}.{kind}"] = _swapped(target) if ours == _LAST else target
        elif name == names[0]:
            found[f"{ours}.{kind}"] = joined(*(targets[part] for part in names))
    return found


def _theirs(layer: str) -> str | tuple[str, ...]:
    """diffusers' name of a layer, or of its parts; empty: there is none."""
    for ours, theirs, layers in _BLOCKS:
        if match := re.match(rf"{re.escape(ours)}\.(\d+)\.(.+)", layer):
            found, start = layers.get(match[2], ""), f"{theirs}.{match[1]}."
            return tuple(start + part for part in found) if isinstance(found, tuple) else found and start + found
    return _TOP.get(layer, "")


def _ours(layer: str) -> tuple[str, tuple[str, ...]]:
    """(the original name of a layer, or of the one that it is a part of, diffusers' names of all parts); empty: there
    is none."""
    for ours, theirs, layers in _BLOCKS:
        if match := re.match(rf"{re.escape(theirs)}\.(\d+)\.(.+)", layer):
            for name, found in layers.items():
                parts = found if isinstance(found, tuple) else (found,)
                if match[2] in parts:
                    return f"{ours}.{match[1]}.{name}", tuple(f"{theirs}.{match[1]}.{part}" for part in parts)
    return next(((ours, (theirs,)) for ours, theirs in _TOP.items() if theirs == layer), ("", ()))
