"""Frames by torchcodec, which needs a version that fits the installed torch and the system's FFmpeg libraries."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from opensora.datasets.decode.common import Allocate, Deadline, Resize, decoding, read_in_batches, too_short
from opensora.datasets.table.clip_storage import Source
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import short_reason


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
    source: Source, numbers: Sequence[int], resize: Resize | None, threads: int, deadline: Deadline, allocate: Allocate
) -> np.ndarray:
    """The frames of these numbers; see ``opensora.datasets.decode.api.read_frames``."""
    decoders = load()
    with source.open() as file:
        place = os.path.abspath(source.file) if source.size is None else file
        with decoding(source.path):
            reader = decoders.VideoDecoder(place, dimension_order="NHWC", num_ffmpeg_threads=threads)
            total = len(reader)
        if numbers[-1] >= total:
            raise too_short(source.path, total, numbers)

        def read(some: list[int]) -> list[np.ndarray]:
            with decoding(source.path):
                return list(reader.get_frames_at(indices=some).data.numpy())

        return read_in_batches(read, numbers, resize, deadline, allocate)
