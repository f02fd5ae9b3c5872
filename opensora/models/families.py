"""Kinds of denoiser by name: the table that everything else asks. A new family is a line of it."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora.models import dit, hunyuan_video, latte, mmdit, pixart, stdit, wan
from opensora.models.base import Denoising, Family, ModelConfig
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import parse_json, parsing, read_small
from opensora.utils.rng import torch_generator

WITHOUT_WEIGHTS = ("dct", "bytes", "classes")  # encoders that nobody takes for those of published weights
HUB_CONFIG = "config.json"  # of a folder of the model hub

FAMILIES: dict[str, Family] = {
    "mmdit": mmdit.FAMILY,
    "dit": dit.FAMILY,
    "latte": latte.FAMILY,
    "pixart": pixart.FAMILY,
    "pixart_ms": pixart.MS_FAMILY,
    "pixart_sigma": pixart.SIGMA_FAMILY,
    "stdit": stdit.STDIT,
    "stdit2": stdit.STDIT2,
    "stdit3": stdit.STDIT3,
    "hunyuan_video": hunyuan_video.FAMILY,
    "wan": wan.FAMILY,
}
MODEL_CONFIGS: dict[str, type] = {kind: family.config for kind, family in FAMILIES.items()}
MODEL_SIZES: dict[str, Mapping[str, Any]] = {kind: family.sizes for kind, family in FAMILIES.items()}


def register(kind: str, family: Family) -> None:
    """One more family, kept outside this package; before a configuration that names it is loaded."""
    FAMILIES[kind], MODEL_CONFIGS[kind], MODEL_SIZES[kind] = family, family.config, family.sizes


def family_of(cfg: ModelConfig) -> Family:
    """The family that ``cfg`` is a configuration of."""
    return FAMILIES[cfg.kind]


def describe(cfg: ModelConfig) -> Denoising:
    """What others must know of the model of this configuration."""
    return family_of(cfg).describe(cfg)


def build_model(cfg: ModelConfig) -> nn.Module:
    """The denoiser of ``cfg.kind``; under ``torch.device("meta")`` it costs no memory and no draws."""
    return family_of(cfg).model(cfg)


def count_parameters(cfg: ModelConfig) -> int:
    """Parameters of the denoiser, without building its weights."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(cfg).parameters())


@lru_cache
def has_frozen_parameters(cfg: ModelConfig) -> bool:
    """Whether some parameters are never trained, as a null text."""
    with torch.device("meta"):
        return not all(parameter.requires_grad for parameter in build_model(cfg).parameters())


def read_hub_config(folder: Path) -> ModelConfig | None:
    """The model that the config.json of a folder of the model hub describes; None: there is none, or of no kind here.

    Raises:
        UserError: it cannot be read, or describes no model that can be built.
    """
    path = folder / HUB_CONFIG
    if not path.is_file():
        return None

    def refuse(reason: str) -> UserError:
        return UserError(f"{path}: is not the configuration of a model ({reason}); fetch it again")

    with parsing(refuse):
        content = read_small(path)
    said = parse_json(content, refuse)
    if not isinstance(said, dict):
        raise refuse("it holds no keys")
    readers = dict.fromkeys(family.read_hub for family in FAMILIES.values() if family.read_hub is not None)
    try:
        found = (read(said, folder) for read in readers)
        return next((cfg for cfg in found if cfg is not None), None)
    except UserError:
        raise
    except ValueError as error:
        raise refuse(str(error)) from None


def check_hub_config(path: Path, cfg: ModelConfig) -> None:
    """That a config.json beside published weights says of them what ``cfg`` does, as to what changes no shape: as the
    number of heads, or that they go on from a picture.

    Raises:
        UserError: ``read_hub_config``'s, or a key that differs, with the value to set.
    """
    folder = path if path.is_dir() else path.parent
    found, family = read_hub_config(folder), family_of(cfg)
    if found is None or type(found) is not type(cfg):  # of another kind, whose names do not fit
        return
    free = family.per_job | family.fitted
    given: ModelConfig = replace(cfg, **{key: getattr(found, key) for key in free})  # type: ignore[type-var]
    forms = [say for say in (family.hub, family.diffusers_hub) if say is not None]
    if not forms or any(_said(say, given) == say(found) for say in forms):  # neither form says everything
        return
    if _shapes(given) != _shapes(found):  # it is of another file in the folder
        return
    key = next(one.name for one in fields(found) if getattr(given, one.name) != getattr(found, one.name))  # type: ignore[arg-type]
    here, there = getattr(cfg, key), getattr(found, key)
    raise UserError(f"{folder / HUB_CONFIG}: says {key}={there}, and model.{key} is {here}; set model.{key}={there}")


def _shapes(cfg: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build_model(cfg).state_dict().items()}


def _said(say: Callable[[Any], dict[str, Any]], cfg: ModelConfig) -> dict[str, Any] | None:
    try:
        return say(cfg)
    except ValueError:  # there are no words for it
        return None


def other_encoders(cfg: ModelConfig, vae: Any, text: Any) -> str:
    """What to say of an autoencoder or text encoder that published weights of this family do not read; empty: nothing.

    Widths fit where nothing else does: those of T5, umT5 and Llama are the same, and so are channels of many latents.
    """
    known = family_of(cfg).encoders
    quiet = (*known, *WITHOUT_WEIGHTS) if known else (vae.kind, text.kind)
    other = [f"{key}.kind={one.kind}" for key, one in (("vae", vae), ("text", text)) if one.kind not in quiet]
    if not other:
        return ""
    return (
        f"{' and '.join(other)}: published weights of model.kind={cfg.kind} read {', '.join(known)}, and make noise of "
        "others; fit for weights that were trained with them alone"
    )


def hub_config(cfg: ModelConfig, *, diffusers: bool = False) -> dict[str, Any] | None:
    """What the config.json beside weights of this model says, under their own names or those of diffusers; None: the
    family publishes none."""
    family = family_of(cfg)
    say = family.diffusers_hub if diffusers else family.hub
    return None if say is None else say(cfg)


@torch.no_grad()
def init_model_(model: nn.Module, seed: int) -> None:
    """Fill every parameter of an unsharded denoiser.

    Every parameter draws from a generator of its own, keyed (seed, "init", name): the values do not depend on order,
    on the device, or on which parameters another process initialises.
    """
    for name, parameter in model.named_parameters():
        model.init_parameter_(name, parameter, torch_generator(seed, "init", name))  # type: ignore[operator]
