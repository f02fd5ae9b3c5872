"""Clips between transitions: PySceneDetect's own answers from stored scores, exact times, configurations."""

import hashlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from scenedetect.common import FrameTimecode, Timecode
from scenedetect.detectors import AdaptiveDetector, ContentDetector
from scenedetect.stats_manager import StatsManager

from data_pipeline.analysis.base import Video
from data_pipeline.analysis.content import THUMB_HEIGHT, THUMB_WIDTH, ContentAnalyser, ContentConfig, thumbs_of
from data_pipeline.limits import SourceLimits
from data_pipeline.media.scan import Frame, ScanReport, scan
from data_pipeline.shots.cuts import adaptive_cuts, content_cuts
from data_pipeline.shots.network import network_transitions
from data_pipeline.shots.ranges import Range, Times, clip_id, divided, ranges_between
from data_pipeline.shots.transitions import Transition, merged
from data_pipeline.stages.base import Unit
from data_pipeline.stages.shots import ShotsConfig, ShotsStage

VIDEO = Video(file="a", num_frames=0, fps=25.0, height=0, width=0)
BASE = Fraction(1, 12800)


def frame(index: int, picture: np.ndarray, step: int = 512) -> Frame:
    """Number ``index`` at 25 a second, as if it had been scaled."""
    return Frame(index, index * step, float(index * step * BASE), lambda side, pixels: picture)


def measured(pictures: list[np.ndarray], **config: Any) -> dict[str, Any]:
    """Columns of ``ContentAnalyser``."""
    measurement = ContentAnalyser(ContentConfig(**config)).start(VIDEO)
    for index, picture in enumerate(pictures):
        measurement.see(frame(index, picture))
    return measurement.columns()


def scenes(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    """Textured pictures that drift a little, another texture for each length."""
    rng = np.random.default_rng(seed)
    found = []
    for length in lengths:
        wall = cv2.resize(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), (200, 120), interpolation=cv2.INTER_CUBIC)
        found += [np.ascontiguousarray(wall[6:96, index // 4 : 160 + index // 4]) for index in range(length)]
    return found


def unit(columns: dict[str, Any], count: int, step: int = 512, first: int = 0) -> Unit:
    """What stage ``shots`` reads of ``count`` frames."""
    pts = first + step * np.arange(count, dtype=np.int64)
    frames = {"pts": pts, "time_base": str(BASE), **columns}
    return Unit(source="a.mp4", file="", rows={"probe": [{"sha256": "ab" * 32}], "frames": [frames]})


def clips(columns: dict[str, Any], count: int, *, first: int = 0, **config: Any) -> list[dict[str, Any]]:
    return ShotsStage(ShotsConfig(**config), SourceLimits()).run(unit(columns, count, first=first))


# ---- scores and cuts: PySceneDetect, asked directly ----


def test_scores_are_those_of_pyscenedetect() -> None:
    pictures = scenes(20, 20, 20)
    detector, stats = ContentDetector(), StatsManager()
    stats.register_metrics(detector.get_metrics())
    detector.stats_manager = stats
    for index, picture in enumerate(pictures):
        detector.process_frame(FrameTimecode(index, 25.0), picture)
    theirs = [stats.get_metrics(FrameTimecode(index, 25.0), ["content_val"])[0] for index in range(1, 60)]
    assert measured(pictures)["content_score"][1:].tolist() == theirs
    assert measured(pictures)["content_score"][0] == 0.0


@pytest.mark.parametrize("step", [512, 427])
@pytest.mark.parametrize("apart_s", [0.0, 0.6])
def test_cuts_are_those_of_pyscenedetect(step: int, apart_s: float) -> None:
    """Fed with frames as ever, at times of a variable rate, against what we make of stored scores."""
    pictures = scenes(30, 5, 40, 12, 33, 2, 25)
    pts = np.cumsum(np.random.default_rng(1).integers(step // 2, step, len(pictures)))
    scores, count = measured(pictures)["content_score"], 0
    for kind, ours, name in (
        (AdaptiveDetector, adaptive_cuts, "adaptive_threshold"),
        (ContentDetector, content_cuts, "threshold"),
    ):
        detector, theirs = kind(**{name: 3.0, "min_scene_len": apart_s}), []
        for time, picture in zip(pts.tolist(), pictures, strict=True):
            found = detector.process_frame(FrameTimecode(Timecode(time - int(pts[0]), BASE), 25.0), picture)
            theirs += [int(np.searchsorted(pts, each.pts + int(pts[0]))) for each in found]
        assert ours(scores, pts, BASE, threshold=3.0, apart_s=apart_s) == sorted(set(theirs) - {0})
        count += len(theirs)
    assert count >= (6 if apart_s == 0.0 else 2)


def test_no_frame_has_no_cut() -> None:
    nothing = np.zeros(0)
    assert adaptive_cuts(nothing, nothing.astype(np.int64), BASE, threshold=3.0, apart_s=0.6) == []


# ---- the analyser ----


def test_thumbnails_are_small_and_some_a_second() -> None:
    pictures = scenes(50)
    columns = measured(pictures, thumbs_per_second=5)
    assert columns["content_frame"].tolist() == list(range(0, 50, 5))
    thumbs = thumbs_of(columns["content_thumbs"])
    assert thumbs.shape == (10, THUMB_HEIGHT, THUMB_WIDTH, 3)
    mean = [picture.mean(axis=(0, 1)) for picture in pictures[::5]]
    assert np.abs(thumbs.mean(axis=(1, 2)) - mean).max() < 1.0  # blue first, as the frames are


def test_a_frame_of_another_size_begins_anew() -> None:
    small = [picture[:40] for picture in scenes(10, seed=3)]
    columns = measured([*scenes(10), *small])
    assert columns["content_score"][10] == 0.0 and len(columns["content_score"]) == 20


# ---- ranges and times ----


def test_frames_around_a_gradual_transition_are_in_no_clip() -> None:
    between = ranges_between([Transition("cut", 40, 40), Transition("gradual", 100, 120)], 200, 6)
    assert [(each.first, each.last) for each in between] == [(0, 40), (40, 94), (126, 200)]
    assert [(each.transition_in, each.transition_out) for each in between] == [
        ("start", "cut"),
        ("cut", "gradual"),
        ("gradual", "end"),
    ]


def test_transitions_at_both_ends_leave_no_empty_clip() -> None:
    found = ranges_between([Transition("gradual", 0, 20), Transition("gradual", 90, 100)], 100, 6)
    assert found == [Range(26, 84, "gradual", "gradual")]
    assert ranges_between([Transition("gradual", 0, 100)], 100, 6) == []


def test_transitions_that_follow_closely_are_one() -> None:
    times = np.arange(200) / 25
    cuts = [Transition("cut", at, at) for at in (50, 61, 74)]
    assert merged(cuts, times, 0.5) == [Transition("gradual", 50, 61), Transition("cut", 74, 74)]
    assert merged(cuts, times, 0.4) == cuts


def test_long_shots_are_divided_evenly() -> None:
    times = Times(512 * np.arange(1000), BASE)
    parts = list(divided(Range(100, 351, "cut", "end"), times, 4.0))
    assert [(each.first, each.last) for each in parts] == [(100, 184), (184, 267), (267, 351)]
    assert [each.transition_in for each in parts] == ["cut", "divided", "divided"]
    assert [each.transition_out for each in parts] == ["divided", "divided", "end"]
    assert [*divided(Range(0, 100, "start", "end"), times, 4.0)] == [Range(0, 100, "start", "end")]  # 4 s is not longer


def test_times_are_exact() -> None:
    """A file that begins at 8.3 s, of 30000/1001 frames a second: fractions of its own time base, never rounded."""
    pictures = scenes(60, 60)
    base, first = Fraction(1, 30000), 249_001
    frames = {"pts": first + 1001 * np.arange(120), "time_base": str(base), **measured(pictures)}
    rows = {"probe": [{"sha256": "cd" * 32}], "frames": [frames]}
    one, two = ShotsStage(ShotsConfig(), SourceLimits()).run(Unit(source="a", file="", rows=rows))
    assert (one["first"], one["last"], two["first"], two["last"]) == (0, 60, 60, 120)
    assert (one["start_pts"], one["end_pts"]) == (first, first + 60 * 1001)
    assert (two["start_pts"], two["end_pts"]) == (
        first + 60 * 1001,
        first + 120 * 1001,
    )  # the last frame lasts as others
    assert one["start_s"] == 0.0 and two["end_s"] == float(Fraction(120 * 1001, 30000))
    assert one["fps"] == pytest.approx(30000 / 1001, rel=1e-12)
    assert one["time_base"] == "1/30000" and one["num_frames"] == 60
    exact = f"{'cd' * 32} {Fraction(first, 30000)} {Fraction(first + 60 * 1001, 30000)}"
    assert one["clip_id"] == hashlib.blake2b(exact.encode(), digest_size=8).hexdigest()


def test_an_id_is_of_content_and_times() -> None:
    ids = [
        clip_id("a", Fraction(0), Fraction(1)),
        clip_id("a", Fraction(0), Fraction(2)),
        clip_id("b", Fraction(0), Fraction(1)),
    ]
    assert len({*ids}) == 3 and all(len(one) == 16 for one in ids)
    assert clip_id("a", Fraction(2, 4), Fraction(1)) == clip_id("a", Fraction(1, 2), Fraction(1))


# ---- the stage ----


def test_a_video_becomes_its_shots() -> None:
    found = clips(measured(scenes(50, 60, 70)), 180)
    assert [(clip["first"], clip["last"]) for clip in found] == [(0, 50), (50, 110), (110, 180)]
    assert [clip["clip"] for clip in found] == [0, 1, 2]


def test_short_clips_are_left_out_and_numbers_have_no_gap() -> None:
    found = clips(measured(scenes(50, 20, 70)), 140)
    assert [(clip["first"], clip["last"], clip["clip"]) for clip in found] == [(0, 50, 0), (70, 140, 1)]
    assert len(clips(measured(scenes(50, 20, 70)), 140, min_s=0.5)) == 3


def test_a_detector_may_be_none() -> None:
    (clip,) = clips({}, 140, detector="none")
    assert (clip["first"], clip["last"], clip["transition_in"], clip["transition_out"]) == (0, 140, "start", "end")


def test_only_what_a_detector_needs_is_read() -> None:
    """Another key of the unit would mean that all is done again."""
    reads = {
        name: ShotsStage(ShotsConfig(detector=name), SourceLimits()).reads["frames"]
        for name in ("adaptive", "transnetv2", "none")
    }
    assert reads["none"] == ("pts", "time_base")
    assert {*reads["adaptive"]} == {"pts", "time_base", "content_score", "content_frame", "content_thumbs"}
    assert {*reads["transnetv2"]} == {"pts", "time_base", "transnet_middle", "transnet_within"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"detector": "magic"}, "detector='magic': must be one of adaptive, content, transnetv2, none"),
        ({"adaptive_threshold": 0.0}, "adaptive_threshold=0.0: must be a number above 0"),
        ({"min_s": -1.0}, "min_s=-1.0: must be 0 or more"),
        ({"min_s": 2.0, "max_s": 3.0}, "max_s=3.0: must be null"),
    ],
)
def test_a_wrong_configuration_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        ShotsConfig(**config)
    assert str(error.value).startswith(said)


def test_a_networks_probabilities() -> None:
    middle, within = np.zeros(100), np.zeros(100)
    middle[[29, 60]] = 0.9
    within[[28, 29, 30]] = 0.8
    within[55:66] = 0.8
    assert network_transitions(middle, within, 0.5) == [Transition("cut", 30, 30), Transition("gradual", 55, 66)]
    assert network_transitions(middle, within, 0.95) == []


def test_known_cuts_of_a_real_trailer(shared_media: Path) -> None:
    """Two detectors agree about them; two are edges of black, which belongs to neither shot."""
    report = ScanReport()
    measurement = ContentAnalyser(ContentConfig()).start(VIDEO)
    pts = []
    for each in scan(str(shared_media / "clips" / "sintel_trailer_30s.mp4"), report, frames=1000, timeout_s=100):
        pts.append(each.pts)
        measurement.see(each)
    frames = {"pts": np.array(pts), "time_base": str(report.time_base), **measurement.columns()}
    rows = {"probe": [{"sha256": ""}], "frames": [frames]}
    found = ShotsStage(ShotsConfig(), SourceLimits()).run(Unit(source="a", file="", rows=rows))
    edges = {clip[name] for clip in found for name in ("first", "last")}
    within = [
        cut for cut in (286, 348, 372, 388, 523, 573, 610) if not any(c["first"] < cut < c["last"] for c in found)
    ]
    assert within == [286, 348, 372, 388, 523, 573, 610]
    assert {286, 523, 573, 610} <= edges
