"""Columns of clips from the columns of the one decode; known truths of real clips, and what is planted in clips."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.analysis.luma import BAR_LEVELS
from data_pipeline.limits import SourceLimits
from data_pipeline.rows import Row
from data_pipeline.stages.base import Unit
from data_pipeline.stages.measure import MeasureConfig, MeasureStage
from tests.planted import CAMERAS, DEFECTS, planted_clip
from tests.planted_found import FOUND, measured, measured_file, whole

BASE = "1/100"  # seconds of a unit of pts: 10 frames a second


def frames(count: int = 40, **other: Any) -> Row:
    """Columns of a video of grey frames that all differ, 10 a second, looked at every fifth; nothing moves."""
    samples, pairs = np.arange(0, count, 5), np.arange(0, count - 1, 5)
    none, no_motion = np.zeros(len(samples) * 4 * len(BAR_LEVELS)), np.zeros(len(pairs))
    row = {
        "pts": 300 + 10 * np.arange(count),
        "time_base": BASE,
        "height": 90,
        "width": 160,
        "damaged_at": np.zeros(0, int),
        "luma_mean": np.full(count, 100.0),
        "luma_change": np.full(count, 3.0),
        "luma_peak": np.full(count, 40),
        "luma_frame": samples,
        "luma_bright": np.full(len(samples), 200),
        "luma_sharpness": np.full(len(samples), 300.0),
        "luma_dark": none,
        "luma_dim": none,
        "motion_frame": pairs,
        "motion_next": pairs + 1,
        "motion_agree": np.ones(len(pairs)),
    }
    parts = ("mean", "right", "down", "larger", "clockwise", "rest")
    return row | {f"motion_{name}": no_motion for name in parts} | other


def clips(of: Row, *ranges: tuple[int, int], **config: Any) -> list[Row]:
    ends = [*of["pts"].tolist(), int(of["pts"][-1]) + 10]
    shots = [{"first": first, "last": last, "end_pts": ends[last]} for first, last in ranges]
    stage = MeasureStage(MeasureConfig(**config), SourceLimits())
    rows = stage.run(Unit(source="a", file="a", rows={"frames": [of], "shots": shots}))
    assert all(set(row) <= set(MeasureStage.columns.names) for row in rows)
    return rows


def test_every_clip_is_measured_from_its_own_frames() -> None:
    luma, sharp = np.full(40, 50.0), np.full(8, 10.0)
    luma[20:], sharp[4:] = 200, 90
    first, second = clips(frames(luma_mean=luma, luma_sharpness=sharp), (0, 20), (20, 40))
    assert (first["luma"], second["luma"], first["sharpness"], second["sharpness"]) == (50, 200, 10, 90)
    assert clips(frames()) == []


def test_black_and_frozen() -> None:
    bright, change, peak = np.full(8, 200), np.full(40, 3.0), np.full(40, 40)
    bright[:2] = 9
    change[11:30], peak[11:30] = 0.05, 2  # frame 10 is shown from 1.0 to 3.0 s
    of = frames(luma_bright=bright, luma_change=change, luma_peak=peak)
    (row,) = clips(of, (0, 40))
    assert row["black_share"] == pytest.approx(2 / 8) and row["frozen_share"] == pytest.approx(2.0 / 4.0)
    before, after = clips(of, (0, 15), (15, 40))  # 0.5 s of it, and 1.5 s
    assert before["frozen_share"] == 0 and after["frozen_share"] == pytest.approx(1.5 / 2.5)
    peak[11:30] = 30  # something small moves
    assert clips(of | {"luma_peak": peak}, (0, 40))[0]["frozen_share"] == 0


def test_frozen_is_a_share_of_time_at_a_variable_rate() -> None:
    pts = np.cumsum([0, *[10] * 9, 500, *[10] * 9])
    of = frames(20, pts=pts)
    assert clips(of, (0, 20))[0]["frozen_share"] == pytest.approx(5.0 / 6.9)


def test_damage_is_of_the_clip_that_has_it() -> None:
    rows = clips(frames(damaged_at=np.array([20, 33])), (0, 20), (20, 30), (30, 40))
    assert [row["damaged"] for row in rows] == [False, True, True]


def test_bars() -> None:
    dark = np.zeros((8, 4, len(BAR_LEVELS)))
    dark[:, 0], dark[:, 1], dark[:, 3] = 0.1, 0.2, 0.25
    dark[:, 2, BAR_LEVELS.index(48)] = 0.3  # brighter than a bar
    (row,) = clips(frames(luma_dark=dark.ravel(), luma_dim=dark.ravel()), (0, 40))
    assert [row[f"bar_{side}"] for side in ("top", "bottom", "left", "right")] == [0.1, 0.2, 0, 0.25]
    assert row["picture_share"] == pytest.approx(0.7 * 0.75)
    (row,) = clips(frames(luma_dark=dark.ravel(), luma_dim=dark.ravel()), (0, 40), bar_luma=48)
    assert row["bar_left"] == 0.3


def test_motion_is_in_percent_a_second_of_the_picture_inside_bars() -> None:
    pairs = np.full(8, 1.0)
    moving = {"motion_mean": 0.03 * pairs, "motion_rest": 0.01 * pairs, "motion_right": -0.05 * pairs}
    (row,) = clips(frames(**moving), (0, 40))
    assert row["motion_score"] == pytest.approx(3) and row["foreground_motion"] == pytest.approx(1)
    assert row["camera_motion"] == "pan right" and row["camera_speed"] == pytest.approx(5) and row["shake"] == 0
    dark = np.zeros((8, 4, len(BAR_LEVELS)))
    dark[:, :2] = 0.2
    (row,) = clips(frames(**moving, luma_dark=dark.ravel(), luma_dim=dark.ravel()), (0, 40))
    assert row["motion_score"] == pytest.approx(3 / 0.6)


def test_a_pair_over_a_cut_is_of_neither_clip() -> None:
    speeds = np.full(8, 0.0)
    speeds[3] = 9.0  # frames 15 and 16
    rows = clips(frames(motion_mean=speeds), (0, 16), (16, 40))
    assert [row["motion_score"] for row in rows] == [0, 0]


def test_a_clip_that_no_sample_is_in() -> None:
    (row,) = clips(frames(), (6, 9))
    assert row["luma"] == 100 and row["frozen_share"] == 0 and row["picture_share"] == 1
    assert not set(row) & {"sharpness", "black_share", "motion_score", "camera_motion"}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("bar_luma", 25, "16, 24, 32, 48"),
        ("frozen_s", 0.0, "above 0"),
        ("bar_share", 0.0, "above 0"),
        ("static_speed", -1.0, "0 or more"),
        ("shake", float("nan"), "0 or more"),
    ],
)
def test_refusals(name: str, value: float, said: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*{said}"):
        MeasureConfig(**{name: value})


def test_known_bars_of_real_films(shared_media: Path) -> None:
    """The trailer's picture is 854 x 364 at row 58 of 480, and the silent film's 496 x 360 at column 72 of 640."""
    trailer = measured_file(shared_media / "clips" / "sintel_trailer_30s.mp4")
    assert trailer["bar_top"] == pytest.approx(58 / 480, abs=0.004)
    assert trailer["bar_bottom"] == pytest.approx(58 / 480, abs=0.004)
    assert trailer["bar_left"] == trailer["bar_right"] == 0
    silent = measured_file(shared_media / "clips" / "chaplin.mp4")
    assert silent["bar_left"] == pytest.approx(72 / 640, abs=0.004)
    assert silent["bar_right"] == pytest.approx(72 / 640, abs=0.004)
    assert silent["bar_top"] == silent["bar_bottom"] == 0


def test_a_damaged_file_and_a_sound_one(shared_media: Path) -> None:
    assert measured_file(shared_media / "edge_cases" / "corrupted.mp4")["damaged"]
    assert not measured_file(shared_media / "edge_cases" / "test_non_zero_start.mp4")["damaged"]


def test_a_range_of_one_frame_ends() -> None:
    assert whole({"pts": np.array([7])}) == {"first": 0, "last": 1, "end_pts": 8}


@pytest.mark.parametrize("kind", DEFECTS)
def test_what_is_planted_is_found(kind: str, shared_media: Path, tmp_path: Path) -> None:
    """One clip of each kind; ``python -m benchmarks.filters`` has many."""
    clip = planted_clip(kind, 0, shared_media)
    row = measured(clip, tmp_path)
    for name, value in clip.truth.items():
        off = {"black_share": 0.12, "frozen_share": 0.2}.get(name, 0.006)  # a sample of nine; what coding hides of it
        assert row[name] == pytest.approx(value, abs=off), name
    expected = {"windowbox": {"letterbox", "pillarbox"}, "clean": set()}.get(kind, {kind})
    found = {name for name, is_found in FOUND.items() if is_found(row)}
    assert found - ({"frozen", "blurred"} if kind == "black" else set()) == expected  # black does not change


@pytest.mark.parametrize("name", CAMERAS)
def test_what_the_camera_does_is_named(name: str, shared_media: Path, tmp_path: Path) -> None:
    clip = planted_clip(name, 1, shared_media)
    row = measured(clip, tmp_path)
    assert row["camera_motion"] == clip.truth["camera_motion"]
    if "camera_speed" in clip.truth:
        assert row["camera_speed"] == pytest.approx(clip.truth["camera_speed"], rel=0.15, abs=0.8)
