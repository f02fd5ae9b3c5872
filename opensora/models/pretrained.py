"""Models of other packages (transformers, diffusers) from local folders, taken only whole and as they are meant.

Their ``from_pretrained`` fills what a file lacks with random numbers, leaves out what it does not know and casts what
is no weight, with a warning at most. Here each of these is an error that names the tensor.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import check_types, open_weights
from opensora.utils.files.untrusted import parsing

# What from_pretrained reads; other files in the folder are variants, as of half precision.
_READ = re.compile(r"(diffusion_pytorch_)?model(-\d{5}-of-\d{5})?\.safetensors")
_NO_WEIGHTS = ("position_ids",)  # counted upwards in files of old releases, and made anew by the model


def load_pretrained(key: str, path: str, loader: Any, **options: Any) -> Any:
    """The model of class ``loader`` in the folder ``path``, on the CPU, in eval mode, without gradients.

    Parts of the file that belong to other models, as the decoder of T5 or the eyes of CLIP, are left out.

    Args:
        key: of the configuration, for messages.
        options: of ``loader.from_pretrained``.

    Raises:
        UserError: the folder cannot be read; a tensor that is missing, is no floating-point number, has NaN or infinite
            values, or is of a block that the model of config.json does not have.
    """
    name = f"{key}={path}: {loader.__name__}"
    with parsing(lambda reason: UserError(f"{name} cannot be loaded from this folder: {reason}")):
        model, info = loader.from_pretrained(path, local_files_only=True, output_loading_info=True, **options)
    missing, unexpected = (sorted(info[part]) for part in ("missing_keys", "unexpected_keys"))
    if missing:
        raise UserError(
            f"{name}: {_some(missing)} missing in its weights; fetch the folder again, or one of this class"
        )
    tops = {tensor.partition(".")[0] for tensor in model.state_dict()}
    odd = [one for one in unexpected if one.partition(".")[0] in tops and not one.endswith(_NO_WEIGHTS)]
    if odd:
        raise UserError(f"{name}: {_some(odd)} not in the model that config.json describes; fetch the folder again")
    _check_stored(key, Path(path), unexpected)
    if wrong := not_finite(model.state_dict().items()):
        raise UserError(f"{name}: {wrong} holds NaN or infinite values; give weights without")
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first floating-point tensor with a value that is no finite number."""
    for name, tensor in tensors:
        # Least and greatest take no memory beside the tensor, as a mask of it would.
        if tensor.is_floating_point() and tensor.numel() and not all(torch.isfinite(end) for end in tensor.aminmax()):
            return name
    return None


def _check_stored(key: str, folder: Path, left_out: Collection[str]) -> None:
    """That the numbers in the files are weights as they stand."""
    for file in sorted(folder.glob("*.safetensors")):
        if _READ.fullmatch(file.name):
            try:
                opened = open_weights(file)
                check_types(opened, _weights_in(opened.shapes, left_out))
            except UserError as error:
                raise UserError(f"{key}={error}") from None


def _weights_in(shapes: Mapping[str, object], left_out: Collection[str]) -> list[str]:
    return [name for name in shapes if name not in left_out and not name.endswith(_NO_WEIGHTS)]


def _some(names: Collection[str]) -> str:
    first, more = next(iter(names)), len(names) - 1
    return f"{first} and {more} more are" if more else f"{first} is"
