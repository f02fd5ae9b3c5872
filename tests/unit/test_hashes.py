"""Small pictures and their hashes, held to means and cosines that are written out one by one."""

import math

import numpy as np
import pytest

from data_pipeline.analysis.base import Video
from data_pipeline.analysis.hashes import (
    SIDE,
    HashAnalyser,
    HashConfig,
    distances,
    mirrored_hash,
    picture_hash,
    thumbnail,
    thumbnails,
)
from data_pipeline.media.scan import Frame

VIDEO = Video(file="a.mp4", num_frames=50, fps=25.0, height=90, width=160)


def picture(seed: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """(h, w) uint8: random waves, most of them long."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / (height, width)[0]
    waves = [
        rng.normal() / (1 + v + h) * np.cos(np.pi * (v * y + h * x) + rng.uniform(0, 6.3))
        for v in range(9)
        for h in range(9)
    ]
    whole = np.sum(waves, axis=0)
    return np.interp(whole, (whole.min(), whole.max()), (0, 255)).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(36, 64), (64, 36), (32, 32), (48, 64), (9, 64), (50, 50)])
def test_a_thumbnail_is_the_mean_over_areas(height: int, width: int) -> None:
    grey = picture(1, height, width)
    fine = np.kron(grey, np.ones((SIDE, SIDE), np.int64))  # each pixel 32 x 32 times: areas are whole numbers of these
    blocks = fine.reshape(SIDE, height, SIDE, width).mean(axis=(1, 3))
    assert abs(thumbnail(grey) - blocks).max() <= 0.5 + 1e-9


def cosine_sum(thumb: np.ndarray, v: int, h: int) -> float:
    return sum(
        float(thumb[y, x]) * math.cos(math.pi * v * (y + 0.5) / SIDE) * math.cos(math.pi * h * (x + 0.5) / SIDE)
        for y in range(SIDE)
        for x in range(SIDE)
    )


def test_a_hash_is_the_signs_of_cosines() -> None:
    thumb = picture(2)
    (bits,) = picture_hash(thumb[None])
    for v, h in [(0, 1), (1, 0), (3, 2), (7, 7), (5, 0), (0, 7), (6, 4)]:
        assert bool(int(bits) >> (8 * v + h) & 1) == (cosine_sum(thumb, v, h) > 0)
    assert bool(int(bits) & 1) == (cosine_sum(thumb, 0, 8) > 0)


def test_brightness_and_contrast_do_not_matter() -> None:
    thumb = np.stack([picture(seed) for seed in range(20)])
    dimmed = thumb // 2 + 60
    assert distances(picture_hash(thumb), picture_hash(dimmed)).max() <= 3
    assert (picture_hash(thumb // 2) == picture_hash(dimmed)).all()


def test_the_hash_of_the_mirrored_picture_follows() -> None:
    thumb = np.stack([picture(seed) for seed in range(50)])
    assert (mirrored_hash(picture_hash(thumb)) == picture_hash(thumb[:, :, ::-1])).all()
    assert distances(picture_hash(thumb), mirrored_hash(picture_hash(thumb))).min() == 32


def test_the_hash_of_a_part_is_that_of_the_picture_cut_out() -> None:
    for seed in range(8):
        large = picture(seed, 320, 320)
        part = np.stack([thumbnail(large[16:304, 0:304])])
        (whole, cut) = np.stack([thumbnail(large)])[:, :, :], picture_hash(part)
        assert distances(picture_hash(whole, (0.05, 0.95), (0.0, 0.95)), cut)[0] <= 4
        assert distances(picture_hash(whole), cut)[0] > 4


def test_pictures_are_as_far_apart_as_by_chance() -> None:
    bits = picture_hash(np.stack([picture(seed) for seed in range(100)]))
    apart = distances(bits[:, None], bits[None])[~np.eye(100, dtype=bool)]
    assert 28 < apart.mean() < 36 and apart.min() > 6


def test_a_few_frames_a_second_are_seen() -> None:
    """By their times: of a rate that changes, too."""
    times = [0.0, 0.1, 0.2, 0.5, 0.51, 0.52, 0.53, 1.9, 2.0]
    measurement = HashAnalyser(HashConfig(per_second=2.0)).start(VIDEO)
    pictures = [picture(number, 36, 64) for number in range(len(times))]
    for index, time_s in enumerate(times):
        measurement.see(Frame(index, index, time_s, lambda side, pixels, index=index: pictures[index]))
    found = measurement.columns()
    assert found["hash_frame"] == [0, 3, 7, 8]
    assert found["hash_ms"] == [0, 500, 1900, 2000]
    assert (thumbnails(found["hash_thumb"])[1] == thumbnail(pictures[3])).all()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_rate_must_be_one(value: float) -> None:
    with pytest.raises(ValueError, match="per_second"):
        HashConfig(per_second=value)
