"""A made-up family of models for tests, which has nothing of the MMDiT: a model, and what it states of its weights.

Its published files hold a convolution over patches for our linear layer, q, k, v each by itself where ours are in one,
one tensor for our two keys and values, a number without dims, tables with a dim more, a shorter empty prompt, a last
layer whose channels come last, and positions that the model computes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from opensora.models.weights.format import WeightFormat
from opensora.models.weights.rows import Rows, Shape, Target, height, joined, whole

D, C, PATCH, BLOCKS, WORDS = 8, 3, (2, 1, 2), 3, 5  # width, channels, latents per token, blocks, empty prompt
OUT = C * 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.k, self.v, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.table = nn.Parameter(torch.zeros(6, D))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(q * self.table[0] + k * v + self.k(x) * self.v(x))


class Film(nn.Module):
    """Our model of the family."""

    block_lists = ("blocks",)
    attention_cores: ClassVar[Any] = {}
    axis_switches: ClassVar[Any] = {}
    tensor_shared = ()

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(OUT, D)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.nothing = nn.Parameter(torch.zeros(WORDS, D))
        self.strength = nn.Parameter(torch.zeros(1))
        self.last = nn.Linear(D, OUT)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) * self.strength + self.nothing.sum(0)
        for block in self.blocks:
            x = block(x)
        return self.last(x)

    def tensor_plan(self) -> dict[str, Any]:
        return {}

    def init_parameter_(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(generator=generator)


@dataclass(frozen=True)
class FilmLayout:
    published: bool

    def metadata(self) -> dict[str, str]:
        return {"film": "published" if self.published else "ours"}


OURS, PUBLISHED = FilmLayout(False), FilmLayout(True)
TO_OURS = tuple(np.arange(OUT).reshape(*PATCH, C).transpose(3, 0, 1, 2).flatten().tolist())  # from channels last
TO_PUBLISHED = tuple(np.argsort(TO_OURS).tolist())
RENAMED = {"embed.bias": "x_embedder.proj.bias"}


class FilmWeights:
    """What a second family has to write: its names, and which rows of which tensors a parameter is made of."""

    top_level: tuple[str, ...] = (
        *("embed", "blocks", "nothing", "strength", "last"),
        *("x_embedder", "layers", "y_embedder", "final_layer", "pos_embed"),
    )
    original = PUBLISHED
    may_lack: tuple[str, ...] = ("blocks.*.table",)
    recomputed: tuple[str, ...] = ("pos_embed*",)
    torch_keys: tuple[str, ...] | None = ("ema", "state_dict")
    advice = "choose the film of this file"
    example_layer = "blocks.0.out"

    def layout(self, cfg: Any) -> FilmLayout:
        return cfg

    def detect_layout(self, names: Collection[str], metadata: Mapping[str, str]) -> FilmLayout:
        if "film" in metadata:
            return FilmLayout(metadata["film"] == "published")
        return FilmLayout(any(name.startswith(("layers.", "x_embedder.", "final_layer.")) for name in names))

    def targets(self, shapes: Mapping[str, Shape], source: FilmLayout, to: FilmLayout) -> dict[str, Target]:
        if source == to:
            return {name: whole(name, shape) for name, shape in shapes.items()}
        return self._to_published(shapes) if to.published else self._to_ours(shapes)

    def other_format(self, names: Collection[str]) -> str | None:
        return "these are reels; give films" if any(name.startswith("reel.") for name in names) else None

    def adapter_layout(self, layers: Collection[str], metadata: Mapping[str, str]) -> tuple[FilmLayout, bool]:
        return self.detect_layout([f"{layer}." for layer in layers], metadata), "film" not in metadata

    def adapter_targets(self, shapes: Mapping[str, Shape], layout: FilmLayout, source: FilmLayout) -> dict[str, Target]:
        found: dict[str, Target] = {}
        for to in (OURS, PUBLISHED, source):
            found |= self.targets(shapes, layout, to)
        return {name: target for name, target in found.items() if name.endswith(".weight") and len(target.shape) == 2}

    def describe_guess(self, source: FilmLayout, to: FilmLayout) -> str:
        return f"taken for {source.metadata()['film']}"

    def _to_ours(self, shapes: Mapping[str, Shape]) -> dict[str, Target]:
        made = {}
        for name, shape in shapes.items():
            block, kind = name.removeprefix("layers.").partition(".")[0], name.rpartition(".")[2]
            half = height(shape) // 2
            if name == "x_embedder.proj.weight":
                made["embed.weight"] = whole(name, shape, to=(D, OUT))
            elif name == "strength":
                made[name] = whole(name, shape, to=(1,))
            elif name == "y_embedder.y_embedding":  # as long as ours, by its last row
                more = (Rows(name, shape[0] - 1, shape[0]),) * (WORDS - shape[0])
                made["nothing"] = Target((WORDS, D), (Rows(name, 0, shape[0]), *more))
            elif name.startswith("final_layer.linear."):
                made[f"last.{kind}"] = whole(name, shape, order=TO_OURS)
            elif name.endswith("scale_shift_table"):
                made[f"blocks.{block}.table"] = whole(name, shape, to=(6, D))
            elif ".attn.to_q." in name:
                names = [name.replace("to_q", part) for part in ("to_q", "to_k", "to_v")]
                made[f"blocks.{block}.qkv.{kind}"] = joined(*(whole(part, shapes[part]) for part in names))
            elif ".kv_linear." in name:
                made[f"blocks.{block}.k.{kind}"] = Target((half, *shape[1:]), (Rows(name, 0, half),))
                made[f"blocks.{block}.v.{kind}"] = Target((half, *shape[1:]), (Rows(name, half, 2 * half),))
            elif ".proj." in name and block.isdigit():
                made[f"blocks.{block}.out.{kind}"] = whole(name, shape)
            elif not name.endswith((".to_k.weight", ".to_k.bias", ".to_v.weight", ".to_v.bias")):
                made[{theirs: ours for ours, theirs in RENAMED.items()}.get(name, name)] = whole(name, shape)
        return made

    def _to_published(self, shapes: Mapping[str, Shape]) -> dict[str, Target]:
        made = {}
        for name, shape in shapes.items():
            block, kind = name.removeprefix("blocks.").partition(".")[0], name.rpartition(".")[2]
            if name == "embed.weight":
                made["x_embedder.proj.weight"] = whole(name, shape, to=(D, C, *PATCH))
            elif name == "strength":
                made[name] = whole(name, shape, to=())
            elif name == "nothing":
                made["y_embedder.y_embedding"] = whole(name, shape)
            elif name.startswith("last."):
                made[f"final_layer.linear.{kind}"] = whole(name, shape, order=TO_PUBLISHED)
            elif name.endswith(".table"):
                made[f"layers.{block}.scale_shift_table"] = whole(name, shape, to=(1, 6, D))
            elif ".qkv." in name:
                for i, part in enumerate(("to_q", "to_k", "to_v")):
                    rows = (Rows(name, i * D, (i + 1) * D),)
                    made[f"layers.{block}.attn.{part}.{kind}"] = Target((D, *shape[1:]), rows)
            elif ".k." in name:
                both = (whole(name, shape), whole(name.replace(".k.", ".v."), shape))
                made[f"layers.{block}.cross.kv_linear.{kind}"] = joined(*both)
            elif ".out." in name:
                made[f"layers.{block}.attn.proj.{kind}"] = whole(name, shape)
            elif ".v." not in name:
                made[RENAMED.get(name, name)] = whole(name, shape)
        return made


FILM: WeightFormat = FilmWeights()
