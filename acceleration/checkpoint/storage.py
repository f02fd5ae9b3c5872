"""A directory that appears all at once: written aside, flushed to disk, renamed once.

``manifest.json`` is written last. It lists every file with its size and SHA-256 and says which step the directory
holds, so that a directory without it, or with a file missing, cut short or altered by one bit, is not a checkpoint.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from acceleration.checkpoint.writer import digest_of

MANIFEST = "manifest.json"
STAGING = ".tmp-"
_STALE = re.compile(re.escape(STAGING) + r".+-[0-9a-f]{8}")  # what _aside makes; anything else is not ours to remove
SCHEMA = 2
Files = dict[str, dict[str, Any]]  # name -> {"size": bytes, "sha256": hex}


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
    manifest.write_text(_text(body))
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
    """The manifest of a directory; None if it is not intact, or a listed file is missing or of another size."""
    manifest = _sealed(path)
    try:
        if manifest and all(_is_whole(path / name, about["size"]) for name, about in manifest["files"].items()):
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def damaged(path: Path, files: Files) -> str | None:
    """Name of the first of these files whose bytes are not those that were written; None if all are."""
    for name, about in files.items():
        try:
            if digest_of(str(path / name)) != about["sha256"]:
                return name
        except OSError:
            return name
    return None


def flush(path: Path) -> None:
    """fsync a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a checkpoint: it stops being one before its first file goes. What the manifest does not list stays.

    Raises:
        OSError: it could not be removed, or not all of it.
    """
    manifest = None if path.is_symlink() else _sealed(path)
    if manifest is None:
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


def _sealed(path: Path) -> dict[str, Any] | None:
    """The manifest of a directory as it was written, whatever became of the files that it lists."""
    try:
        text = (path / MANIFEST).read_text()
        manifest = json.loads(text)
        manifest.pop("sha256")
        intact = manifest["schema"] == SCHEMA and text == _text(manifest)
        inside = all(name and name not in (".", "..") and not set(name) & set("/\0") for name in manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if intact and inside else None


def _is_whole(path: Path, size: int) -> bool:
    """Of the size that was written, and a file: to open a pipe would wait for ever."""
    found = path.stat()
    return stat.S_ISREG(found.st_mode) and found.st_size == size


def _text(body: dict[str, Any]) -> str:
    """A manifest as it is written: ``body`` with its own digest."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest})
