"""What is in a folder of checkpoints, for anybody who looks: no process group, nothing is written."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from acceleration.checkpoint import atomic_dir, shard_file
from acceleration.checkpoint.atomic_dir import PREFIX, step_of
from acceleration.checkpoint.tensor_shards import Slices


def steps_in(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder`` by their manifests and file sizes, oldest first."""
    return [p for p in candidates(folder) if atomic_dir.read_manifest(p) is not None]


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``; its bytes are not read, see ``CheckpointManager.latest``.

    Raises:
        ValueError: there are step directories but none is complete: starting from zero would lose the run.
    """
    complete = steps_in(folder)
    if not complete and (candidates(folder) or misnamed(folder)):
        raise ValueError(none_is_good(folder))
    return complete[-1] if complete else None


def candidates(folder: Path) -> list[Path]:
    """Every directory that is called as a checkpoint is, oldest first.

    Raises:
        OSError: the folder is there and cannot be listed: that is not to have no checkpoint.
    """
    found = {path: step_of(path.name) for path in _entries(folder) if path.is_dir()}
    steps = {path: step for path, step in found.items() if step is not None}
    return sorted(steps, key=lambda path: steps[path])


def misnamed(folder: Path) -> list[Path]:
    """What was a checkpoint and cannot be taken for one: directories with a manifest by another name, as ``step-8`` or
    a copy, and links by the right name that lead nowhere, as to a disk that is not mounted.

    Raises:
        OSError: as ``candidates``.
    """
    return sorted(path for path in _entries(folder) if _is_lost(path))


def _is_lost(path: Path) -> bool:
    if step_of(path.name) is not None:
        return leads_nowhere(path)
    with contextlib.suppress(OSError):  # what may not be looked into, as lost+found
        return not path.name.startswith(".") and (path / atomic_dir.MANIFEST).is_file()
    return False


def leads_nowhere(path: Path) -> bool:
    """Whether it is a link to nothing."""
    return path.is_symlink() and not path.exists()


def _entries(folder: Path) -> list[Path]:
    """What is in it; ``Path.glob`` would find nothing in a folder that it may not read."""
    try:
        return [folder / name for name in os.listdir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def none_is_good(folder: Path) -> str:
    """What is said where starting from zero would lose the run."""
    return f"{folder}: no checkpoint is complete; move the damaged {PREFIX}* folders away to start anew"


def contents(path: Path) -> dict[str, Any]:
    """Every value of a complete checkpoint by ``section.name``, tensors whole and on the CPU; no process group needed.

    Raises:
        ValueError: ``path`` is not a complete checkpoint.
    """
    try:
        manifest = atomic_dir.manifest_of(path)
    except ValueError as error:
        raise ValueError(f"{path}: not a complete checkpoint ({error})") from None
    lacking = next((part for part in ("tensors", "values") if part not in manifest), None)
    if lacking:
        raise ValueError(f"{path}: not a complete checkpoint ({atomic_dir.MANIFEST} has no {lacking})")
    types = {name: dtype for dtype, name in shard_file.DTYPES.items()}
    tensors = {key: torch.empty(shape, dtype=types[name]) for key, (name, shape) in manifest["tensors"].items()}
    held = {key: Slices(tuple(t.shape), t.dtype, {(0,) * t.dim(): t}, True) for key, t in tensors.items()}
    shard_file.read([path / name for name in manifest["files"]], held)
    return {**tensors, **manifest["values"]}
