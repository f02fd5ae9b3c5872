"""The ``config.json`` of diffusers beside HunyuanVideo weights on the model hub; the original release has none."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opensora.models.hunyuan_video.config import HunyuanVideoConfig
from opensora.utils.files.untrusted import short

CLASS = "HunyuanVideoTransformer3DModel"
# Our key -> theirs, and what they stand for where the file does not say.
_NUMBERS: dict[str, tuple[str, Any]] = {
    "in_channels": ("in_channels", 16),
    "num_heads": ("num_attention_heads", 24),
    "depth": ("num_layers", 20),
    "depth_single_blocks": ("num_single_layers", 40),
    "depth_refiner_blocks": ("num_refiner_layers", 2),
    "context_in_dim": ("text_embed_dim", 4096),
    "vec_in_dim": ("pooled_projection_dim", 768),
}
# What our model has no key for; an image_condition_type is of the models that continue a picture.
_FIXED: dict[str, Any] = {"qk_norm": "rms_norm", "image_condition_type": None}


def read_config(said: Mapping[str, Any], folder: Path) -> HunyuanVideoConfig | None:
    """The model that a folder's config.json describes; None: it is of no HunyuanVideo.

    Raises:
        ValueError: it describes none that can be built.
    """
    if said.get("_class_name") != CLASS:
        return None
    for key, only in _FIXED.items():
        if said.get(key, only) != only:
            raise ValueError(f"{key}={short(said[key])}: must be {'null' if only is None else only}")
    sizes: dict[str, Any] = {ours: _number(said, theirs, default) for ours, (theirs, default) in _NUMBERS.items()}
    if (out := _number(said, "out_channels", 16)) != sizes["in_channels"]:
        raise ValueError(f"out_channels={out}: must be in_channels={sizes['in_channels']}")
    side = _number(said, "patch_size", 2)
    return HunyuanVideoConfig(
        **sizes,
        hidden_size=sizes["num_heads"] * _number(said, "attention_head_dim", 128),
        patch_size=(_number(said, "patch_size_t", 1), side, side),
        mlp_ratio=float(_number(said, "mlp_ratio", 4.0)),
        theta=_whole(_number(said, "rope_theta", 256.0)),
        axes_dim=_axes(said.get("rope_axes_dim", (16, 56, 56))),
        guidance_embed=_truth(said.get("guidance_embeds", True)),
    )


def diffusers_config(cfg: HunyuanVideoConfig) -> dict[str, Any]:
    """What diffusers says of such weights.

    Raises:
        ValueError: patches that are not as wide as they are high, which it has no key for.
    """
    if cfg.patch_size[1] != cfg.patch_size[2]:
        raise ValueError(f"patch_size={cfg.patch_size}: must be as wide as it is high, as diffusers has no other")
    named = {theirs: getattr(cfg, ours) for ours, (theirs, _) in _NUMBERS.items()}
    return {
        "_class_name": CLASS,
        **named,
        "out_channels": cfg.in_channels,
        "attention_head_dim": cfg.head_dim,
        "patch_size": cfg.patch_size[1],
        "patch_size_t": cfg.patch_size[0],
        "mlp_ratio": cfg.mlp_ratio,
        "rope_theta": float(cfg.theta),
        "rope_axes_dim": list(cfg.axes_dim),
        "guidance_embeds": cfg.guidance_embed,
        **_FIXED,
    }


def _number(said: Mapping[str, Any], key: str, default: Any) -> Any:
    """An integer, or any number where they have one."""
    value = said.get(key, default)
    allowed = (int, float) if isinstance(default, float) else (int,)
    if type(value) not in allowed or not math.isfinite(value):
        raise ValueError(f"{key}={short(value)}: must be {'a number' if float in allowed else 'an integer'}")
    return value


def _whole(theta: float) -> int:
    if not float(theta).is_integer():
        raise ValueError(f"rope_theta={theta}: must be a whole number")
    return int(theta)


def _axes(value: Any) -> tuple[int, int, int]:
    if not isinstance(value, list | tuple) or len(value) != 3 or any(type(dim) is not int for dim in value):
        raise ValueError(f"rope_axes_dim={short(value)}: must be three integers")
    return value[0], value[1], value[2]


def _truth(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"guidance_embeds={short(value)}: must be true or false")
    return value
