"""Every file of a folder, once, however it is reached; what is none is listed with the reason."""

import os
import stat
from collections import deque
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_OURS = (".clip_index",)  # what training keeps beside a table


class LeftOut(NamedTuple):
    """Something in the folder that becomes no row."""

    path: Path
    reason: str  # a few words, counted
    detail: str


@dataclass(frozen=True)
class Entry:
    """A regular file, by one of the ways it can be reached."""

    path: Path
    identity: tuple[int, int] | Path  # equal for all ways to the same file
    linked: bool  # it, or a folder on the way, is a link


def walk(root: Path, passed_over: Set[Path]) -> tuple[list[Entry], list[LeftOut]]:
    """Regular files below a folder in order of their paths, and what else is there.

    Links to folders are followed, each folder is read once: the folder itself before any link to it.

    Args:
        passed_over: resolved paths of files that are not looked at, nor counted.
    """
    files: list[Entry] = []
    left_out: list[LeftOut] = []
    entered: dict[tuple[int, int] | Path, Path] = {}
    folders, links = deque([(root, False)]), deque[tuple[Path, bool]]()
    while folders or links:
        folder, linked = (folders or links).popleft()
        try:
            identity = _identity(folder, folder.stat())
            if identity in entered:
                detail = f"a link to {entered[identity]}, which is read once"
                left_out.append(LeftOut(folder, "folder reached twice", detail))
                continue
            entered[identity] = folder
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            left_out.append(LeftOut(folder, "folder cannot be read", error.strerror or str(error)))
            continue
        for entry in entries:
            found = _look_at(entry, linked, passed_over)
            if isinstance(found, LeftOut):
                left_out.append(found)
            elif isinstance(found, Entry):
                files.append(found)
            elif found is not None:
                (links if entry.is_symlink() else folders).append((found, linked or entry.is_symlink()))
    return sorted(files, key=lambda file: os.fsencode(file.path)), left_out


def by_identity(files: list[Entry]) -> Iterator[list[Entry]]:
    """All ways to each file, in order of the first."""
    ways: dict[tuple[int, int] | Path, list[Entry]] = {}
    for file in files:
        ways.setdefault(file.identity, []).append(file)
    yield from ways.values()


def _look_at(entry: "os.DirEntry[str]", linked: bool, passed_over: Set[Path]) -> Entry | LeftOut | Path | None:
    """A file, something that is none, a folder to enter, or nothing that counts."""
    path = Path(entry.path)
    if entry.name in _OURS:
        return None
    try:
        if entry.name.startswith("."):
            kind = "folder" if entry.is_dir() else "file"
            return LeftOut(path, "hidden", f"a {kind} whose name begins with a dot is passed over")
        found = entry.stat()
    except OSError as error:
        nowhere = entry.is_symlink() and isinstance(error, FileNotFoundError)
        return LeftOut(path, "cannot be read", "a link to nothing" if nowhere else error.strerror or str(error))
    if stat.S_ISDIR(found.st_mode):
        return path
    if not stat.S_ISREG(found.st_mode):
        return LeftOut(path, "not a regular file", "a pipe, socket or device")
    if passed_over and Path(os.path.realpath(path)) in passed_over:
        return None
    return Entry(path, _identity(path, found), linked or entry.is_symlink())


def _identity(path: Path, found: os.stat_result) -> tuple[int, int] | Path:
    """Some file systems number nothing."""
    return (found.st_dev, found.st_ino) if found.st_ino else Path(os.path.realpath(path))
