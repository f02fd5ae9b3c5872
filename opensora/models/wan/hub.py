"""The ``config.json`` beside Wan weights on the model hub: that of the original release, and that of diffusers.

Neither says everything. The original one is the same for I2V of 2.1 and of 2.2, of which one attends to a picture: the
weights beside it are asked. The one of diffusers does not tell TI2V-5B, which has known frames in the place of noise,
from text to video: its latents of 48 channels do.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from opensora.models.wan.config import MASK_CHANNELS, WanConfig
from opensora.models.weights.shards import weight_files
from opensora.utils.files.safetensors_files import open_weights
from opensora.utils.files.untrusted import short

_LATENTS_OF_5B = 48  # channels
_References = Literal["none", "clip", "in_place"]
_TYPES: dict[str, _References] = {"t2v": "none", "i2v": "clip", "ti2v": "in_place"}
# Our key -> theirs, and what they stand for where the file does not say.
_ORIGINAL = {
    "in_channels": ("out_dim", 16),
    "hidden_size": ("dim", 2048),
    "num_heads": ("num_heads", 16),
    "depth": ("num_layers", 32),
    "ffn_dim": ("ffn_dim", 8192),
    "text_dim": ("text_dim", 4096),
}
_DIFFUSERS = {
    "in_channels": ("out_channels", 16),
    "num_heads": ("num_attention_heads", 40),
    "depth": ("num_layers", 40),
    "ffn_dim": ("ffn_dim", 13824),
    "text_dim": ("text_dim", 4096),
}
# What our model has no key for.
_FIXED: dict[str, tuple[Any, ...]] = {
    **{"freq_dim": (256,), "eps": (1e-6,), "window_size": ([-1, -1],), "cross_attn_norm": (True,)},
    **{"qk_norm": (True, "rms_norm_across_heads"), "pos_embed_seq_len": (None,)},
}
_IMAGE_LAYER = "img_emb.proj.1.weight"


def read_config(said: Mapping[str, Any], folder: Path) -> WanConfig | None:
    """The model that a folder's config.json describes; None: it is of no Wan.

    Raises:
        ValueError: it describes none that can be built.
        UserError: the weights beside it cannot be read.
    """
    read = {"WanModel": _read_original, "WanTransformer3DModel": _read_diffusers}.get(str(said.get("_class_name")))
    if read is None:
        return None
    for key, allowed in _FIXED.items():
        if key in said and said[key] not in allowed:
            raise ValueError(f"{key}={short(said[key])}: must be {allowed[0] or 'null'}")
    return read(said, folder)


def published_config(cfg: WanConfig) -> dict[str, Any]:
    """What the original release says of such weights; patches and text of other sizes than it had are said beside."""
    named = {theirs: getattr(cfg, ours) for ours, (theirs, _) in _ORIGINAL.items()}
    model_type = next(name for name, references in _TYPES.items() if references == cfg.references)
    more = {} if cfg.patch_size == (1, 2, 2) else {"patch_size": list(cfg.patch_size)}
    read = cfg.in_channels + (cfg.in_channels + MASK_CHANNELS if cfg.references == "clip" else 0)
    fixed = {"_class_name": "WanModel", "eps": 1e-6, "freq_dim": 256, "text_len": 512}
    return {**fixed, "model_type": model_type, "in_dim": read, **named, **more}


def diffusers_config(cfg: WanConfig) -> dict[str, Any]:
    """What diffusers says of them."""
    named = {theirs: getattr(cfg, ours) for ours, (theirs, _) in _DIFFUSERS.items()}
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(cfg.patch_size),
        "attention_head_dim": cfg.head_dim,
        "in_channels": cfg.in_channels + (cfg.in_channels + MASK_CHANNELS if cfg.references == "clip" else 0),
        **named,
        **{"freq_dim": 256, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6},
        "image_dim": cfg.image_dim or None,
        "added_kv_proj_dim": cfg.hidden_size if cfg.image_dim else None,
        **{"rope_max_seq_len": 1024, "pos_embed_seq_len": None},
    }


def _read_original(said: Mapping[str, Any], folder: Path) -> WanConfig:
    model_type = said.get("model_type", "t2v")
    references = _TYPES.get(model_type) if isinstance(model_type, str) else None
    if references is None:
        raise ValueError(f"model_type={short(model_type)}: must be one of {', '.join(_TYPES)}")
    sizes: dict[str, Any] = {ours: _number(said, theirs, default) for ours, (theirs, default) in _ORIGINAL.items()}
    _check_inputs("in_dim", _number(said, "in_dim", 16), sizes["in_channels"], references)
    image_dim = _image_dim(folder) if references == "clip" else 0
    return WanConfig(**sizes, patch_size=_patch(said), references=references, image_dim=image_dim)


def _read_diffusers(said: Mapping[str, Any], folder: Path) -> WanConfig:
    sizes: dict[str, Any] = {ours: _number(said, theirs, default) for ours, (theirs, default) in _DIFFUSERS.items()}
    read, latents = _number(said, "in_channels", 16), sizes["in_channels"]
    references: _References = "none" if read == latents else "clip"
    if references == "none" and latents == _LATENTS_OF_5B:
        references = "in_place"
    _check_inputs("in_channels", read, latents, references)
    hidden = sizes["num_heads"] * _number(said, "attention_head_dim", 128)
    image_dim = 0 if said.get("image_dim") is None else _number(said, "image_dim", 0)
    if (said.get("added_kv_proj_dim") is not None) != (image_dim > 0):
        raise ValueError(f"added_kv_proj_dim={short(said.get('added_kv_proj_dim'))}: must be null without image_dim")
    return WanConfig(**sizes, hidden_size=hidden, patch_size=_patch(said), references=references, image_dim=image_dim)


def _check_inputs(key: str, read: int, latents: int, references: _References) -> None:
    """That the channels a model reads are those of noise, or of noise, a mask and a clip."""
    wanted = 2 * latents + MASK_CHANNELS if references == "clip" else latents
    if read != wanted:
        raise ValueError(f"{key}={read}: must be {wanted}, for latents of {latents} channels")


def _image_dim(folder: Path) -> int:
    """Width of the tokens of a picture that the weights in a folder read; 0: they read none."""
    files, index = weight_files(folder)
    held = [folder / file for name, file in index.items() if name.endswith(_IMAGE_LAYER)] if index else files
    for file in held:
        for name, shape in open_weights(file).shapes.items():
            if name.endswith(_IMAGE_LAYER) and shape:
                return shape[0]
    return 0


def _number(said: Mapping[str, Any], key: str, default: int) -> int:
    value = said.get(key, default)
    if type(value) is not int:
        raise ValueError(f"{key}={short(value)}: must be an integer")
    return value


def _patch(said: Mapping[str, Any]) -> tuple[int, int, int]:
    value = said.get("patch_size", (1, 2, 2))
    if not isinstance(value, list | tuple) or len(value) != 3 or any(type(side) is not int for side in value):
        raise ValueError(f"patch_size={short(value)}: must be three integers")
    return value[0], value[1], value[2]
