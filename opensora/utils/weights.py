"""Weights as safetensors: what inference and other tools read."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def write_weights(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    metadata: dict[str, str],
    *,
    write: bool,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Write weights as ``model.safetensors``, or as numbered shards with an index where they exceed ``shard_bytes``.

    ``weights`` may be a collective iterator: every process walks it, those with ``write`` keep and write; never more
    than one shard is held in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Path] = []
    where: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    held_bytes = total_bytes = 0

    def flush() -> None:
        shards.append(folder / f"part-{len(shards):05d}.safetensors")
        save_file(held, shards[-1], metadata=metadata)
        held.clear()

    for name, weight in weights:
        if not write:
            continue
        size = weight.numel() * weight.element_size()
        if held and held_bytes + size > shard_bytes:
            flush()
            held_bytes = 0
        held[name] = weight.contiguous()
        where[name] = len(shards)
        held_bytes += size
        total_bytes += size
    if not write:
        return
    flush()
    if len(shards) == 1:
        shards[0].replace(folder / SINGLE)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for path, name in zip(shards, names, strict=True):
        path.replace(folder / name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": {name: names[i] for name, i in where.items()}}
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def read_weights(folder: Path) -> "WeightReader":
    """Open what ``write_weights`` wrote, reading tensors one by one.

    Raises:
        FileNotFoundError: no weights in ``folder``.
    """
    return WeightReader(folder)


class WeightReader:
    """Weights by name, read when asked for, so that a process never holds more than one."""

    def __init__(self, folder: Path) -> None:
        if (folder / INDEX).exists():
            self._file_of = json.loads((folder / INDEX).read_text())["weight_map"]
        elif (folder / SINGLE).exists():
            with safe_open(folder / SINGLE, framework="pt") as file:
                self._file_of = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX} is there")
        self._folder = folder

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._folder / self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)
