"""SHA256SUMS: the digest of every file of an export, beside them, in the form that ``sha256sum -c SHA256SUMS`` reads.

Safetensors, JSON and YAML do not notice a flipped bit; this does. A folder without it is not checked, as most of the
world's weights have none. Whoever replaces a file of such a folder takes its line out first.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from acceleration.files.atomic_write import read_small, replacing
from opensora.utils.errors import UserError

NAME = "SHA256SUMS"
THREADS = 4  # files that are read at a time; hashing leaves the interpreter's lock alone
CHUNK = 1 << 22
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^\0\n]+)", re.ASCII)  # a star: sha256sum -b


def write_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the list, once everything in it is on the disk.

    Args:
        digests: file name -> SHA-256.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(folder / NAME) as file:
        file.write("".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode())


def forget(folder: Path, names: Iterable[str]) -> None:
    """Take files that are about to be replaced or removed out of the list, if there is one.

    Raises:
        OSError: it cannot be written.
    """
    try:
        listed = read_digests(folder)
    except UserError:
        listed = None  # what cannot be read vouches for nothing; what it refused stays refused
    if listed is None:
        return
    kept = {name: digest for name, digest in listed.items() if name not in set(names)}
    if not kept:
        (folder / NAME).unlink()
    elif len(kept) < len(listed):
        write_digests(folder, kept)


def read_digests(folder: Path) -> dict[str, str] | None:
    """File name -> SHA-256; None where there is no list. Of files in folders below only the names are looked at.

    Raises:
        UserError: there is one that cannot be read, is damaged, or names a file that is not there.
    """
    path = folder / NAME
    try:
        text = read_small(path).decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read ({reason}); export again, or remove it to read unchecked") from None
    listed: dict[str, str] = {}
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        found = _LINE.fullmatch(line)
        if found is None or found[2] in listed or not text.endswith("\n"):
            raise UserError(f"{path} line {number}: damaged; export again, or remove the file to read unchecked")
        listed[found[2]] = found[1]
    gone = next((name for name in listed if not (folder / name).is_file()), None)
    if gone is not None:
        raise UserError(f"{path}: names {gone!r}, which is not there; export again, or remove {NAME} to read unchecked")
    return {name: digest for name, digest in listed.items() if "/" not in name}


def damaged(folder: Path, names: Collection[str], listed: Mapping[str, str]) -> str | None:
    """A line on the first of these files whose bytes are not those that the list vouches for; None if all are.

    Files that are not in the list are passed over.
    """
    checked = [name for name in names if name in listed]
    with ThreadPoolExecutor(THREADS) as pool:
        for name, found in zip(checked, pool.map(lambda name: _digest_of(folder / name), checked), strict=True):
            if isinstance(found, OSError):
                reason = found.strerror or found
                return f"{folder / name}: cannot be read ({reason}); make it readable, or copy it again"
            if found != listed[name]:
                return (
                    f"{folder / name}: damaged, or changed since it was exported (its SHA-256 is not that in {NAME}): "
                    f"export or copy it again; if the change was meant, remove {NAME} to read unchecked"
                )
    return None


def verify(folder: Path, names: Collection[str]) -> None:
    """Compare files of a folder with the list beside them, if there is one.

    Raises:
        UserError: the first that differs, by name; or the list is damaged.
    """
    listed = read_digests(folder)
    problem = damaged(folder, names, listed) if listed else None
    if problem:
        raise UserError(problem)


def _digest_of(path: Path) -> str | OSError:
    """SHA-256 of a file, or why it cannot be read, which is no damage."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except OSError as error:
        return error
    return digest.hexdigest()
