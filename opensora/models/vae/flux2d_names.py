"""Names of Flux's autoencoder: those of the published ae.safetensors, and those of ``AutoencoderKL`` in diffusers."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from opensora.models.vae.checkpoint import AutoencoderWeights
from opensora.models.weights.format import Layout
from opensora.models.weights.plain import PlainLayout
from opensora.models.weights.rows import Shape, Target, whole

# Published -> diffusers, applied in this order. Stages of the decoder are counted from the other end.
_RENAMED = (
    (r"^encoder\.down\.(\d+)\.block\.(\d+)", r"encoder.down_blocks.\1.resnets.\2"),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.(\d+)", r"decoder.up_blocks.\1.resnets.\2"),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
_STAGE = re.compile(r"^decoder\.up_blocks\.(\d+)\.")
_MATRIX = re.compile(r"\.attentions\.0\.to_(q|k|v|out\.0)\.weight$")  # a 1x1 convolution in the published file


@dataclass(frozen=True)
class PublishedLayout(PlainLayout):
    """Of ae.safetensors, which ComfyUI and others read, too."""


PUBLISHED, DIFFUSERS = PublishedLayout(), PlainLayout()


def diffusers_name(name: str, levels: int) -> str:
    """A published name as diffusers has it; ``levels``: stages of the decoder."""
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    return _STAGE.sub(lambda found: f"decoder.up_blocks.{levels - 1 - int(found[1])}.", name)


@dataclass(kw_only=True)
class FluxWeights(AutoencoderWeights):
    """Both layouts, told apart by their names."""

    original: Layout = PUBLISHED

    def detect_layout(self, names: Collection[str], metadata: Mapping[str, str]) -> Layout:
        return PUBLISHED if any(re.match(r"(encoder\.down|decoder\.up)\.\d", name) for name in names) else DIFFUSERS

    def targets(self, shapes: Mapping[str, Shape], source: Layout, to: Layout) -> dict[str, Target]:
        if source in (to, DIFFUSERS):
            return super().targets(shapes, source, to)
        stages = [re.match(r"decoder\.up\.(\d+)\.", name) for name in shapes]
        levels = 1 + max((int(found[1][:6]) for found in stages if found), default=0)
        targets = {}
        for name, shape in shapes.items():
            new = diffusers_name(name, levels)
            targets[new] = whole(name, shape, shape[:2] if _MATRIX.search(new) else None)
        return targets
