"""A directory that appears all at once: written aside, flushed to disk, renamed once.

``manifest.json`` is written last. It lists every file with its size and SHA-256 and says which step the directory
holds, so that a directory without it, or with a file missing, cut short or altered by one bit, is not a checkpoint.
"""

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from acceleration.checkpoint.writer import digest_of

MANIFEST = "manifest.json"
STAGING = ".tmp-"
SCHEMA = 2
Files = dict[str, dict[str, Any]]  # name -> {"size": bytes, "sha256": hex}


def stage(parent: Path, name: str) -> Path:
    """A fresh directory beside the final one, on the same file system."""
    parent.mkdir(parents=True, exist_ok=True)
    path = parent / f"{STAGING}{name}-{uuid.uuid4().hex[:8]}"
    path.mkdir()
    return path


def commit(staged: Path, final: Path, info: dict[str, Any], files: Files) -> None:
    """Describe what is in ``staged`` and make it ``final`` by one rename. The files are on the disk already."""
    body = {"schema": SCHEMA, **info, "files": files}
    manifest = staged / MANIFEST
    manifest.write_text(json.dumps({**body, "sha256": _seal(body)}))
    flush(manifest)
    flush(staged)
    if final.exists():  # a damaged directory of the same step, found so on resume: kept until the new one is complete
        os.rename(final, final.with_name(f"{STAGING}damaged-{final.name}-{uuid.uuid4().hex[:8]}"))
    os.rename(staged, final)
    flush(final.parent)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a directory; None if it is not intact, or a listed file is missing or of another size."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        seal = manifest.pop("sha256")
        intact = manifest["schema"] == SCHEMA and seal == _seal(manifest)
        complete = all((path / name).stat().st_size == about["size"] for name, about in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if intact and complete else None


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
    """Remove a checkpoint: it stops being one before its first file goes."""
    if path.is_symlink() or not path.is_dir():
        return
    aside = path.with_name(f"{STAGING}old-{path.name}-{uuid.uuid4().hex[:8]}")
    os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_stale(parent: Path) -> None:
    """Remove what an interrupted save left. Call when no other process writes here."""
    for path in parent.glob(f"{STAGING}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _seal(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
