"""Frames by decord, or decord2, which has the same interface and is maintained.

The choice among several video streams is decord's own; clips that are not shown as they are stored do not come here
(``opensora.datasets.decode.api``). A damaged frame is replaced by its neighbour
without a word, and in some H.265 clips a frame reached by seeking is the next one. Where these matter, use pyav.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from opensora.datasets.decode.common import Allocate, Deadline, Resize, decoding, read_in_batches, too_short
from opensora.datasets.table.clip_storage import Source
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import short_reason


def load() -> Any:
    """The package.

    Raises:
        UserError: it is not there.
    """
    try:
        import decord
    except (ImportError, OSError) as error:
        raise UserError(f"data.decoder=decord: pip install decord2, or use pyav ({short_reason(error)})") from None
    return decord


def read_window(
    source: Source, numbers: Sequence[int], resize: Resize | None, threads: int, deadline: Deadline, allocate: Allocate
) -> np.ndarray:
    """The frames of these numbers; see ``opensora.datasets.decode.api.read_frames``."""
    decord = load()
    with source.open() as file, decoding(source.path):
        place = os.path.abspath(source.file) if source.size is None else file
        reader = decord.VideoReader(place, num_threads=threads)
        total = len(reader)
    if numbers[-1] >= total:
        raise too_short(source.path, total, numbers)

    def read(some: list[int]) -> np.ndarray:
        with decoding(source.path):
            return _frames(decord, reader, some)

    return read_in_batches(read, numbers, resize, deadline, allocate)


def _frames(decord: Any, reader: Any, numbers: list[int]) -> np.ndarray:
    """(n, H, W, 3) uint8. Decord pads the rows of frames 8, 12, 16, 24 and 48 pixels wide, counts the padding as
    channels, and has no room for it in a batch; one by one they can be read, and the padding cut off.
    """
    try:
        return reader.get_batch(numbers).asnumpy()
    except decord.DECORDError:
        single = [reader[number].asnumpy() for number in numbers]
        height, width, channels = single[0].shape
        if channels == 3:
            raise
        rows = np.stack(single).reshape(len(numbers), height, -1)
        return rows[:, :, : 3 * width].reshape(len(numbers), height, width, 3)
