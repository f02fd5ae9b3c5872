"""Reading a diffusers autoencoder from a local folder, with errors that name the key."""

from pathlib import Path
from typing import Any

import torch

from opensora.utils.errors import UserError
from opensora.utils.untrusted import ANY, mismatch, parse_json, parsing, read_small

KEY = "vae.path"


def stated_shape(path: str) -> dict[str, Any]:
    """The folder's config.json, or {} when there is no folder yet (the published numbers hold then)."""
    file = Path(path) / "config.json"
    if not path or not file.is_file():
        return {}

    def refuse(why: str) -> UserError:
        return UserError(f"{KEY}={path}: config.json is not readable as JSON ({why})")

    with parsing(refuse):
        content = read_small(file)
    stated = parse_json(content, refuse)
    wrong = mismatch(stated, {"...": ANY})
    if wrong:
        raise refuse(wrong)
    return dict(stated)


def load_frozen(loader: Any, path: str, device: torch.device | str, dtype: torch.dtype) -> Any:
    """The model in ``path``, in eval mode, without gradients.

    Raises:
        UserError: no path, no such folder, or not a model that ``loader`` can read.
    """
    if not path:
        raise UserError(f"{KEY} is not set: give the model's folder, or use autoencoder.kind=dct, which needs none")
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"{KEY}={path}: no config.json there; give the folder of a diffusers {loader.__name__}")
    try:
        model = loader.from_pretrained(path, torch_dtype=dtype, local_files_only=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{KEY}={path}: {loader.__name__} cannot be loaded from this folder: {reason}") from error
    return model.to(device).eval().requires_grad_(False)
