"""The format of a family whose files hold the model's own parameters under their own names, in one layout."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from opensora.models.weights.format import Layout
from opensora.models.weights.rows import Shape, Target, whole


@dataclass(frozen=True)
class PlainLayout:
    """The only one."""

    def metadata(self) -> dict[str, str]:
        return {"format": "pt"}


@dataclass(kw_only=True)
class PlainWeights:
    """A ``WeightFormat`` without conversions."""

    top_level: tuple[str, ...]
    example_layer: str
    original: Layout = PlainLayout()
    may_lack: tuple[str, ...] = ()
    recomputed: tuple[str, ...] = ()
    torch_keys: tuple[str, ...] | None = None
    advice: str = "choose the model size of this file"

    def layout(self, cfg: Any) -> Layout:
        return self.original

    def detect_layout(self, names: Collection[str], metadata: Mapping[str, str]) -> Layout:
        return self.original

    def targets(self, shapes: Mapping[str, Shape], source: Layout, to: Layout) -> dict[str, Target]:
        return {name: whole(name, shape) for name, shape in shapes.items()}

    def other_format(self, names: Collection[str]) -> str | None:
        return None

    def adapter_layout(self, layers: Collection[str], metadata: Mapping[str, str]) -> tuple[Layout, bool]:
        return self.original, False

    def adapter_targets(self, shapes: Mapping[str, Shape], layout: Layout, source: Layout) -> dict[str, Target]:
        matrices = {n: shape for n, shape in shapes.items() if n.endswith(".weight") and len(shape) == 2}
        return self.targets(matrices, source, layout)

    def describe_guess(self, source: Layout, to: Layout) -> str:
        return ""
