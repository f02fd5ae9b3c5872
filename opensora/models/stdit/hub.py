"""Folders of the model hub: weights beside a ``config.json`` with the model's arguments, for STDiT2 and STDiT3.

Arguments that choose kernels, dropout in training or loading are the family's code's, not the model's, and are not
read. A file that names something of Open-Sora 1.3 is of a model that embeds known frames.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from opensora.models.stdit.config import STDiT2Config, STDiT3Config
from opensora.utils.files.untrusted import short

TYPES: dict[str, type] = {"STDiT2": STDiT2Config, "STDiT3": STDiT3Config}
_OF_1_3 = ("kernel_size", "use_spatial_rope", "skip_temporal", "use_cond", "adapt_16ch")
_OURS = ("kind", "cond_embed")  # fields that no published argument is called
_IN_TRAINING = ("freeze", "freeze_y_embedder", "only_train_temporal", "skip_y_embedder")  # not of the weights


def read_config(said: Mapping[str, Any], folder: Path) -> Any | None:
    """The model that a folder's config.json describes; None: it is of no such model.

    Raises:
        ValueError: it describes no model that can be built.
    """
    config = TYPES.get(str(said.get("model_type")))
    if config is None:
        return None
    known = {field.name: field for field in fields(config)}
    given = {name: _plain(value) for name, value in said.items() if name in known and name not in _IN_TRAINING}
    given = {name: value for name, value in given.items() if name not in _OURS and value is not None}
    if config is STDiT3Config and any(said.get(name) is not None for name in _OF_1_3):
        given["cond_embed"] = True
    for name, value in given.items():
        if not _fits(value, getattr(config(), name), name):
            raise ValueError(f"{name}={short(value)}")
    return config(**given)


def published_config(cfg: Any) -> dict[str, Any]:
    """What the config.json of these weights says."""
    model_type = next(name for name, config in TYPES.items() if isinstance(cfg, config))
    left_out = {*_OURS, *_IN_TRAINING, *(() if getattr(cfg, "cond_embed", False) else _OF_1_3)}
    said = {field.name: getattr(cfg, field.name) for field in fields(cfg) if field.name not in left_out}
    return {"model_type": model_type, "architectures": [model_type], "input_size": [None, None, None], **said}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _fits(value: Any, default: Any, name: str) -> bool:
    """Whether a value of a file is of a field's type."""
    if name in ("patch_size", "kernel_size"):
        return isinstance(value, tuple) and len(value) == 3 and all(type(side) is int for side in value)
    if isinstance(default, float):
        return type(value) in (int, float)
    return type(value) is type(default)
