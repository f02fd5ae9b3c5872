"""Open-Sora 1.x weights in files, those of PixArt to start from, and 4 latent channels made 16.

Names are the published ones (``opensora/models/weights/patches.py`` has what differs). A PixArt file holds an STDiT but
for its attention along time, a PixArt-Sigma file the spatial blocks of an STDiT3; what they lack starts as a new
model's, which is zero where it is added to the stream: the model then is PixArt applied to every frame.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.models.stdit.layers import RotaryFrequencies
from opensora.models.weights.format import WeightFormat
from opensora.models.weights.patches import PatchWeights

_SHARED = ("x_embedder", "t_embedder", "t_block", "y_embedder", "final_layer")
_POSITIONS = ("pos_embed", "pos_embed_temporal")


def _spatial(name: str) -> str:
    """PixArt-Sigma's blocks are the spatial ones."""
    return f"spatial_{name}" if name.startswith("blocks.") else name


@dataclass(kw_only=True)
class STDiTWeights(PatchWeights):
    """The family's ``WeightFormat``."""

    def refit(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """``tensor``, of a file to start from, for a model that wants another shape; None: it cannot be.

        For 4 times as many latent channels each input counts a quarter, and each output is repeated (Open-Sora 1.3);
        columns and rows are (channels, places) here, and two outputs of a latent are two runs of channels. Rotary
        frequencies are those of the model's own.
        """
        rows = tensor.shape[0] if tensor.ndim else 0
        if name == "rope.freqs" and len(shape) == 1:
            freqs = torch.empty(shape, dtype=tensor.dtype)
            RotaryFrequencies.fill_(freqs)
            return freqs
        if name == "x_embedder.weight" and shape == (rows, 4 * tensor.shape[1]):
            return tensor.repeat(1, 4) / 4
        if name.startswith("final_layer.linear.") and shape == (4 * rows, *tensor.shape[1:]) and rows % 2 == 0:
            halves = tensor.unflatten(0, (2, -1))
            return torch.cat((halves, halves, halves, halves), dim=1).flatten(0, 1)
        return None


STDIT_WEIGHTS: WeightFormat = STDiTWeights(
    top_level=(*_SHARED, *_POSITIONS, "blocks"),
    example_layer="blocks.0.attn.qkv",
    advice="choose the model size of this file",
    may_lack=("blocks.*.attn_temp.*",),
)
STDIT2_WEIGHTS: WeightFormat = STDiTWeights(
    top_level=(
        *(*_SHARED, *_POSITIONS, "t_block_temp", "rope", "blocks"),
        *("csize_embedder", "ar_embedder", "fl_embedder", "fps_embedder"),
    ),
    example_layer="blocks.0.attn.qkv",
    advice="choose the model size of this file, and its qk_norm",
    may_lack=(
        *("blocks.*.attn_temp.*", "blocks.*.scale_shift_table_temporal", "blocks.*.?_norm.weight", "rope.freqs"),
        *("t_block_temp.*", "csize_embedder.*", "ar_embedder.*", "fl_embedder.*", "fps_embedder.*"),
    ),
)
STDIT3_WEIGHTS: WeightFormat = STDiTWeights(
    top_level=(
        *(*_SHARED, *_POSITIONS, "x_embedder_cond", "x_embedder_cond_mask", "fps_embedder", "rope"),
        *("spatial_blocks", "temporal_blocks", "blocks"),
    ),
    embedders=("x_embedder", "x_embedder_cond", "x_embedder_cond_mask"),
    to_ours=_spatial,
    example_layer="spatial_blocks.0.attn.qkv",
    advice="choose the model size of this file, and its in_channels, qk_norm and cond_embed",
    may_lack=(
        *("temporal_blocks.*", "spatial_blocks.*.?_norm.weight", "fps_embedder.*", "rope.freqs"),
        *("x_embedder_cond.*", "x_embedder_cond_mask.*"),
    ),
)
