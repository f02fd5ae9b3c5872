"""A directory that appears all at once: written aside, flushed to disk, renamed once.

``manifest.json`` is written last. It lists every file with its size and says which step the directory holds, so that a
directory without it, or with a file missing or cut short, is not a checkpoint.
"""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
STAGING = ".tmp-"
SCHEMA = 1


def stage(parent: Path, name: str) -> Path:
    """A fresh directory beside the final one, on the same file system."""
    parent.mkdir(parents=True, exist_ok=True)
    path = parent / f"{STAGING}{name}-{uuid.uuid4().hex[:8]}"
    path.mkdir()
    return path


def commit(staged: Path, final: Path, info: dict[str, Any]) -> None:
    """Describe what is in ``staged``, flush it and make it ``final`` by one rename."""
    files = {str(p.relative_to(staged)): p.stat().st_size for p in sorted(staged.rglob("*")) if p.is_file()}
    for name in files:
        flush(staged / name)
    manifest = staged / MANIFEST
    manifest.write_text(json.dumps({"schema": SCHEMA, **info, "files": files}, indent=1))
    flush(manifest)
    flush(staged)
    if final.exists():  # a damaged directory of the same step, found incomplete on resume
        shutil.rmtree(final)
    os.rename(staged, final)
    flush(final.parent)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a complete directory; None if there is none or a listed file is missing or of another size."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        complete = all((path / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return manifest if complete and manifest.get("schema") == SCHEMA else None


def flush(path: Path) -> None:
    """fsync a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_stale(parent: Path) -> None:
    """Remove what an interrupted save left. Call when no other process writes here."""
    for path in parent.glob(f"{STAGING}*"):
        shutil.rmtree(path, ignore_errors=True)
