"""Weights to safetensors files: one file, or numbered shards with an index, each whole or absent."""

import errno
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from acceleration import tensor_file
from acceleration.files import flush, replacing
from opensora.utils import digests as lists

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9
_PART = ".part-"


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
) -> list[Path]:
    """Write weights as ``model.safetensors``, or as shards with an index where they exceed ``shard_bytes``.

    Args:
        weights: (name, full tensor); may be a collective iterator, which every process has to walk. Never more than
            one shard and one tensor is held in memory.
        write: False on the processes that only walk.
        digests: gets the SHA-256 of every file by its name.

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

    old = [path for path in (folder / INDEX, *folder.glob("model*.safetensors")) if path.exists()]
    lists.forget(folder, [path.name for path in old])
    for path in old:
        path.unlink()
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    names = [SINGLE] if len(parts) == 1 else names
    files = [part.replace(folder / name) for part, name in zip(parts, names, strict=True)]
    flush(folder)
    digests = {} if digests is None else digests
    digests |= {name: found[part.name] for part, name in zip(parts, names, strict=True)}
    if len(parts) == 1:
        return files
    index = {"metadata": {**metadata, "total_size": total}, "weight_map": {n: names[i] for n, i in part_of.items()}}
    return [*files, write_json(folder / INDEX, index, digests)]


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
