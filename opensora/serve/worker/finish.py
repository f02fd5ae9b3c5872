"""From the pixels of a clip to a finished job: files aside, on the disk, under their names, and only then the row."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from acceleration.files.atomic_write import flush
from opensora.datasets.decode import api
from opensora.inference.save import thumbnails, write_clip
from opensora.serve.jobs import DISK_FULL, SAMPLING_FAILED, JobError
from opensora.serve.store import SPRITES, STILL, THUMBNAIL, VIDEO, Store
from opensora.serve.worker.peers import described
from opensora.utils.files.user_files import written_whole

QUALITY = 85  # of small pictures, out of 100
PROBE_S = 60.0  # longest look into a file that is there already
_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_files(store: Store, id: str, clip: Tensor, fps: float, crf: int) -> dict[str, Any]:
    """Small pictures first, the clip last: where that is, all of it is. On the disk when this returns.

    Args:
        clip: (T, H, W, 3) uint8 on the CPU; a single frame becomes a png.

    Returns:
        What a finished job says of its result, but for the time that it took.

    Raises:
        UserError: a file cannot be written; none is left half-written.
    """
    frames = thumbnails(clip)
    with written_whole(store.video(id, THUMBNAIL)) as aside:
        write_picture(aside, frames[0])
    with written_whole(store.video(id, SPRITES)) as aside:
        write_picture(aside, np.concatenate(list(frames), axis=1))
    path = store.video(id, STILL if len(clip) == 1 else VIDEO)
    with written_whole(path) as aside:
        write_clip(aside, clip, fps, crf)
    flush(path.parent)
    return result_of(path, frames=len(clip), height=clip.shape[1], width=clip.shape[2], fps=fps)


def result_of(path: Path, *, frames: int, height: int, width: int, fps: float) -> dict[str, Any]:
    size = path.stat().st_size
    return {"file": path.name, "width": width, "height": height, "frames": frames, "fps": fps, "bytes": size}


def write_picture(path: Path, frame: NDArray[np.uint8]) -> None:
    """(H, W, 3) uint8 -> webp or jpg, by the suffix."""
    from PIL import Image

    Image.fromarray(np.ascontiguousarray(frame), mode="RGB").save(path, quality=QUALITY)


def already_there(store: Store, id: str, fps: float) -> Mapping[str, Any] | None:
    """The result of a job whose group was lost between file and row; None: its file is not there."""
    for kind in (VIDEO, STILL):
        path = store.video(id, kind)
        if path.is_file():
            try:
                found = api.probe(str(path), timeout_s=PROBE_S)
            except api.DecodeError:  # damaged since it was written: it is made again
                return None
            return result_of(path, frames=found.num_frames, height=found.height, width=found.width, fps=fps)
    return None


def problem_of(error: BaseException) -> JobError:
    """What the client reads of an error while files were written."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return JobError(code=DISK_FULL, message="the disk of the service is full; delete clips, or ask its owner")
        cause = cause.__cause__ or cause.__context__
    return JobError(code=SAMPLING_FAILED, message=f"the file could not be written ({_without_path(error)})")


def _without_path(error: BaseException) -> str:
    """The reason alone: where files lie is nothing for clients."""
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    if isinstance(cause, OSError) and cause.errno is not None:
        return os.strerror(cause.errno)
    return type(error).__name__ if isinstance(error, OSError) else described(error)
