"""Frames by torchcodec, which needs a version that fits the installed torch and the system's FFmpeg libraries."""

from typing import Any

import numpy as np

from opensora.datasets.frames import Allocate, Deadline, DecodeError, Resize, scale_rgb, short_reason
from opensora.datasets.storage import Source
from opensora.utils.errors import UserError

_AT_ONCE = 8  # frames held at full size


def load() -> Any:
    """The package's decoders.

    Raises:
        UserError: it is not there, or does not find FFmpeg.
    """
    try:
        from torchcodec import decoders
    except ImportError as error:
        remedy = "pip install torchcodec, or use pyav"
        raise UserError(f"data.decoder=torchcodec: {remedy} ({short_reason(error)})") from None
    except (OSError, RuntimeError) as error:  # its libraries load FFmpeg's
        remedy = "install FFmpeg's shared libraries and the torchcodec made for this torch, or use pyav"
        raise UserError(f"data.decoder=torchcodec: {remedy} ({short_reason(error)})") from None
    return decoders


def read_window(
    source: Source, numbers: range, resize: Resize | None, threads: int, deadline: Deadline, allocate: Allocate
) -> np.ndarray:
    """The frames of these numbers; see ``opensora.datasets.decode.read_frames``."""
    decoders = load()
    try:
        with source.open() as file:
            place = source.file if source.size is None else file
            reader = decoders.VideoDecoder(place, dimension_order="NHWC", num_ffmpeg_threads=threads)
            if numbers[-1] >= len(reader):
                raise DecodeError(source.path, f"it has {len(reader)} frames, the window needs {numbers[-1] + 1}")
            frames: np.ndarray | None = None
            for first in range(0, len(numbers), _AT_ONCE):
                deadline.check()
                batch = reader.get_frames_at(indices=list(numbers[first : first + _AT_ONCE])).data.numpy()
                for slot, frame in enumerate(batch, first):
                    scaled = scale_rgb(frame, resize)
                    if frames is None:
                        frames = allocate((len(numbers), *scaled.shape))
                    frames[slot] = scaled
    except (RuntimeError, OSError) as error:  # torch's checks raise RuntimeError
        raise DecodeError(source.path, short_reason(error)) from error
    assert frames is not None
    return frames
