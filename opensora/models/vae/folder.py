"""Reading a diffusers autoencoder from a local folder, with errors that name the key."""

from pathlib import Path
from typing import Any

import torch

from opensora.models.pretrained import load_pretrained
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import ANY, mismatch, parse_json, parsing, read_small
from opensora.utils.files.user_files import absence

KEY = "vae.path"
MAX_STRIDE, MAX_CHANNELS = 64, 4096  # of an autoencoder, as its config.json states them


def stated_shape(path: str) -> dict[str, Any]:
    """The folder's config.json, or {} when there is no folder yet (the published numbers hold then)."""
    file = config_file(path)
    if file is None:
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


def place_of(path: str) -> str:
    """Where the autoencoder at ``vae.path`` is: there, or in the folder ``vae`` of a whole diffusers pipeline."""
    inside = Path(path) / "vae"
    whole = path and not (Path(path) / "config.json").is_file() and (inside / "config.json").is_file()
    return str(inside) if whole else path


def config_file(path: str) -> Path | None:
    """The folder's config.json, if there is one."""
    file = Path(place_of(path)) / "config.json"
    return file if path and file.is_file() else None


def stated_number(path: str, name: str, otherwise: int, most: int) -> int:
    """A whole number of the folder's config.json.

    Raises:
        UserError: it is none, or absurd.
    """
    value = stated_shape(path).get(name, otherwise)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise UserError(f"{KEY}={path}: config.json has {name}={value!r}; must be an integer from 1 to {most}")
    return value


def check_folder(path: str, model: str) -> None:
    """That a folder of this diffusers class may be there; reads its config.json only.

    Raises:
        UserError: no path, no such folder, or no weights in it.
    """
    if not path:
        raise UserError(
            f"{KEY} is not set: give the folder of a diffusers {model}, or use vae.kind=dct, which needs none"
        )
    path = place_of(path)
    if reason := absence(Path(path) / "config.json", "file"):
        detail = "" if reason.startswith("no such") else f" ({reason})"
        raise UserError(f"{KEY}={path}: no config.json there{detail}; give the folder of a diffusers {model}")
    if not any(Path(path).glob("*.safetensors")) and not any(Path(path).glob("*.bin")):
        raise UserError(f"{KEY}={path}: cannot be loaded, no *.safetensors beside config.json; fetch them")
    stated_shape(path)


def load_frozen(loader: Any, path: str, device: torch.device | str, dtype: torch.dtype) -> Any:
    """The model in ``path``, in eval mode, without gradients.

    Raises:
        UserError: no path, no such folder, not a model that ``loader`` can read, or not all of it.
    """
    check_folder(path, loader.__name__)
    return load_pretrained(KEY, place_of(path), loader, torch_dtype=dtype, low_cpu_mem_usage=False).to(device)
