"""Which files hold the weights at a path: one, shards with an index, or a folder of either."""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from opensora.models.weights.names import some
from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import TORCH_SUFFIXES, check_regular
from opensora.utils.files.untrusted import ANY, TEXT, Each, mismatch, parse_json, parsing, read_small, short_reason

_WANTED = "give a file of weights (.safetensors, .pt, .pth), an index .json, or their folder"
# Folders of published pipelines that hold a denoiser: of diffusers, of the two experts of Wan 2.2, of HunyuanVideo.
OF_PIPELINES = (
    *("transformer", "transformer_2", "high_noise_model", "low_noise_model"),
    *("transformers", "hunyuan-video-t2v-720p/transformers"),
)
SHARDED = "model"  # folder of a checkpoint that ColossalAI writes: shards of torch.save with their index
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")


def weight_files(path: Path, *, torch_files: bool = False) -> tuple[list[Path], dict[str, str]]:
    """(files of the weights, tensor -> name of its file as an index says, empty without one).

    Args:
        torch_files: a folder without safetensors may hold one file of ``torch.save``, or several with an index, as a
            checkpoint of Open-Sora 1.x has them below ``model``.
    """
    try:
        is_folder = path.is_dir()
        if not is_folder:
            check_regular(path)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        absent = isinstance(error, FileNotFoundError)
        raise UserError(f"{path}: {f'no such file or folder: {_WANTED}' if absent else short_reason(error)}") from error
    if not is_folder:
        return _indexed_files(path) if _begins_as_json(path) else (_complete([path]), {})
    with parsing(lambda reason: UserError(f"{path}: cannot be read ({reason})")):
        indices = sorted(path.glob("*.safetensors.index.json"))
        files = sorted(path.glob("*.safetensors"))
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in TORCH_SUFFIXES)
        if torch_files and not indices and not files:
            indices = sorted(path.glob("*.bin.index.json"))
            if not pickled and (path / SHARDED).is_dir():
                return weight_files(path / SHARDED, torch_files=True)
    if len(indices) > 1:
        found = some([index.name for index in indices])
        raise UserError(f"{path}: holds {len(indices)} index files ({found}): give one of them")
    if not indices and not files:
        inside = [name for name in OF_PIPELINES if (path / name).is_dir()]
        if inside:  # what else is there is of the encoders, as Wan's own in pickles
            raise UserError(f"{path}: holds no weights: give {' or '.join(str(path / name) for name in inside)}")
        return [_pickled_file(path, pickled, torch_files=torch_files)], {}
    return _indexed_files(indices[0]) if indices else (_complete(files), {})


def _pickled_file(folder: Path, names: list[str], *, torch_files: bool) -> Path:
    """The file of ``torch.save`` in a folder that has no safetensors.

    Raises:
        UserError: there is none, there are several, or they are not read.
    """
    if not names:
        raise UserError(f"{folder}: holds no weights: {_WANTED}")
    if not torch_files:
        raise UserError(
            f"{folder}: holds no safetensors, and nothing is unpickled ({some(names)}): save its tensors by "
            "safetensors.torch.save_file"
        )
    if len(names) > 1:
        raise UserError(f"{folder}: holds {len(names)} files of weights ({some(names)}): give one of them")
    return folder / names[0]


def _complete(files: list[Path]) -> list[Path]:
    """The files, if no shard of a set is missing, as far as their names tell.

    Raises:
        UserError: one is.
    """
    names = {file.name for file in files}
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            start, count = match[1], int(match[2])
            others = (f"{start}-{number:05d}-of-{match[2]}.safetensors" for number in range(1, count + 1))
            absent = next((name for name in others if name not in names), None)
            if absent is not None:
                there = (file.parent / absent).is_file()
                remedy = "give their folder" if there else f"fetch {absent} too, and give their folder"
                raise UserError(f"{file}: is one of {count} files of the same weights: {remedy}")
    return files


def _begins_as_json(path: Path) -> bool:
    """Whether a file is JSON: in safetensors the first brace comes after 8 bytes of length."""
    with parsing(lambda reason: UserError(f"{path}: cannot be read ({reason})")), path.open("rb") as file:
        start = file.read(9)
    return start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{" and start[8:9] != b"{"


def _indexed_files(index: Path) -> tuple[list[Path], dict[str, str]]:
    def refuse(why: str) -> UserError:
        return UserError(f"{index}: is not a safetensors index ({why}): it needs a weight_map; fetch it again")

    with parsing(refuse):
        content = read_small(index)
    found = parse_json(content, refuse)
    wrong = mismatch(found, {"weight_map": Each(TEXT), "...": ANY})
    if wrong:
        raise refuse(wrong)
    names = sorted(set(found["weight_map"].values()))
    elsewhere = [name for name in names if not name or os.path.basename(name) != name]
    absent = elsewhere or [name for name in names if not os.path.isfile(index.parent / name)]
    if absent or not names:
        shown = some([name[:80] for name in absent]) if absent else "none"
        raise UserError(f"{index}: names files that are not beside it ({shown}): fetch them too")
    return [index.parent / name for name in names], dict(found["weight_map"])


def check_index(shapes: Mapping[str, Collection[str]], index: Mapping[str, str]) -> None:
    """That every tensor is in the file where an index says that it is: files of two releases have the same names.

    Args:
        shapes: file name -> names of its tensors.

    Raises:
        UserError: one is not.
    """
    for tensor, name in index.items():
        if tensor not in shapes[name]:
            raise UserError(
                f"{name}: does not hold {tensor[:200]}, as its index says: fetch the index and its files again"
            )
