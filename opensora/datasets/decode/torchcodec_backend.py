"""Frames by torchcodec, which needs a version that fits the installed torch and the system's FFmpeg libraries."""

import os
from functools import partial
from typing import Any

import numpy as np

from opensora.datasets.decode.common import Allocate, Deadline, DecodeError, Resize, scale_rgb
from opensora.datasets.table.clip_storage import Source
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import parsing, short_reason

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
    """The frames of these numbers; see ``opensora.datasets.decode.api.read_frames``."""
    decoders = load()
    refuse = partial(DecodeError, source.path)
    frames: np.ndarray | None = None
    with source.open() as file:
        place = os.path.abspath(source.file) if source.size is None else file
        with parsing(refuse):
            reader = decoders.VideoDecoder(place, dimension_order="NHWC", num_ffmpeg_threads=threads)
            total = len(reader)
        if numbers[-1] >= total:
            raise DecodeError(source.path, f"it has {total} frames, the window needs {numbers[-1] + 1}")
        for first in range(0, len(numbers), _AT_ONCE):
            deadline.check()
            with parsing(refuse):
                batch = list(reader.get_frames_at(indices=list(numbers[first : first + _AT_ONCE])).data.numpy())
            for slot, frame in enumerate(batch, first):
                scaled = scale_rgb(frame, resize)
                if frames is None:
                    frames = allocate((len(numbers), *scaled.shape))
                frames[slot] = scaled
    assert frames is not None
    return frames
