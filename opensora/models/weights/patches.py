"""The format of families whose files hold patches as a convolution, and the last layer with channels last.

DiT, Latte, PixArt and Open-Sora 1.x. Theirs and ours hold the same numbers:

==============================  =====================================  ========================================
                                files of the family                    ours
==============================  =====================================  ========================================
``x_embedder``                  convolution (D, C, [pt,] ph, pw)       linear layer (D, C pt ph pw)
rows of ``final_layer.linear``  (pt, ph, pw, C_out)                    (C_out, pt, ph, pw), as tokens are
``y_embedder.y_embedding``      as long as the texts it was trained    as long as the configuration says: cut, or
                                with                                   its last row repeated
tables of positions             in some files                          computed
==============================  =====================================  ========================================

We write files of the family, which name their layout in the metadata as all of ours do; others are told apart by the
names of the convolution.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from opensora.models.weights.rows import Rows, Shape, Target, height, whole
from opensora.utils.errors import UserError

Patch = tuple[int, int, int]
KEY = "patches"  # of the metadata: linear (ours), convolution (the family's)


@dataclass(frozen=True, kw_only=True)
class PatchLayout:
    """One of the two ways to write the weights."""

    published: bool
    patch: Patch | None = None  # latents per token along (t, h, w); None: as the file's convolution
    null_rows: int | None = None  # length of the null text; None: as it is

    def metadata(self) -> dict[str, str]:
        stated = {"format": "pt", KEY: "convolution" if self.published else "linear"}
        return stated if self.patch is None else stated | {"patch": ",".join(map(str, self.patch))}


PUBLISHED = PatchLayout(published=True)


def _same(name: str) -> str:
    return name


@dataclass(kw_only=True)
class PatchWeights:
    """A ``WeightFormat``; see above."""

    top_level: tuple[str, ...]  # in either layout
    example_layer: str
    advice: str
    embedders: tuple[str, ...] = ("x_embedder",)  # of patches
    to_ours: Callable[[str], str] = _same  # name in files -> ours, where layers are called or counted otherwise
    to_theirs: Callable[[str], str] = _same
    original: PatchLayout = PUBLISHED
    may_lack: tuple[str, ...] = ()
    recomputed: tuple[str, ...] = ("pos_embed", "pos_embed_*", "temp_embed", "y_embedder.uncond_embedding")
    torch_keys: tuple[str, ...] | None = ("ema", "state_dict")
    exports_original: bool = True  # so that the family's own code reads what we export

    def layout(self, cfg: object) -> PatchLayout:
        patch: Patch = tuple(cfg.patch_size)  # type: ignore[attr-defined]
        return PatchLayout(published=False, patch=patch, null_rows=getattr(cfg, "model_max_length", None))

    def detect_layout(self, names: Collection[str], metadata: Mapping[str, str]) -> PatchLayout:
        """By the names of the convolution; patches of our own layout are stated.

        Raises:
            UserError: a stated patch that is none.
        """
        stated = metadata.get("patch")
        if stated is not None and not re.fullmatch(r"[1-9][0-9]?(,[1-9][0-9]?){2}", stated):
            raise UserError(f"patch={stated[:80]} in the file's metadata: must be three sizes, as 1,2,2")
        patch = None if stated is None else tuple(map(int, stated.split(",")))
        convolutions = tuple(f"{embedder}.proj." for embedder in self.embedders)
        published = any(name.startswith(convolutions) for name in names)
        return PatchLayout(published=published, patch=patch)  # type: ignore[arg-type]

    def targets(self, shapes: Mapping[str, Shape], source: PatchLayout, to: PatchLayout) -> dict[str, Target]:
        if source.published == to.published:
            return {name: self._resized(name, whole(name, shape), to) for name, shape in shapes.items()}
        patch = to.patch or source.patch or self._patch_of(shapes)
        convert = self._to_theirs if to.published else self._to_ours
        return dict(convert(name, shape, patch, to) for name, shape in shapes.items())

    def other_format(self, names: Collection[str]) -> str | None:
        if any(name.startswith(("transformer_blocks.", "temporal_transformer_blocks.")) for name in names):
            return "these are weights under diffusers' names; give the file with the original ones"
        return None

    def adapter_layout(self, layers: Collection[str], metadata: Mapping[str, str]) -> tuple[PatchLayout, bool]:
        """As the metadata states; else the family's, unless names are ours alone."""
        stated = metadata.get(KEY)
        ours = any(layer in self.embedders or self.to_theirs(layer) != layer for layer in layers)
        published = stated == "convolution" if stated in ("linear", "convolution") else not ours
        return PatchLayout(published=published), stated is None

    def adapter_targets(
        self, shapes: Mapping[str, Shape], layout: PatchLayout, source: PatchLayout
    ) -> dict[str, Target]:
        matrices = {n: shape for n, shape in shapes.items() if n.endswith(".weight") and len(shape) == 2}
        other = PUBLISHED if source.published else layout
        found = self.targets(matrices, layout, PUBLISHED if other is layout else layout)
        found |= self.targets(matrices, layout, other)
        return {name: target for name, target in found.items() if len(target.shape) == 2}

    def describe_guess(self, source: PatchLayout, to: PatchLayout) -> str:
        return "does not say in which order its last layer is; taken for the family's own, with channels last"

    def _patch_of(self, shapes: Mapping[str, Shape]) -> Patch:
        """Of the file's convolution; a plane is one frame."""
        for embedder in self.embedders:
            shape = shapes.get(f"{embedder}.proj.weight", ())
            if len(shape) in (4, 5):
                return (shape[2] if len(shape) == 5 else 1), shape[-2], shape[-1]
        return 1, 1, 1

    def _to_ours(self, name: str, shape: Shape, patch: Patch, to: PatchLayout) -> tuple[str, Target]:
        for embedder in self.embedders:
            if name == f"{embedder}.proj.weight" and shape:
                return f"{embedder}.weight", whole(name, shape, to=(shape[0], math.prod(shape[1:])))
            if name == f"{embedder}.proj.bias":
                return f"{embedder}.bias", whole(name, shape)
        ours = self.to_ours(name)
        if name.startswith("final_layer.linear."):
            return ours, whole(name, shape, order=channels_first(height(shape), patch))
        return ours, self._resized(name, whole(name, shape), to)

    def _to_theirs(self, name: str, shape: Shape, patch: Patch, to: PatchLayout) -> tuple[str, Target]:
        for embedder in self.embedders:
            if name == f"{embedder}.weight" and len(shape) == 2:
                return f"{embedder}.proj.weight", whole(
                    name, shape, to=(shape[0], shape[1] // math.prod(patch), *patch)
                )
            if name == f"{embedder}.bias":
                return f"{embedder}.proj.bias", whole(name, shape)
        theirs = self.to_theirs(name)
        if name.startswith("final_layer.linear."):
            return theirs, whole(name, shape, order=channels_last(height(shape), patch))
        return theirs, whole(name, shape)

    def _resized(self, name: str, target: Target, to: PatchLayout) -> Target:
        """The null text as long as the model's texts."""
        rows = to.null_rows
        if not name.endswith("y_embedder.y_embedding") or rows is None or len(target.shape) != 2 or not target.shape[0]:
            return target
        found, width = target.shape
        if rows == found:
            return target
        last = (Rows(name, found - 1, found),) * (rows - found)
        return Target((rows, width), (Rows(name, 0, min(rows, found)), *last))


def channels_first(rows: int, patch: Patch) -> tuple[int, ...] | None:
    """Row (pt, ph, pw, C_out) of every row (C_out, pt, ph, pw); None: these are no rows of whole patches."""
    if rows % math.prod(patch):
        return None
    order = np.arange(rows).reshape(*patch, -1).transpose(3, 0, 1, 2)
    return tuple(order.flatten().tolist())


def channels_last(rows: int, patch: Patch) -> tuple[int, ...] | None:
    """The inverse of ``channels_first``."""
    order = channels_first(rows, patch)
    return None if order is None else tuple(np.argsort(order).tolist())
