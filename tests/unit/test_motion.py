"""Motion between frames, of scenes that a virtual camera moves over: against the motion it was given."""

import math

import cv2
import numpy as np
import pytest

from data_pipeline.analysis.base import Video
from data_pipeline.analysis.motion import MotionAnalyser, MotionConfig, textured_points
from data_pipeline.media.scan import Frame
from data_pipeline.quality.camera import Pairs, describe_motion, mean_radius, tremble

VIDEO = Video(file="a", num_frames=50, fps=30.0, height=180, width=320)
HEIGHT, WIDTH = 180, 320
FAMILY = {"static": 0.5, "shake": 3.0, "mixed": 0.5}


def scene(seed: int = 0) -> np.ndarray:
    """(700, 900) uint8: spots of all sizes from 3 pixels on."""
    rng = np.random.default_rng(seed)
    layers = []
    for size in (6, 12, 30, 80):
        layer = rng.normal(0, 1, (700 // size, 900 // size))
        layers.append(cv2.resize(layer, (900, 700), interpolation=cv2.INTER_CUBIC))
    picture = sum(layers)
    return np.clip(128 + 40 * picture, 0, 255).astype(np.uint8)


def seen(picture: np.ndarray, right: float, down: float, scale: float, clockwise: float) -> np.ndarray:
    """(HEIGHT, WIDTH): a point of the scene at its centre is ``right`` and ``down`` of the centre, in pixels."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH].astype(np.float64)
    x, y = columns - (WIDTH - 1) / 2 - right, rows - (HEIGHT - 1) / 2 - down
    cos, sin = math.cos(clockwise) / scale, math.sin(clockwise) / scale
    of_x, of_y = cos * x + sin * y + picture.shape[1] / 2, -sin * x + cos * y + picture.shape[0] / 2
    return cv2.remap(picture, of_x.astype(np.float32), of_y.astype(np.float32), cv2.INTER_LINEAR)


def measured(pictures: list[np.ndarray], rate: float, **config: float) -> dict[str, np.ndarray]:
    measurement = MotionAnalyser(MotionConfig(**config)).start(VIDEO)
    for index, picture in enumerate(pictures):
        measurement.see(Frame(index, index, index / rate, lambda side, pixels, shown=picture: shown))
    return measurement.columns()


def moved(speeds: tuple[float, float, float, float], rate: float = 30.0, seconds: float = 2.0) -> dict[str, np.ndarray]:
    """Columns of a scene that moves: right and down in widths, logarithm of scale, radians; a second."""
    picture, times = scene(), np.arange(round(rate * seconds)) / rate
    right, down, larger, clockwise = speeds
    pictures = [seen(picture, right * WIDTH * t, down * WIDTH * t, math.exp(larger * t), clockwise * t) for t in times]
    return measured(pictures, rate)


@pytest.mark.parametrize("rate", [12.0, 30.0, 60.0])
@pytest.mark.parametrize(
    "speeds",
    [
        (0.05, 0, 0, 0),
        (-0.3, 0, 0, 0),
        (0, 0.1, 0, 0),
        (0, -0.02, 0, 0),
        (0, 0, 0.2, 0),
        (0, 0, -0.1, 0),
        (0, 0, 0, 0.2),
        (0, 0, 0, -0.1),
    ],
    ids=str,
)
def test_the_camera_s_motion_is_measured(speeds: tuple[float, float, float, float], rate: float) -> None:
    found = moved(speeds, rate)
    for name, speed in zip(("right", "down", "larger", "clockwise"), speeds, strict=True):
        assert np.median(found[f"motion_{name}"]) == pytest.approx(speed, abs=0.006 + 0.03 * abs(speed)), name
    assert np.median(found["motion_agree"]) > 0.9
    assert np.median(found["motion_rest"]) < 0.01


def test_all_parts_at_once() -> None:
    """One pair: later, what is at the centre is another point of the scene, which zoom and roll have moved as well."""
    speeds, step = (0.1, -0.05, 0.15, 0.2), 1 / 15
    after = seen(scene(), 0.1 * WIDTH * step, -0.05 * WIDTH * step, math.exp(0.15 * step), 0.2 * step)
    found = measured([seen(scene(), 0, 0, 1, 0), after], 15.0)
    for name, speed in zip(("right", "down", "larger", "clockwise"), speeds, strict=True):
        assert found[f"motion_{name}"][0] == pytest.approx(speed, abs=0.01), name


def test_how_fast_a_pixel_moves() -> None:
    assert np.mean(moved((0.12, 0.05, 0, 0))["motion_mean"]) == pytest.approx(0.13, rel=0.1)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    radius = np.hypot(x - (WIDTH - 1) / 2, y - (HEIGHT - 1) / 2).mean() / WIDTH
    assert np.mean(moved((0, 0, 0, 0.3))["motion_mean"]) == pytest.approx(0.3 * radius, rel=0.1)
    root_mean_square = math.sqrt(np.mean((x - (WIDTH - 1) / 2) ** 2 + (y - (HEIGHT - 1) / 2) ** 2)) / WIDTH
    assert mean_radius(HEIGHT, WIDTH) == pytest.approx(root_mean_square, rel=1e-4)


def with_a_box(speed: float, camera: float) -> dict[str, np.ndarray]:
    """A box of 90 x 90 pixels that moves over a scene that moves; widths a second."""
    background, box, pictures = scene(), scene(1)[:90, :90], []
    for t in np.arange(45) / 30:
        picture = seen(background, camera * WIDTH * t, 0, 1, 0)
        left = 40 + round(speed * WIDTH * t)
        picture[45:135, left : left + 90] = box
        pictures.append(picture)
    return measured(pictures, 30.0)


def test_things_that_move_are_no_motion_of_the_camera() -> None:
    found = with_a_box(0.2, -0.1)
    assert np.median(found["motion_right"]) == pytest.approx(-0.1, abs=0.01)
    share = 90 * 90 / (HEIGHT * WIDTH)
    assert np.mean(found["motion_rest"]) == pytest.approx(0.3 * share, rel=0.35)
    still = with_a_box(0.2, 0)
    assert np.median(still["motion_right"]) == pytest.approx(0, abs=0.003)
    assert np.mean(still["motion_mean"]) == pytest.approx(0.2 * share, rel=0.35)


def test_a_camera_rests_where_most_texture_is_on_something_that_moves() -> None:
    """A wall on both sides of a curtain that takes up six tenths."""
    wall, curtain, pictures = scene(), scene(1), []
    for t in np.arange(30) / 30:
        picture = seen(wall, 0, 0, 1, 0)
        picture[:, 64:256] = seen(curtain, 60 * t, 0, 1, 0)[:, 64:256]
        pictures.append(picture)
    assert np.abs(measured(pictures, 30.0)["motion_right"]).max() < 0.005


def test_flat_parts_are_still_and_tell_nothing_of_the_camera() -> None:
    grey = [np.full((HEIGHT, WIDTH), 30 + 3 * t, np.uint8) for t in range(30)]
    found = measured(grey, 30.0)
    assert not found["motion_mean"].any() and not found["motion_agree"].any()
    assert describe_motion(Pairs.of(found | {"height": 9, "width": 16}, found["motion_agree"] >= 0), **FAMILY) == {}


def test_pairs_are_a_moment_apart_and_unevenly_spread() -> None:
    found = measured([seen(scene(), 0, 0, 1, 0)] * 600, 60.0, pairs_per_s=2.0, gap_s=0.06)
    assert set((found["motion_next"] - found["motion_frame"]).tolist()) == {4}  # 3 frames are 0.05 s
    assert len(found["motion_frame"]) == pytest.approx(20, abs=1)
    steps = np.diff(found["motion_frame"])
    assert steps.min() >= 12 and steps.max() <= 48 and len(set(steps.tolist())) >= 2
    slow = measured([seen(scene(), 0, 0, 1, 0)] * 30, 5.0, pairs_per_s=2.0, gap_s=0.06)
    assert set((slow["motion_next"] - slow["motion_frame"]).tolist()) == {1}


def test_frames_that_come_twice_do_not_look_still() -> None:
    """12 drawings a second in 24 frames."""
    picture = scene()
    drawn = [seen(picture, 0.1 * WIDTH * (index // 2) / 12, 0, 1, 0) for index in range(96)]
    np.testing.assert_allclose(measured(drawn, 24.0)["motion_right"], 0.1, atol=0.02)


def test_the_same_twice() -> None:
    first, second = with_a_box(0.2, -0.1), with_a_box(0.2, -0.1)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_change_of_size_is_no_pair() -> None:
    pictures = [scene()[:HEIGHT, :WIDTH], scene()[:HEIGHT, :WIDTH], scene()[:90, :WIDTH]]
    assert len(measured(pictures, 10.0, gap_s=0.15)["motion_frame"]) == 0


def test_points_have_texture() -> None:
    picture = np.full((64, 96), 100, np.uint8)
    picture[20:, 50:] = 180  # one corner, and edges that say nothing along themselves
    (point,) = textured_points(picture)
    assert abs(point[0] - 50) <= 2 and abs(point[1] - 20) <= 2


def pairs(*speeds: tuple[float, float, float, float], agree: float = 0.9) -> Pairs:
    return Pairs(np.array(speeds, float), np.full(len(speeds), agree))


NAMED = {
    "static": [(0.1, -0.2, 0, 0.1)] * 5,
    "pan left": [(8, 0.5, 0, 0)] * 5,
    "pan right": [(-8, 0.5, 1, 0)] * 5,
    "tilt up": [(0, 3, 0, 0)] * 5,
    "tilt down": [(0.4, -3, 0, 0)] * 5,
    "zoom in": [(0, 0, 2, 0)] * 5,
    "zoom out": [(0, 0, -2, 0.3)] * 5,
    "roll left": [(0, 0, 0, 2)] * 5,
    "roll right": [(0, 0.4, 0, -2)] * 5,
    "shake": [(9, 1, 0, 0), (-7, 8, 0, 0), (5, -9, 0, 0), (-8, 3, 0, 0), (9, 6, 0, 0), (-9, -6, 0, 0)],
    "mixed": [(8, 6, 0, 0)] * 5,
}


@pytest.mark.parametrize("name", NAMED)
def test_names_of_motions(name: str) -> None:
    assert describe_motion(pairs(*NAMED[name]), **FAMILY)["camera_motion"] == name


def test_there_and_back_is_several_motions_and_no_shake() -> None:
    found = describe_motion(pairs(*[(8, 0, 0, 0)] * 4, *[(-8, 0, 0, 0)] * 4), **FAMILY)
    assert found["camera_motion"] == "mixed" and found["shake"] == 0
    uneven = pairs(*[(8, 0, 0, 0)] * 5, *[(-8, 0, 0, 0)] * 3)
    assert describe_motion(uneven, **FAMILY)["camera_motion"] == "mixed"


def test_a_wild_pair_changes_no_name() -> None:
    wild = (400.0, 300.0, 0.0, 0.0)
    assert describe_motion(pairs(*[(8, 0, 0, 0)] * 5, wild), **FAMILY)["camera_motion"] == "pan left"
    few = Pairs(np.array([(0, 9, 0, 0), wild, wild]), np.array([0.9, 0.1, 0.1]))
    assert describe_motion(few, **FAMILY)["camera_motion"] == "tilt up"


def test_speed_and_shake() -> None:
    assert describe_motion(pairs(*[(3, 4, 0, 0)] * 5), **FAMILY)["camera_speed"] == pytest.approx(5)
    steady_rise = [(float(number), 0, 0, 0) for number in range(9)]
    assert tremble(np.array(steady_rise)) == pytest.approx(0)
    assert tremble(np.array(steady_rise[:2])) == 0
    draws = np.random.default_rng(0).normal(0, 6, (2000, 4)) * (1, 0, 0, 0)
    # The median of |normal| is 0.6745 of its deviation; a second difference of independent draws has root 6 of theirs.
    assert tremble(draws) == pytest.approx(0.6745 * 6, rel=0.05)


@pytest.mark.parametrize(
    ("name", "value"), [("pairs_per_s", 0.0), ("gap_s", -0.1), ("gap_s", 0.2), ("pairs_per_s", -2.0)]
)
def test_refusals(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        MotionConfig(**{name: value})
