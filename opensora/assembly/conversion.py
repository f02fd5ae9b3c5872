"""Weights of a denoiser from any file that is read to safetensors under the family's own names."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from opensora.models.base import ModelConfig
from opensora.models.families import HUB_CONFIG, build_model, family_of, hub_config
from opensora.models.pretrained import not_finite
from opensora.models.weights.format import Layout, WeightFormat
from opensora.models.weights.reader import WeightFile, load_state_dict_for
from opensora.utils.command_line.command import naming
from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import STEM, write_json, write_weights
from opensora.utils.files.untrusted import short
from opensora.utils.files.user_files import try_output

DIFFUSERS_STEM = "diffusion_pytorch_model"  # of the files that diffusers looks for


def convert_weights(cfg: ModelConfig, source: Path, target: Path, names: str | None = None) -> tuple[str, list[Path]]:
    """Compare ``source`` with the model, name by name and shape by shape, and write its tensors, in their types,
    those of fp8 in bf16.

    Args:
        names: of a layout of the family (``WeightFormat.layouts``); None: as training exports.

    Returns:
        What was found, in words, and the files written.

    Raises:
        UserError: it does not fit, holds values that are no finite numbers, the family has no such names, or ``target``
            cannot be written; nothing is written then.
    """
    format = family_of(cfg).weights
    to = _written_layout(cfg, format, names)
    with torch.device("meta"):
        model = build_model(cfg)
    _, report = load_state_dict_for(model, source, format, to=format.layout(cfg), allow_missing=format.may_lack)
    file = WeightFile(source, format, to)
    if name := not_finite(file.items()):
        raise UserError(f"{source}: {name} holds NaN or infinite values; give weights without")
    of_diffusers = names == "diffusers"
    try:
        said = hub_config(cfg, diffusers=of_diffusers) if of_diffusers or to == format.original else None
    except ValueError as error:
        raise UserError(f"--names=diffusers: model.{error}") from None
    try_output(target, "--to", folder=True)
    with naming(target):
        written = write_weights(target, _tensors(file), to.metadata(), stem=DIFFUSERS_STEM if of_diffusers else STEM)
        written += [] if said is None else [write_json(target / HUB_CONFIG, said)]
    return str(report), written


def _written_layout(cfg: ModelConfig, format: WeightFormat, names: str | None) -> Layout:
    layouts: Mapping[str, Layout] = getattr(format, "layouts", {})
    if names is None:
        return format.original if getattr(format, "exports_original", False) else format.layout(cfg)
    if names not in layouts:
        known = f"must be one of {', '.join(layouts)}" if layouts else "this kind has its own names alone; leave it out"
        raise UserError(f"--names={short(names)}: {known} (model.kind={cfg.kind})")
    return layouts[names]


def _tensors(file: WeightFile) -> Iterator[tuple[str, Tensor]]:
    """In the types of the file, but bf16 for fp8, whose own rounding was 16 times as coarse."""
    from_fp8 = file.from_fp8
    for name in file:
        tensor = file[name].contiguous()
        yield name, tensor.to(torch.bfloat16) if name in from_fp8 else tensor
