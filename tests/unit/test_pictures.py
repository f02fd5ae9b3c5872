"""Small pictures of the one decode: which frames, how large, and what is on them."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.analysis.base import Video
from data_pipeline.analysis.pictures import Pictures, PicturesConfig, jpeg
from data_pipeline.media.scan import Frame

VIDEO = Video(file="a", num_frames=50, fps=25.0, height=90, width=160)


def seen(times: list[float], **config: float) -> tuple[list[int], list[bytes], list[int]]:
    """(frames with a picture, pictures, sides that were asked for) of frames at these times, each of its own grey."""
    asked: list[int] = []

    def picture(index: int):
        def make(side: int, pixels: str) -> np.ndarray:
            assert pixels == "bgr24"
            asked.append(side)
            return np.full((9, 16, 3), 10 * index, np.uint8)

        return make

    album = Pictures(PicturesConfig(**config)).start(VIDEO)  # type: ignore[arg-type]
    for index, time_s in enumerate(times):
        album.see(Frame(index, index, time_s, picture(index)))
    columns = album.columns()
    return columns["picture_frame"], columns["picture_jpeg"], asked


def test_one_a_second_and_nothing_is_scaled_for_the_others() -> None:
    frames, pictures, asked = seen([0.0, 0.4, 0.8, 1.2, 1.6, 2.0, 2.4])
    assert frames == [0, 3, 5]
    assert asked == [160] * 3
    shown = [np.array(Image.open(io.BytesIO(content))) for content in pictures]
    assert [picture.mean() for picture in shown] == pytest.approx([0, 30, 50], abs=2)


def test_of_a_variable_rate_no_second_has_more() -> None:
    assert seen([0.0, 30.0, 30.1, 30.2, 30.3, 31.0, 31.5])[0] == [0, 1, 5]


def test_rate_and_size_can_be_chosen() -> None:
    frames, _, asked = seen([0.0, 0.25, 0.5, 0.75], per_second=2.0, side=64)
    assert frames == [0, 2] and asked == [64, 64]


def test_colours_are_as_they_are_seen() -> None:
    blue = np.zeros((16, 16, 3), np.uint8)
    blue[..., 0] = 255  # of BGR
    red, green, as_blue = np.array(Image.open(io.BytesIO(jpeg(blue, 95)))).reshape(-1, 3).mean(0)
    assert as_blue > 240 and red < 15 and green < 15


def test_a_better_quality_is_larger() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (90, 160, 3), np.uint8)
    assert len(jpeg(noise, 40)) < len(jpeg(noise, 90))


@pytest.mark.parametrize("clip", ["chaplin.mp4", "sintel_trailer_30s.mp4"])
def test_pictures_of_a_real_clip_are_its_frames(clip: str, shared_media: Path) -> None:
    from data_pipeline.media.scan import ScanReport, scan
    from opensora.datasets.decode.api import read_frames

    album = Pictures(PicturesConfig(quality=95)).start(VIDEO)
    for frame in scan(str(shared_media / "clips" / clip), ScanReport(), frames=200, timeout_s=60):
        album.see(frame)
        if frame.index == 100:
            break
    columns = album.columns()
    number, content = columns["picture_frame"][-1], columns["picture_jpeg"][-1]
    picture = Image.open(io.BytesIO(content))
    (expected,) = read_frames(str(shared_media / "clips" / clip), number, 1)
    small = np.array(Image.fromarray(expected).resize(picture.size, Image.Resampling.BOX), np.float64)
    assert max(picture.size) == 160
    assert np.abs(small - np.array(picture, np.float64)).mean() < 4.0
