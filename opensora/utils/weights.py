"""Weights to safetensors files: one file, or numbered shards with an index, each whole or absent."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """One safetensors file, written aside and renamed. Folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata=dict(metadata))
    os.replace(aside, path)
    return path


def write_weights(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    *,
    write: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write weights as ``model.safetensors``, or as shards with an index where they exceed ``shard_bytes``.

    Args:
        weights: (name, full tensor); may be a collective iterator, which every process has to walk. Never more than
            one shard is held in memory.
        write: False on the processes that only walk.

    Returns:
        The files written; weights that were in the folder before are gone.
    """
    parts: list[Path] = []
    part_of: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    total = 0

    def put_aside() -> None:
        parts.append(write_file(folder / f".part-{len(parts):05d}", held, metadata))
        held.clear()

    for name, weight in weights:
        if not write:
            continue
        if held and sum(tensor.nbytes for tensor in held.values()) + weight.nbytes > shard_bytes:
            put_aside()
        held[name] = weight
        part_of[name] = len(parts)
        total += weight.nbytes
    if not write:
        return []
    put_aside()

    for old in (*folder.glob("model*.safetensors"), folder / INDEX):
        old.unlink(missing_ok=True)
    if len(parts) == 1:
        return [parts[0].replace(folder / SINGLE)]
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    files = [part.replace(folder / name) for part, name in zip(parts, names, strict=True)]
    index = {"metadata": {**metadata, "total_size": total}, "weight_map": {n: names[i] for n, i in part_of.items()}}
    (folder / INDEX).write_text(json.dumps(index, indent=1))
    return [*files, folder / INDEX]


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
