"""Some frames of a video, numbered as the stage ``frames`` saw them."""

from collections.abc import Iterator, Sequence
from fractions import Fraction

from data_pipeline.media.ranges import RangeReader
from data_pipeline.media.scan import Frame, Pictures, ScanReport
from data_pipeline.rows import Row


def stills(path: str, seen: Row, numbers: Sequence[int], timeout_s: float) -> Iterator[Frame]:
    """Those of these numbers, in order. A frame lasts until the next one is asked for.

    Args:
        seen: columns pts, time_base, damaged_packets and damaged_frames of the stage ``frames``.

    Raises:
        DecodeError: one of them cannot be decoded any more, or it takes too long.
    """
    pts, base = seen["pts"], float(Fraction(seen["time_base"]))
    damaged = bool(seen["damaged_packets"] or seen["damaged_frames"])
    pictures: Pictures | None = None
    with RangeReader(path, pts, damaged=damaged, timeout_s=timeout_s) as reader:
        for number in sorted(set(numbers)):
            for frame in reader.frames(number, number + 1):
                if pictures is None:
                    assert reader.about is not None, "it is known as soon as there is a frame"
                    pictures = Pictures(reader.source, reader.about)
                time_s = float(pts[number] - pts[0]) * base
                yield Frame(number, int(pts[number]), time_s, pictures.of(frame, ScanReport()))
