"""Folders of text encoders in the layout of transformers: config.json, weights, tokenizer files; nothing is fetched.

The weights may be one file, shards with an index, or only those of the encoder; see ``weights.py`` for their names.
"""

from functools import partial
from pathlib import Path
from typing import Any

from opensora.models.base import Width
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

# Key -> what the model_type of config.json holds one of, where it says one.
FAMILIES: dict[str, tuple[str, ...]] = {
    "t5_path": ("t5",),
    "umt5_path": ("umt5",),
    "clip_path": ("clip",),
    "llava_path": ("llava", "llama"),
    "image_encoder.path": ("clip",),
}
_OF_PIPELINES = ("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")  # folders of a diffusers pipeline


def named(key: str, path: str) -> str:
    """How messages begin: the key with its section, which is ``text`` unless it says another, and the value."""
    return f"{key if '.' in key else f'text.{key}'}={path}"


def check_folder(key: str, path: str) -> Path:
    """The folder of a transformers model at ``path``, which may also be its file of weights, or the folder of a
    diffusers pipeline that has it.

    Args:
        key: of the section ``text``, or with its section, for messages.

    Raises:
        UserError: no path, no such folder, or no weights in it.
    """
    if not path:
        without = "image_encoder.kind=none" if key.startswith("image_encoder.") else "text.kind=bytes"
        whose = named(key, "").removesuffix("=")
        raise UserError(f"{whose} is not set: give the folder of a transformers model, or set {without}")
    folder = folder_of(key, path)
    if reason := absence(folder / "config.json", "file"):
        detail = "" if reason.startswith("no such") else f" ({reason})"
        wanted = f"give the folder of a transformers model{how_to_fetch(path)}"
        raise UserError(f"{named(key, path)}: no config.json there{detail}; {wanted}")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise UserError(f"{named(key, path)}: cannot be loaded, no *.safetensors beside config.json; fetch them")
    return folder


def folder_of(key: str, path: str) -> Path:
    """Where config.json is: ``path``, the folder of the file that it is, or of a diffusers pipeline the folder in it
    with a model of this kind."""
    place = Path(path).parent if Path(path).is_file() else Path(path)
    if (place / "config.json").is_file():
        return place
    inside = (place / name for name in _OF_PIPELINES if (place / name / "config.json").is_file())
    return next((one for one in inside if _fits(key, _stated(key, path, one))), place)


def tokenizer_of(key: str, path: str) -> Path:
    """Where the tokenizer is: beside the weights, or of a diffusers pipeline in ``tokenizer`` beside ``text_encoder``.

    Raises:
        UserError: as ``check_folder``.
    """
    folder = check_folder(key, path)
    number = folder.absolute().name.removeprefix("text_encoder")  # _2 of text_encoder_2
    beside = folder.absolute().parent / f"tokenizer{number}"
    of_pipeline = folder.absolute().name == f"text_encoder{number}" and beside.is_dir()
    return beside if of_pipeline and not (folder / "tokenizer_config.json").is_file() else folder


def weights_of(key: str, path: str) -> Path:
    """The file or index with the weights: ``path`` if it is one, or what its folder has, variants left aside."""
    if Path(path).is_file():
        return Path(path)
    place = folder_of(key, path)
    return next((place / name for name in WEIGHTS if (place / name).is_file()), place)


def stated_width(key: str, path: str, name: str) -> int | None:
    """Width of the features that the model in a folder gives, by its config.json; None: it does not say.

    Raises:
        UserError: as ``check_folder``, or config.json cannot be read.
    """
    stated = stated_config(key, path)
    if not _fits(key, stated):
        told = f"config.json is of a model of type {short(str(stated['model_type']), 40)}"
        wanted = " or ".join(FAMILIES[key])
        raise UserError(f"{named(key, path)}: {told}, must be of type {wanted}; give the folder of one")
    # Of a model that reads both pictures and text.
    both = stated.get("vision_config" if key.startswith("image_encoder.") else "text_config")
    width = stated.get(name, both.get(name) if isinstance(both, dict) else None)
    return width if isinstance(width, int) else None


def width_at(cfg: Any, key: str, name: str) -> Width:
    """The same of the path that a configuration has at ``key`` of the section ``text``.

    Raises:
        UserError: as ``stated_width``.
    """
    path = getattr(cfg, key)
    return Width(stated_width(key, path, name), f"text.{key}={path}")


def _fits(key: str, stated: dict[str, Any]) -> bool:
    """Whether a config.json may be of a model that the key names."""
    kind = stated.get("model_type")
    return not isinstance(kind, str) or any(one in kind for one in FAMILIES.get(key, ("",)))


def stated_config(key: str, path: str) -> dict[str, Any]:
    """What config.json says.

    Raises:
        UserError: as ``check_folder``, or it is no JSON mapping.
    """
    return _stated(key, path, check_folder(key, path))


def _stated(key: str, path: str, folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    refuse = partial(_unreadable, key, path)
    stated = parse_json(read_text(file, named(key, str(file))), refuse)
    if not isinstance(stated, dict):
        raise refuse("no mapping")
    return stated


def _unreadable(key: str, path: str, reason: str) -> UserError:
    return UserError(f"{named(key, path)}: config.json is not readable as JSON ({reason})")


def load_tokenizer(key: str, path: str, loader: Any) -> Any:
    """The tokenizer of class ``loader`` in the folder.

    Raises:
        UserError: its files cannot be read.
    """
    name = f"{named(key, path)}: {loader.__name__} cannot be loaded from this folder"
    with parsing(lambda reason: UserError(f"{name}: {reason}")):
        return loader.from_pretrained(str(tokenizer_of(key, path)), local_files_only=True)
