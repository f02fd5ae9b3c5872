"""What is in a folder of checkpoints, for anybody who looks: no process group, nothing is written."""

from pathlib import Path
from typing import Any

import torch

from acceleration.checkpoint import shards, storage
from acceleration.checkpoint.pieces import Boxes

PREFIX = "step-"


def steps_in(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder`` by their manifests and file sizes, oldest first."""
    return [p for p in candidates(folder) if storage.read_manifest(p) is not None]


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``; its bytes are not read, see ``CheckpointManager.latest``.

    Raises:
        ValueError: there are step directories but none is complete: starting from zero would lose the run.
    """
    complete = steps_in(folder)
    if not complete and candidates(folder):
        raise ValueError(none_is_good(folder))
    return complete[-1] if complete else None


def candidates(folder: Path) -> list[Path]:
    """Every directory that is called as a checkpoint is, oldest first."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def none_is_good(folder: Path) -> str:
    """What is said where starting from zero would lose the run."""
    return f"{folder}: no checkpoint is complete; move the damaged {PREFIX}* folders away to start anew"


def contents(path: Path) -> dict[str, Any]:
    """Every value of a complete checkpoint by ``section.name``, tensors whole and on the CPU; no process group needed.

    Raises:
        ValueError: ``path`` is not a complete checkpoint.
    """
    manifest = storage.read_manifest(path)
    if manifest is None:
        raise ValueError(f"{path}: not a complete checkpoint")
    types = {name: dtype for dtype, name in shards.DTYPES.items()}
    tensors = {key: torch.empty(shape, dtype=types[name]) for key, (name, shape) in manifest["tensors"].items()}
    held = {key: Boxes(tuple(t.shape), t.dtype, {(0,) * t.dim(): t}, True) for key, t in tensors.items()}
    shards.read([path / name for name in manifest["files"]], held)
    return {**tensors, **manifest["values"]}
