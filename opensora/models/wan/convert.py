"""Wan weights in files: under the original names, and under those of diffusers.

Names of our parameters are the original ones. Two things differ between our model and every file:

* patches are embedded by a convolution (D, C, pt, ph, pw) there, by a linear layer (D, C pt ph pw) here;
* rows of ``head.head`` are (pt, ph, pw, C) there, (C, pt, ph, pw) here, which is the order of tokens.

diffusers has names of its own for the same tensors. Its ``norm2`` of a block is ``norm3`` elsewhere: the norm of
attention to the text, the only one that has parameters.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Protocol

from opensora.models.weights.format import WeightFormat
from opensora.models.weights.named_layout import DIFFUSERS, LAYOUTS, ORIGINAL, NamedLayout, stated_layout
from opensora.models.weights.names import of_relative
from opensora.models.weights.patches import Patch, channels_first, channels_last
from opensora.models.weights.rows import Shape, Target, height, whole

_EMBEDDER, _HEAD = "patch_embedding.weight", ("head.head.weight", "head.head.bias")
# Layers and tables, original -> diffusers.
_TOP = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_ATTENTION = {
    **{name: f"to_{name}" for name in "qkv"},
    **{"o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"},
}
_IMAGE = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
# Layers that read a picture: adapters of I2V of 2.1 are added to models without them, as other tools do.
_PICTURE = (
    r"(cross_attn[._](norm_)?[kv]_img|img_emb[._]proj[._]\d"
    r"|attn2[._](add_[kv]_proj|norm_added_k)|condition_embedder[._]image_embedder[._].+)$"
)
# How names begin in weights of other models that are built around a Wan.
_RELATIVES = {
    **dict.fromkeys(("vace_blocks.", "vace_patch_embedding."), "Wan VACE"),
    **dict.fromkeys(("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"), "Wan FLF2V"),
    **dict.fromkeys(("ref_conv.", "control_adapter."), "Wan Fun-Control"),
    **dict.fromkeys(("casual_audio_encoder.", "audio_injector."), "Wan S2V"),
    **dict.fromkeys(("face_adapter.", "motion_encoder.", "pose_patch_embedding."), "Wan Animate"),
}
_BLOCK = {
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in (_ATTENTION | _IMAGE).items()},
    **{"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "modulation": "scale_shift_table", "norm3": "norm2"},
}


class _Config(Protocol):
    """What a ``WanConfig`` says of its weights."""

    @property
    def patch_size(self) -> Patch: ...


class WanWeights:
    """The family's ``WeightFormat``."""

    top_level: tuple[str, ...] = (
        *("patch_embedding", "text_embedding", "time_embedding", "time_projection", "img_emb", "blocks", "head"),
        *("condition_embedder", "proj_out", "scale_shift_table"),
    )
    original = ORIGINAL
    diffusers = DIFFUSERS
    layouts: Mapping[str, NamedLayout] = LAYOUTS
    may_lack: tuple[str, ...] = ()
    recomputed: tuple[str, ...] = ()
    torch_keys: tuple[str, ...] | None = None
    advice = "choose the model size of this file, and its references and image_dim"
    example_layer = "blocks.0.self_attn.q"
    exports_original = True  # so that other tools read what we export
    of_some_sizes = _PICTURE
    of_some_widths = r"patch_embedding$"  # which reads a mask and a clip beside the noise, in I2V

    def layout(self, cfg: _Config) -> NamedLayout:
        return NamedLayout(linear=True, patch=cfg.patch_size)

    def detect_layout(self, names: Collection[str], metadata: Mapping[str, str]) -> NamedLayout:
        """By the names, but for our own layout, which is stated."""
        return stated_layout(metadata, diffusers=_are_diffusers(names))

    def targets(self, shapes: Mapping[str, Shape], source: NamedLayout, to: NamedLayout) -> dict[str, Target]:
        names = {name: to_original(name) if source.diffusers else name for name in shapes}
        patch = to.patch or source.patch or _patch_of(shapes)
        found = {}
        for stored, name in names.items():
            target = whole(stored, shapes[stored])
            if source.linear != to.linear:
                target = _as_ours(name, stored, target, patch) if to.linear else _as_files(name, stored, target, patch)
            found[to_diffusers(name) if to.diffusers else name] = target
        return found

    def other_format(self, names: Collection[str]) -> str | None:
        return of_relative(names, _RELATIVES, "Wan T2V, I2V or TI2V")

    def adapter_layout(self, layers: Collection[str], metadata: Mapping[str, str]) -> tuple[NamedLayout, bool]:
        """As for weights; what others write is as in files."""
        return self.detect_layout(layers, metadata), False

    def adapter_targets(
        self, shapes: Mapping[str, Shape], layout: NamedLayout, source: NamedLayout
    ) -> dict[str, Target]:
        """Layers may go by either name; that of patches is a convolution in files."""
        matrices = {n: shape for n, shape in shapes.items() if n.endswith(".weight") and len(shape) == 2}
        found: dict[str, Target] = {}
        for diffusers in (True, False):
            found |= self.targets(matrices, layout, replace(source, diffusers=diffusers))
        return found

    def describe_guess(self, source: NamedLayout, to: NamedLayout) -> str:
        return ""


WEIGHTS: WeightFormat = WanWeights()


def to_diffusers(name: str) -> str:
    """The name that diffusers has for a tensor or a layer; one that is not known stays."""
    return _renamed(name, _TOP, _BLOCK)


def to_original(name: str) -> str:
    """The inverse of ``to_diffusers``."""
    return _renamed(name, *({theirs: ours for ours, theirs in names.items()} for names in (_TOP, _BLOCK)))


def _renamed(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    match = re.match(r"blocks\.\d+\.", name)
    start = match[0] if match else ""
    layer, table = name[len(start) :], block if match else top
    if layer in table:
        return start + table[layer]
    owner, _, kind = layer.rpartition(".")
    return f"{start}{table[owner]}.{kind}" if owner in table else name


def _are_diffusers(names: Collection[str]) -> bool:
    return any(name.startswith(("condition_embedder.", "proj_out")) or ".attn1." in name for name in names)


def _patch_of(shapes: Mapping[str, Shape]) -> Patch:
    """Of the file's convolution."""
    shape = shapes.get(_EMBEDDER, ())
    return (shape[2], shape[3], shape[4]) if len(shape) == 5 and all(shape) else (1, 1, 1)


def _as_ours(name: str, stored: str, target: Target, patch: Patch) -> Target:
    if name == _EMBEDDER and target.shape:
        return whole(stored, target.shape, to=(target.shape[0], math.prod(target.shape[1:])))
    if name in _HEAD:
        return whole(stored, target.shape, order=channels_first(height(target.shape), patch))
    return target


def _as_files(name: str, stored: str, target: Target, patch: Patch) -> Target:
    if name == _EMBEDDER and len(target.shape) == 2:
        return whole(stored, target.shape, to=(target.shape[0], target.shape[1] // math.prod(patch), *patch))
    if name in _HEAD:
        return whole(stored, target.shape, order=channels_last(height(target.shape), patch))
    return target
