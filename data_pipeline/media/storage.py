"""Where the clips of a run are: files of their own, or members of tar archives that hold them by the hundred.

OUT/media/<2 hex>/<name>.mp4
OUT/media/<shard>-<key>.tar       ``key``: a hash of what is in it
"""

import contextlib
import hashlib
import io
import os
import tarfile
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data_pipeline.media.clip_file import FileFacts, whole_file
from opensora.datasets.decode.common import DecodeError
from opensora.datasets.table.clip_storage import archive_members, locate
from opensora.utils.files.user_files import written_whole

MEDIA = "media"
_TAR_BLOCK = 512


class ClipDamaged(Exception):
    """A clip that a stage has made is not there any more, or not as it was made."""


class Clip(NamedTuple):
    """A clip that is to be kept."""

    path: str  # of its own file, relative to the folder of the run
    bytes: int
    sha256: str


class Place(NamedTuple):
    """Where a clip lies."""

    path: str  # as the table has it: relative to the folder of the run
    offset: int | None = None  # in an archive
    length: int | None = None


def clip_path(name: str) -> str:
    """Of its own file, relative to the folder of the run."""
    return f"{MEDIA}/{name[:2]}/{name}"


def find_clip(out: Path, path: str) -> str | None:
    """What ``locate`` opens: the clip's own file, else a member of an archive; None: it is in neither."""
    if (out / path).is_file():
        return str(out / path)
    name = os.path.basename(path)
    for archive in sorted((out / MEDIA).glob("*.tar")):
        place = _member(archive, name)
        if place is not None:
            return f"{archive}#{name}@{place[0]}+{place[1]}"
    return None


def checked_clip(out: Path, path: str) -> FileFacts | None:
    """Of a clip that is there, whole; None: it has to be made (again)."""
    found = find_clip(out, path)
    if found is None:
        return None
    try:
        source = locate(found)
        with source.open() as file:
            return whole_file(file, os.path.getsize(source.file) if source.size is None else source.size)
    except (DecodeError, OSError):
        return None


def _member(archive: Path, name: str) -> tuple[int, int] | None:
    try:
        return archive_members(str(archive)).get(name)
    except DecodeError:
        return None


def is_there(out: Path, place: Place, size: int) -> bool:
    """Whether a clip of a table can be there, by the size of its file."""
    if place.offset is None:
        return _size(out / place.path) == size
    return _size(out / place.path.split("#", 1)[0]) >= place.offset + size


def is_whole(out: Path, place: Place, sha256: str) -> bool:
    """Whether a clip of a table is as it was made, by all of its bytes."""
    try:
        with locate(str(out / place.path)).open() as file:
            return hashlib.sha256(file.read()).hexdigest() == sha256
    except (DecodeError, OSError):
        return False


def unpack(out: Path, clip: Clip) -> None:
    """Give a clip that lies in an archive a file of its own: ``cut.container`` was tar before.

    Raises:
        UserError: it cannot be written.
        ClipDamaged: it is in none, or not as it was made.
    """
    content = _content(out, clip)
    with written_whole(out / clip.path) as aside:
        aside.write_bytes(content)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def pack(out: Path, shard: str, clips: Sequence[Clip], most_bytes: int, *, check: bool = False) -> list[Place]:
    """Clips of a shard in archives of about ``most_bytes``; those that are there already stay as they are.

    Args:
        check: whether what is in an archive is read, and not only its size looked at.

    Raises:
        UserError: an archive cannot be written.
        ClipDamaged: a clip is not there, or not as it was made.
    """
    places: list[Place] = []
    for part in _parts(clips, most_bytes):
        listed = "".join(f"{clip.path} {clip.sha256}\n" for clip in part)
        key = hashlib.blake2b(listed.encode(), digest_size=8).hexdigest()
        archive = out / MEDIA / f"{shard}-{key}.tar"
        offsets = _offsets(part)
        found = [_place(archive.name, clip, at) for clip, at in zip(part, offsets, strict=True)]
        is_short = _size(archive) < offsets[-1] + part[-1].bytes
        if is_short or (check and not all(map(partial(is_whole, out), found, (clip.sha256 for clip in part)))):
            _write(out, archive, part)
        places += found
    return places


def _place(archive: str, clip: Clip, at: int) -> Place:
    return Place(f"{MEDIA}/{archive}#{os.path.basename(clip.path)}@{at}+{clip.bytes}", at, clip.bytes)


def remove_packed(out: Path, clips: Sequence[Clip]) -> None:
    """The files of their own of clips that are in an archive, and in a table that says so."""
    for clip in clips:
        (out / clip.path).unlink(missing_ok=True)


def remove_archives(out: Path, table: Path, named: Collection[str]) -> None:
    """Those that the table does not name, and that are older than it is: a newer one may be another command's, whose
    table is still to come.

    Args:
        named: paths, relative to ``out``.
    """
    written = table.stat().st_mtime_ns
    for archive in (out / MEDIA).glob("*.tar"):
        with contextlib.suppress(FileNotFoundError):
            if f"{MEDIA}/{archive.name}" not in named and archive.stat().st_mtime_ns < written:
                archive.unlink()


def _parts(clips: Sequence[Clip], most_bytes: int) -> Iterator[list[Clip]]:
    part, held = list[Clip](), 0
    for clip in clips:
        if part and held + clip.bytes > most_bytes:
            yield part
            part, held = [], 0
        part.append(clip)
        held += clip.bytes
    if part:
        yield part


def _write(out: Path, archive: Path, clips: Sequence[Clip]) -> None:
    with written_whole(archive) as aside, tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar:
        for clip in clips:
            info = tarfile.TarInfo(os.path.basename(clip.path))  # its time and owner are 0
            info.size = clip.bytes
            tar.addfile(info, io.BytesIO(_content(out, clip)))


def _content(out: Path, clip: Clip) -> bytes:
    found = find_clip(out, clip.path)
    if found is not None:
        try:
            with locate(found).open() as file:
                content = file.read()
        except (DecodeError, OSError):
            content = b""
        if hashlib.sha256(content).hexdigest() == clip.sha256:
            return content
    raise ClipDamaged(clip.path)


def _offsets(clips: Sequence[Clip]) -> list[int]:
    """Where the bytes of each begin: behind a header of one block, each filled up to whole blocks."""
    offsets, at = [], 0
    for clip in clips:
        offsets.append(at + _TAR_BLOCK)
        at += _TAR_BLOCK + -(-clip.bytes // _TAR_BLOCK) * _TAR_BLOCK
    return offsets
