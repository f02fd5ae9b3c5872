"""Wan and HunyuanVideo, small, and the layouts on which each is compared with one process.

Six heads: three processes of tensor have two each, four of Ulysses two, two, one and one. With three heads (``wan_3``)
there are more processes than heads on some layouts, and a ring takes what Ulysses cannot; twelve over eight processes
are those of Wan 1.3B. A text of five tokens is divided by none of the degrees but five, and prompts of a batch are of
unequal length.
"""

from typing import Any

from opensora.models.hunyuan_video import HunyuanVideoConfig
from opensora.models.wan import WanConfig
from tests.dist.chapters import Run

Axes = tuple[tuple[str, int], ...]
_WAN: dict[str, Any] = {
    **{"in_channels": 4, "hidden_size": 48, "num_heads": 6, "depth": 3, "ffn_dim": 72, "text_dim": 12}
}
WAN: dict[str, Any] = {
    "wan_t2v": WanConfig(**_WAN),
    "wan_i2v": WanConfig(**_WAN, references="clip", image_dim=12),  # 2.1: a picture's tokens beside the text
    "wan_i2v22": WanConfig(**_WAN, references="clip"),
    "wan_5b": WanConfig(**_WAN, references="in_place"),  # a time for every token
    "wan_12": WanConfig(**_WAN | {"hidden_size": 96, "num_heads": 12}),
    "wan_3": WanConfig(**_WAN | {"hidden_size": 24, "num_heads": 3}),
}
_HUNYUAN: dict[str, Any] = {
    **{"in_channels": 4, "hidden_size": 48, "num_heads": 6, "mlp_ratio": 2.0, "axes_dim": (4, 2, 2)},
    **{"depth": 2, "depth_single_blocks": 2, "depth_refiner_blocks": 1, "context_in_dim": 12, "vec_in_dim": 10},
}
HUNYUAN: dict[str, Any] = {
    "hunyuan": HunyuanVideoConfig(**_HUNYUAN),
    "hunyuan_3": HunyuanVideoConfig(**_HUNYUAN | {"hidden_size": 24, "num_heads": 3, "guidance_embed": False}),
}


def axes(**degrees: int) -> Axes:
    return tuple(degrees.items())


JOBS_OF_WAN = [
    Run("wan_t2v", 1, (), 0, "full"),
    Run("wan_i2v", 1, (), 3, "every", "adamw"),
    Run("wan_t2v", 2, (), 3, "full", "adamw"),
    Run("wan_i2v", 2, (), 2),
    Run("wan_5b", 2, axes(replicate=2), 0, "none", "adamw"),
    Run("wan_t2v", 2, axes(ulysses=2), 3, "selective"),
    Run("wan_i2v", 2, axes(ulysses=2), 1, "full", "adamw"),
    Run("wan_3", 2, axes(ulysses=2), 2, "full"),
    Run("wan_t2v", 2, axes(ring=2), 0, "full", "adamw"),
    Run("wan_5b", 2, axes(ring=2), 2, "selective"),
    Run("wan_t2v", 2, axes(tensor=2), 1, "selective"),
    Run("wan_i2v", 2, axes(tensor=2), 3, "full", "adamw"),
    Run("wan_5b", 2, axes(tensor=2), 2),
    Run("wan_t2v", 3, (), 2, "first", "adamw"),
    Run("wan_i2v22", 3, axes(ulysses=3), 3, "full"),
    Run("wan_3", 3, axes(ulysses=3), 0, "none", "adamw"),
    Run("wan_5b", 3, axes(ring=3), 1, "every"),
    Run("wan_i2v", 3, axes(tensor=3), 2, "full"),
    Run("wan_t2v", 4, axes(ulysses=4), 3, "full", "adamw"),
    Run("wan_i2v", 4, axes(ulysses=4), 2, "none"),
    Run("wan_3", 4, axes(ring=2, ulysses=2), 3, "selective"),
    Run("wan_3", 4, axes(ring=4), 1, "none", "adamw"),
    Run("wan_5b", 4, axes(ring=2, ulysses=2), 3, "full"),
    Run("wan_t2v", 4, axes(ring=2, tensor=2), 1, "full", "adamw"),
    Run("wan_i2v", 4, axes(ulysses=2, tensor=2), 3, "none"),
    Run("wan_t2v", 4, axes(replicate=2, ulysses=2), 3, "every"),
    Run("wan_i2v22", 4, axes(replicate=2, tensor=2), 2, "full", "adamw"),
    Run("wan_t2v", 5, axes(ulysses=5), 2, "full"),
    Run("wan_3", 5, axes(ring=5), 3, "none"),
    Run("wan_3", 6, axes(ring=2, ulysses=3), 3, "full", "adamw"),
    Run("wan_i2v", 6, axes(ring=3, tensor=2), 2, "selective"),
    Run("wan_5b", 6, axes(ulysses=2, tensor=3), 3, "full", "adamw"),
    Run("wan_t2v", 6, axes(ulysses=6), 1, "none"),
    Run("wan_12", 8, axes(ulysses=8), 3, "full"),
    Run("wan_12", 8, axes(ring=2, ulysses=4), 2, "offload", "adamw"),
    Run("wan_t2v", 2, axes(ulysses=2), 3, "full", adapters=True),
    Run("wan_i2v", 2, axes(tensor=2), 2, "selective", "adamw", adapters=True),
    Run("wan_5b", 4, axes(ring=2, tensor=2), 3, "none", adapters=True),
    Run("wan_t2v", 2, axes(ulysses=2), 3, "full", compiled=True),
    Run("wan_i2v", 2, axes(tensor=2), 2, "selective", compiled=True),
]
JOBS_OF_HUNYUAN = [
    Run("hunyuan", 1, (), 0, "full"),
    Run("hunyuan_3", 1, (), 3, "every", "adamw"),
    Run("hunyuan", 1, (), 2, "none", packed=True),
    Run("hunyuan", 2, (), 3, "full", "adamw"),
    Run("hunyuan_3", 2, axes(replicate=2), 0, "none", "adamw"),
    Run("hunyuan", 2, axes(ulysses=2), 3, "selective"),
    Run("hunyuan_3", 2, axes(ulysses=2), 1, "full", "adamw"),
    Run("hunyuan", 2, axes(ring=2), 2, "full"),
    Run("hunyuan_3", 2, axes(ring=2), 0, "selective", "adamw"),
    Run("hunyuan", 2, axes(tensor=2), 1, "none", "adamw"),
    Run("hunyuan", 2, axes(tensor=2), 3, "full"),
    Run("hunyuan", 2, axes(ulysses=2), 2, "full", "adamw", packed=True),
    Run("hunyuan", 2, axes(tensor=2), 3, "selective", packed=True),
    Run("hunyuan", 3, (), 2, "first", "adamw"),
    Run("hunyuan", 3, axes(ulysses=3), 3, "full"),
    Run("hunyuan_3", 3, axes(ulysses=3), 0, "none", "adamw"),
    Run("hunyuan", 3, axes(ring=3), 1, "every"),
    Run("hunyuan", 3, axes(tensor=3), 2, "full"),
    Run("hunyuan", 4, axes(ulysses=4), 3, "full", "adamw"),
    Run("hunyuan_3", 4, axes(ring=2, ulysses=2), 3, "selective"),
    Run("hunyuan_3", 4, axes(ring=4), 1, "none", "adamw"),
    Run("hunyuan", 4, axes(ring=2, ulysses=2), 2, "full"),
    Run("hunyuan", 4, axes(ring=2, tensor=2), 1, "full", "adamw"),
    Run("hunyuan", 4, axes(ulysses=2, tensor=2), 3, "none"),
    Run("hunyuan", 4, axes(replicate=2, ulysses=2), 3, "every"),
    Run("hunyuan", 4, axes(replicate=2, tensor=2), 2, "full", "adamw"),
    Run("hunyuan", 4, axes(ulysses=2, tensor=2), 1, "every", packed=True),
    Run("hunyuan", 5, axes(ulysses=5), 2, "full"),
    Run("hunyuan_3", 5, axes(ring=5), 3, "none"),
    Run("hunyuan_3", 6, axes(ring=2, ulysses=3), 3, "full", "adamw"),
    Run("hunyuan", 6, axes(ring=3, tensor=2), 2, "selective"),
    Run("hunyuan", 6, axes(ulysses=2, tensor=3), 3, "full", "adamw"),
    Run("hunyuan", 6, axes(ulysses=6), 1, "none"),
    Run("hunyuan", 2, axes(ulysses=2), 3, "full", adapters=True),
    Run("hunyuan", 2, axes(tensor=2), 2, "selective", "adamw", adapters=True),
    Run("hunyuan", 4, axes(ring=2, tensor=2), 3, "none", adapters=True),
    Run("hunyuan", 2, axes(ulysses=2), 3, "full", compiled=True),
    Run("hunyuan", 2, axes(tensor=2), 2, "selective", compiled=True),
]
JOBS = {"jobs of Wan": JOBS_OF_WAN, "jobs of HunyuanVideo": JOBS_OF_HUNYUAN}
MODELS = WAN | HUNYUAN
# What the default tests run of them.
QUICK = [
    *(JOBS_OF_WAN[index] for index in (1, 6, 7, 10, 12, 20)),
    *(JOBS_OF_HUNYUAN[index] for index in (6, 8, 9, 11, 19)),
]
