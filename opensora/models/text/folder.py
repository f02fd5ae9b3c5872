"""Folders of text encoders in the layout of transformers: config.json, weights, tokenizer files; nothing is fetched.

The weights may be one file, shards with an index, or only those of the encoder; see ``weights.py`` for their names.
"""

from functools import partial
from pathlib import Path
from typing import Any

from opensora.utils.errors import UserError
from opensora.utils.files.published_files import how_to_fetch
from opensora.utils.files.untrusted import parse_json, parsing, short
from opensora.utils.files.user_files import absence, read_text

# What transformers reads of a folder, in the order in which it looks; other files in it are variants of these.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

FAMILIES = {"t5_path": "t5", "clip_path": "clip"}  # key -> what the model_type of config.json holds, where it says one


def check_folder(key: str, path: str) -> Path:
    """The folder of a transformers model at ``path``, which may also be its file of weights.

    Args:
        key: of the section ``text``, for messages.

    Raises:
        UserError: no path, no such folder, or no weights in it.
    """
    if not path:
        raise UserError(f"text.{key} is not set: give the folder of a transformers model, or set text.kind=bytes")
    folder = folder_of(path)
    if reason := absence(folder / "config.json", "file"):
        detail = "" if reason.startswith("no such") else f" ({reason})"
        wanted = f"give the folder of a transformers model{how_to_fetch(path)}"
        raise UserError(f"text.{key}={path}: no config.json there{detail}; {wanted}")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise UserError(f"text.{key}={path}: cannot be loaded, no *.safetensors beside config.json; fetch them")
    return folder


def folder_of(path: str) -> Path:
    """Where config.json and the tokenizer are: ``path``, or the folder of the file that it is."""
    return Path(path).parent if Path(path).is_file() else Path(path)


def weights_of(path: str) -> Path:
    """The file or index with the weights: ``path`` if it is one, or what its folder has, variants left aside."""
    place = Path(path)
    if place.is_file():
        return place
    return next((place / name for name in WEIGHTS if (place / name).is_file()), place)


def stated_width(key: str, path: str, name: str) -> int | None:
    """Width of the features that the model in a folder gives, by its config.json; None: it does not say.

    Raises:
        UserError: as ``check_folder``, or config.json cannot be read.
    """
    stated = stated_config(key, path)
    wanted, kind = FAMILIES.get(key, ""), stated.get("model_type")
    if isinstance(kind, str) and wanted not in kind:
        told = f"config.json is of a model of type {short(kind, 40)}"
        raise UserError(f"text.{key}={path}: {told}, must be of type {wanted}; give the folder of one")
    both = stated.get("text_config")  # of a CLIP that reads pictures too
    width = stated.get(name, both.get(name) if isinstance(both, dict) else None)
    return width if isinstance(width, int) else None


def stated_config(key: str, path: str) -> dict[str, Any]:
    """What config.json says.

    Raises:
        UserError: as ``check_folder``, or it is no JSON mapping.
    """
    file = check_folder(key, path) / "config.json"
    refuse = partial(_unreadable, key, path)
    stated = parse_json(read_text(file, f"text.{key}={file}"), refuse)
    if not isinstance(stated, dict):
        raise refuse("no mapping")
    return stated


def _unreadable(key: str, path: str, reason: str) -> UserError:
    return UserError(f"text.{key}={path}: config.json is not readable as JSON ({reason})")


def load_tokenizer(key: str, path: str, loader: Any) -> Any:
    """The tokenizer of class ``loader`` in the folder.

    Raises:
        UserError: its files cannot be read.
    """
    name = f"text.{key}={path}: {loader.__name__} cannot be loaded from this folder"
    with parsing(lambda reason: UserError(f"{name}: {reason}")):
        return loader.from_pretrained(str(check_folder(key, path)), local_files_only=True)
