"""A directory that appears all at once: written aside, flushed to disk, renamed once.

``manifest.json`` is written last. It lists every file with its size and SHA-256 and says which step the directory
holds, so that a directory without it, or with a file missing, cut short or altered by one bit, is not a checkpoint.
"""

import os
import re
import shutil
import stat
import uuid
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

from acceleration.checkpoint.writer_process import digest_of
from acceleration.files.atomic_write import flush, read_small
from acceleration.files.sealed_json import COUNT, OBJECT, SHA256, Each, Kind, Shape, seal, unseal
from acceleration.files.tensor_file import DTYPES

MANIFEST = "manifest.json"
PREFIX = "step-"
STAGING = ".tmp-"
_STALE = re.compile(re.escape(STAGING) + r".+-[0-9a-f]{8}")  # what _aside makes; anything else is not ours to remove
SCHEMA = 2
Files = dict[str, dict[str, Any]]  # name -> {"size": bytes, "sha256": hex}
MAX_DIMS = 64
_NAME = re.compile(r"(?:[0-9]{8}|[1-9][0-9]{8,18})", re.ASCII)  # of a step, behind the prefix
_ITEM_BYTES = {name: dtype.itemsize for dtype, name in DTYPES.items()}
_SIZES = Kind(
    f"a list of at most {MAX_DIMS} sizes",
    lambda value: isinstance(value, list) and len(value) <= MAX_DIMS and all(map(COUNT.test, value)),
)
_SHAPE: Shape = {
    "schema": Kind(str(SCHEMA), lambda value: value == SCHEMA),
    "step": COUNT,
    "files": Each({"size": COUNT, "sha256": SHA256}),
    "tensors?": Each([Kind(f"one of {', '.join(_ITEM_BYTES)}", lambda v: v in list(_ITEM_BYTES)), _SIZES]),
    "values?": OBJECT,
    "...": OBJECT,  # what the run says of itself; see ``CheckpointManager``
}


def step_name(step: int) -> str:
    """What the directory of a step is called."""
    return f"{PREFIX}{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a directory that is called as ``step_name`` calls it; None for any other name."""
    number = name.removeprefix(PREFIX)
    return int(number) if number != name and _NAME.fullmatch(number) else None


def stage(parent: Path, name: str) -> Path:
    """A fresh directory beside the final one, on the same file system."""
    parent.mkdir(parents=True, exist_ok=True)
    path = _aside(parent / name)
    path.mkdir()
    return path


def commit(staged: Path, final: Path, info: dict[str, Any], files: Files) -> None:
    """Describe what is in ``staged`` and make it ``final`` by one rename. The files are on the disk already."""
    body = {"schema": SCHEMA, **info, "files": files}
    manifest = staged / MANIFEST
    manifest.write_text(seal(body))
    flush(manifest)
    flush(staged)
    before = _aside(final, "damaged-")
    if final.exists():  # a damaged directory of the same step, found so on resume: kept until the new one is complete
        os.rename(final, before)
    try:
        os.rename(staged, final)
    except OSError:
        if before.exists():
            os.rename(before, final)
        raise
    flush(final.parent)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a directory; None where ``manifest_of`` refuses it."""
    try:
        return manifest_of(path)
    except ValueError:
        return None


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest of a directory, which is checked here and nowhere else before it is used.

    Raises:
        ValueError: it is not what was written, not of the right shape, or of another step than the directory's name
            says, or a listed file is missing or of another size; says what.
    """
    manifest = _sealed(path)
    step, files = manifest["step"], manifest["files"]
    if path.name.startswith(PREFIX) and path.name != step_name(step):
        raise ValueError(f"holds step {step} by its {MANIFEST}, so should be called {step_name(step)}")
    for name, about in files.items():
        try:
            whole = _is_whole(path / name, about["size"])
        except (OSError, ValueError):  # ValueError: a name that no file can have
            whole = False
        if not whole:
            raise ValueError(name if name.isprintable() else ascii(name))
    room = sum(about["size"] for about in files.values())
    for key, (dtype, sizes) in manifest.get("tensors", {}).items():
        room -= prod(sizes) * _ITEM_BYTES[dtype]
        if room < 0:
            raise ValueError(f"{MANIFEST}: tensors.{key[:99]!r}: {dtype} {sizes} is more than the files hold")
    return manifest


def damaged(path: Path, files: Files) -> str | None:
    """Name of the first of these files whose bytes are not those that were written; None if all are."""
    for name, about in files.items():
        try:
            if digest_of(str(path / name)) != about["sha256"]:
                return name
        except OSError:
            return name
    return None


def remove(path: Path) -> None:
    """Remove a checkpoint: it stops being one before its first file goes. What the manifest does not list stays.

    Raises:
        OSError: it could not be removed, or not all of it.
    """
    if path.is_symlink():
        return
    try:
        manifest = _sealed(path)
    except ValueError:
        return
    ours = (MANIFEST, *manifest["files"])
    if {entry.name for entry in path.iterdir()}.issubset(ours):
        aside = _aside(path, "old-")
        os.rename(path, aside)
        path = aside
    for name in ours:
        (path / name).unlink(missing_ok=True)
    with suppress(OSError):  # a file of someone else's keeps the directory
        path.rmdir()


def remove_stale(parent: Path) -> None:
    """Remove what an interrupted save left. Call when no other process writes here."""
    for path in parent.glob(f"{STAGING}*"):
        if _STALE.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _aside(final: Path, what: str = "") -> Path:
    """A name beside ``final`` that nothing has, and that ``remove_stale`` knows."""
    return final.with_name(f"{STAGING}{what}{final.name}-{uuid.uuid4().hex[:8]}")


def _sealed(path: Path) -> dict[str, Any]:
    """The manifest of a directory as it was written, whatever became of the files that it lists.

    Raises:
        ValueError: it is damaged, or names a file that is not in the directory.
    """

    def refuse(problem: str) -> ValueError:
        return ValueError(f"{MANIFEST}: {problem}")

    try:
        content = read_small(path / MANIFEST)
    except (OSError, ValueError) as error:
        raise refuse(getattr(error, "strerror", None) or str(error)) from None
    manifest = unseal(content, refuse, _SHAPE)
    outside = next((n for n in manifest["files"] if not n or n in (".", "..") or set(n) & set("/\0")), None)
    if outside is not None:
        raise refuse(f"files.{outside!r} is not a name in this directory")
    return manifest


def _is_whole(path: Path, size: int) -> bool:
    """Of the size that was written, and a file: to open a pipe would wait for ever."""
    found = path.stat()
    return stat.S_ISREG(found.st_mode) and found.st_size == size
