"""Weights of a denoiser from any file that is read to safetensors under the family's own names."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from opensora.models.base import ModelConfig
from opensora.models.families import build_model, family_of
from opensora.models.pretrained import not_finite
from opensora.models.weights.reader import WeightFile, load_state_dict_for
from opensora.utils.command_line.command import naming
from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import write_weights
from opensora.utils.files.user_files import try_output


def convert_weights(cfg: ModelConfig, source: Path, target: Path) -> tuple[str, list[Path]]:
    """Compare ``source`` with the model, name by name and shape by shape, and write its tensors, in their types.

    Returns:
        What was found, in words, and the files written.

    Raises:
        UserError: it does not fit, holds values that are no finite numbers, or ``target`` cannot be written; nothing is
            written then.
    """
    format = family_of(cfg).weights
    with torch.device("meta"):
        model = build_model(cfg)
    layout = format.layout(cfg)
    _, report = load_state_dict_for(model, source, format, to=layout, allow_missing=format.may_lack)
    to = format.original if getattr(format, "exports_original", False) else layout
    file = WeightFile(source, format, to)
    if name := not_finite(file.items()):
        raise UserError(f"{source}: {name} holds NaN or infinite values; give weights without")
    try_output(target, "--to", folder=True)
    with naming(target):
        written = write_weights(target, _tensors(file), to.metadata())
    return str(report), written


def _tensors(file: WeightFile) -> Iterator[tuple[str, Tensor]]:
    return ((name, file[name].contiguous()) for name in file)
