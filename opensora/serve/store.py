"""Files of the service beside its queue: videos, thumbnails, sprite sheets, references. Names come from ids alone."""

import contextlib
import os
import re
import shutil
from pathlib import Path

_ID = re.compile(r"video_[0-9a-f]{32}")
_NAME = re.compile(r"video_[0-9a-f]{32}(-[0-9]+)?\.(mp4|png|webp|jpg)")
VIDEO, STILL, THUMBNAIL, SPRITES = "mp4", "png", "webp", "jpg"


class Store:
    """Folders of a service: ``videos/``, ``references/``, ``removed/``."""

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self.videos, self.references, self._removed = (self.out / name for name in ("videos", "references", "removed"))
        for folder in (self.videos, self.references, self._removed):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def queue_file(self) -> Path:
        return self.out / "queue.sqlite"

    def video(self, id: str, kind: str = VIDEO) -> Path:
        """Where a result lies: mp4 of a clip, png of a still, webp thumbnail, jpg sprite sheet."""
        if not _ID.fullmatch(id):
            raise ValueError(f"{id!r} is no id of a job")
        return self.videos / f"{id}.{kind}"

    def reference(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a reference")
        return self.references / name

    def remove(self, id: str, references: tuple[str, ...] = ()) -> None:
        """All files of a job; those that are gone are no error."""
        for kind in (VIDEO, STILL, THUMBNAIL, SPRITES):
            self.video(id, kind).unlink(missing_ok=True)
        for name in references:
            self.reference(name).unlink(missing_ok=True)

    def mark_removed(self, id: str) -> None:
        """A job that is to be forgotten as soon as it has ended; nobody sees it from now on."""
        (self._removed / self.video(id).stem).touch()

    def unmark_removed(self, id: str) -> None:
        (self._removed / self.video(id).stem).unlink(missing_ok=True)

    def is_marked_removed(self, id: str) -> bool:
        return (self._removed / self.video(id).stem).exists()

    def marked_removed(self) -> list[str]:
        return sorted(entry.name for entry in os.scandir(self._removed) if _ID.fullmatch(entry.name))

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.out).free

    def used_bytes(self) -> int:
        """Of videos and references; a file that goes meanwhile is no error."""
        total = 0
        for folder in (self.videos, self.references):
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat().st_size
        return total
