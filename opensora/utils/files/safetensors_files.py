"""Weights in safetensors files: one file or numbered shards with an index, written whole or not at all, read with care.

Files come from strangers: what is opened is a regular file, whatever it is called; what is no safetensors is named.
"""

import errno
import hashlib
import json
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from acceleration.files import tensor_file
from acceleration.files.atomic_write import flush, replacing
from opensora.utils.errors import UserError
from opensora.utils.files import digests as lists
from opensora.utils.files.untrusted import parsing

STEM = "model"  # of files of weights
INDEX = f"{STEM}.safetensors.index.json"
SINGLE = f"{STEM}.safetensors"
SHARD_BYTES = 5 * 10**9
_PART = ".part-"
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")  # of files of torch.save
FLOATS = ("F64", "F32", "F16", "BF16")  # types of weights, as safetensors calls them
# Beside quantized weights, which are no weights without them: of scaled fp8, and of bitsandbytes, nvfp4 and others.
_MARKS = (
    *(".scale_weight", ".weight_scale", ".weight_scale_inv", ".scale_input", ".input_scale", ".comfy_quant"),
    *(".absmax", ".quant_map", ".SCB", ".weight_scale_2", ".pre_quant_scale", ".weight_zero_point", ".weight_packed"),
    *(".bitsandbytes__nf4", ".bitsandbytes__fp4", ".scaled_fp8"),
)
_OTHER_FILES = (  # first bytes, what they are of, what to do
    (b"PK\x03\x04", "a file of torch.save", "nothing is unpickled; save its tensors by safetensors.torch.save_file"),
    (b"\x80", "a pickle", "nothing is unpickled; save its tensors by safetensors.torch.save_file"),
    (b"GGUF", "a GGUF file of quantized weights", "give the safetensors that it was made of"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "fetch it with git lfs pull"),
    (b"<", "a web page", "download the file again, and log in where that is needed"),
    (b"\x93NUMPY", "a NumPy file", "save its tensors by safetensors.torch.save_file"),
    (b"\x89HDF", "an HDF5 file", "save its tensors by safetensors.torch.save_file"),
)


def write_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], digests: dict[str, str] | None = None
) -> Path:
    """One safetensors file, written aside, flushed to the disk and renamed. Folders are made. The same tensors and
    metadata are the same bytes, in whatever order they come.

    Args:
        digests: gets the SHA-256 of the file by its name.

    Raises:
        OSError: it could not be written; what was at ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    try:
        lists.forget(path.parent, [path.name])
        with replacing(path) as file:
            for part in tensor_file.parts(tensors, metadata):
                digest.update(part)
                file.write(part)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OSError(f"{path}: {'disk full' if full else 'cannot be written'} ({error.strerror or error})") from error
    if digests is not None:
        digests[path.name] = digest.hexdigest()
    return path


def write_json(path: Path, value: object, digests: dict[str, str] | None = None) -> Path:
    """What describes the tensors beside it, as JSON. Arguments and errors as of ``write_file``."""
    content = json.dumps(value, indent=1).encode()
    lists.forget(path.parent, [path.name])
    with replacing(path) as file:
        file.write(content)
    if digests is not None:
        digests[path.name] = hashlib.sha256(content).hexdigest()
    return path


def write_weights(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    *,
    write: bool = True,
    shard_bytes: int = SHARD_BYTES,
    digests: dict[str, str] | None = None,
    stem: str = STEM,
) -> list[Path]:
    """Write weights as ``model.safetensors``, or as shards with an index where they exceed ``shard_bytes``.

    Args:
        weights: (name, full tensor); may be a collective iterator, which every process has to walk. Never more than
            one shard and one tensor is held in memory.
        write: False on the processes that only walk.
        digests: gets the SHA-256 of every file by its name.
        stem: what files are called in place of ``model``.

    Returns:
        The files written; weights that were in the folder before are gone.

    Raises:
        OSError: they could not be written; the iterator was walked to its end all the same, for the sake of those
            who walk it too, and weights that were in the folder before are as they were.
    """
    if not write:
        for _ in weights:
            pass
        return []
    for left in (*folder.glob(f"{_PART}*"), *folder.glob(f".{_PART}*")):  # by an export that was killed
        left.unlink()
    parts: list[Path] = []
    part_of: dict[str, int] = {}
    found: dict[str, str] = {}
    total = 0
    problem: OSError | None = None
    for held in _shards(weights, shard_bytes):
        part_of |= dict.fromkeys(held, len(parts))
        total += sum(tensor.nbytes for tensor in held.values())
        try:
            if problem is None:
                parts.append(write_file(folder / f"{_PART}{len(parts):05d}", held, metadata, found))
        except OSError as error:
            problem = error
    if problem:
        for part in parts:
            part.unlink()
        raise problem

    listing = f"{stem}.safetensors.index.json"
    old = [path for path in (folder / listing, *folder.glob(f"{stem}*.safetensors")) if path.exists()]
    lists.forget(folder, [path.name for path in old])
    for path in old:
        path.unlink()
    names = [f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    names = [f"{stem}.safetensors"] if len(parts) == 1 else names
    files = [part.replace(folder / name) for part, name in zip(parts, names, strict=True)]
    flush(folder)
    digests = {} if digests is None else digests
    digests |= {name: found[part.name] for part, name in zip(parts, names, strict=True)}
    if len(parts) == 1:
        return files
    index = {"metadata": {**metadata, "total_size": total}, "weight_map": {n: names[i] for n, i in part_of.items()}}
    return [*files, write_json(folder / listing, index, digests)]


def _shards(weights: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The weights in order, as many at a time as fit in ``shard_bytes``, at least one."""
    held: dict[str, Tensor] = {}
    for name, weight in weights:
        if held and sum(tensor.nbytes for tensor in held.values()) + weight.nbytes > shard_bytes:
            yield held
            held.clear()  # not another one: who was given this one still has it
        held[name] = weight
    yield held


def fingerprint(path: str | Path, *, samples: int = 16, sample_bytes: int = 2**16) -> str:
    """16 hex digits that say which weights these are: of sizes and samples of all safetensors at ``path``.

    Training changes nearly every value, so samples tell one set of weights from another without reading all of it.
    Where the files are called and lie does not matter, how they are cut does.
    """
    digest = hashlib.blake2b(digest_size=8)
    place = Path(path)
    folder = place.parent if place.suffix == ".json" else place
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else [place]:
        size = file.stat().st_size
        digest.update(f"{size}|".encode())
        with file.open("rb") as opened:
            for index in range(samples):
                opened.seek(max(0, size - sample_bytes) * index // (samples - 1))
                digest.update(opened.read(sample_bytes))
    return digest.hexdigest()


@dataclass(frozen=True)
class OpenWeights:
    """A safetensors file of which the header is read: what is in it, and access to its tensors."""

    path: Path
    file: Any  # of safetensors: get_tensor(name), get_slice(name)
    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str]  # as safetensors calls them: F32, BF16, ...


def open_weights(path: Path) -> OpenWeights:
    """Open a safetensors file by its content, whatever its name is.

    Raises:
        UserError: it is no regular file, cannot be read, or is of another format, which is named.
    """

    def refuse(reason: str) -> UserError:
        kind = "as safetensors" if path.suffix not in TORCH_SUFFIXES else "as a file of torch.save, nor as safetensors"
        return UserError(f"{path}: cannot be read {kind} ({reason}): fetch or export it again")

    with parsing(refuse):
        check_regular(path)
        with path.open("rb") as raw:
            start = raw.read(32)
        for first, kind, remedy in _OTHER_FILES:
            if start.startswith(first) and start[8:9] != b"{":
                raise UserError(f"{path}: is {kind}, not safetensors: {remedy}")
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        types = {name: str(part.get_dtype()) for name, part in slices.items()}
        return OpenWeights(path, file, dict(file.metadata() or {}), shapes, types)


def check_regular(path: Path) -> None:
    """That opening a path does not wait for somebody to write into it, or never end.

    Raises:
        UserError: it is a pipe, a device or a socket.
        OSError: it is not there.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kind = "a named pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise UserError(f"{path}: is {kind}: give a file; what is streamed must be saved first")


def check_types(opened: OpenWeights, names: Iterable[str], types: tuple[str, ...] = FLOATS) -> None:
    """That tensors are floating-point numbers that mean what they say.

    Args:
        types: those that are read.

    Raises:
        UserError: the first that is not, quantized ones by their name.
    """
    allowed = f"must be one of {', '.join(types)}"
    remedy = f"{allowed}; give the bf16 or fp16 weights"
    mark = next((name for name in opened.types if f".{name}".endswith(_MARKS)), "")
    for name in names:
        found = opened.types[name]
        if f".{name}".endswith(_MARKS):
            raise UserError(f"{opened.path}: {name} belongs to quantized weights, which are not read: {remedy}")
        if found not in types and (mark or found.startswith("F8")):
            kind = "fp8" if found.startswith("F8") else "quantized"
            said = f"{'scaled ' if kind == 'fp8' else ''}{kind}, with {mark}" if mark else kind
            raise UserError(f"{opened.path}: {name} is {found} ({said}): {remedy}")
        if found not in types:
            raise UserError(f"{opened.path}: {name} is {found}: {allowed}; convert it, or give other weights")
