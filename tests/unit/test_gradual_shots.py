"""The second opinion: what it finds of transitions that are made here, and what it does not take for one."""

import cv2
import numpy as np
import pytest

from data_pipeline.shots.gradual import gradual_transitions
from data_pipeline.shots.opinions import reconciled
from data_pipeline.shots.thumbs import Thumbs, likeness
from data_pipeline.shots.transitions import Transition, merged
from data_pipeline.shots.verdict import is_refuted, is_sudden

RATE = 12.0


def wall(seed: int) -> np.ndarray:
    """A texture that is larger than the view, (60, 90, 3)."""
    noise = np.random.default_rng(seed).uniform(0, 255, (12, 18, 3)).astype(np.float32)
    return np.clip(cv2.resize(noise, (90, 60), interpolation=cv2.INTER_CUBIC), 0, 255)


def shot(seed: int, count: int, speed: float = 0.1) -> np.ndarray:
    """(count, 14, 24, 3) float: a view that drifts over a wall."""
    picture = wall(seed)
    left = [round(20 + speed * index) for index in range(count)]
    return np.stack([picture[20:34, x : x + 24] for x in left])


def thumbs(pictures: np.ndarray) -> Thumbs:
    """One for every second frame, at 24 frames a second."""
    frames = 2 * np.arange(len(pictures))
    return Thumbs(frames, frames / (2 * RATE), np.round(np.clip(pictures, 0, 255)).astype(np.uint8))


def joined(kind: str, length: int = 8, before: int = 30, after: int = 30) -> np.ndarray:
    a, b = shot(1, before + length), shot(2, after + length)
    share = ((np.arange(length) + 1) / (length + 1))[:, None, None, None]
    if kind == "black":
        share = np.abs(2 * share - 1)
        between = np.where(np.arange(length)[:, None, None, None] < length / 2, a[before:], b[:length]) * share
    elif kind == "wipe":
        between = np.where(np.arange(24)[:, None] < 24 * share, b[:length], a[before:])
    else:
        between = a[before:] * (1 - share) + b[:length] * share
    return np.concatenate([a[:before], between, b[length:]])


def transitions(pictures: np.ndarray, cuts: tuple[int, ...] = (), steps: tuple[int, ...] = ()) -> list[Transition]:
    """Of both opinions together, as the stage asks them."""
    made = thumbs(pictures)
    times = np.arange(2 * len(made)) / (2 * RATE)
    return merged(reconciled(cuts, steps, made, times, 0.5), times, 0.5)


@pytest.mark.parametrize("kind", ["dissolve", "wipe", "black"])
@pytest.mark.parametrize("length", [5, 8, 12])
def test_a_transition_is_found_where_it_is(kind: str, length: int) -> None:
    (found,) = transitions(joined(kind, length))
    first, end = 60, 2 * (30 + length)
    assert found.kind == "gradual" and first - 6 <= found.first < found.end <= end + 6
    assert found.first <= (first + end) / 2 <= found.end


def test_over_a_cut_nothing_is_looked_for() -> None:
    pictures = np.concatenate([shot(1, 30), shot(2, 30)])
    assert gradual_transitions(thumbs(pictures), [60]) == []


@pytest.mark.parametrize("change", ["none", "exposure", "passer", "pan", "flash"])
def test_what_is_no_transition(change: str) -> None:
    pictures = shot(1, 60)
    if change == "exposure":
        pictures = pictures * np.interp(np.arange(60), [25, 33], [1.0, 0.5])[:, None, None, None]
    elif change == "passer":
        for index, left in enumerate(range(-12, 25, 6)):
            pictures[28 + index, 2:, max(0, left) : max(0, left + 12)] = 30
    elif change == "pan":
        pictures = np.concatenate([shot(1, 28), shot(1, 60, speed=0.6)[28:]])
    elif change == "flash":
        pictures[30:32] = 0.2 * pictures[30:32] + 0.8 * 255
    assert transitions(pictures) == []


def test_a_flash_is_no_cut_and_a_cut_is() -> None:
    flashed = shot(1, 40)
    flashed[20:22] = 0.2 * flashed[20:22] + 0.8 * 255
    cut = np.concatenate([shot(1, 20), shot(2, 20)])
    for pictures, refuted in ((flashed, True), (cut, False)):
        assert is_refuted(thumbs(pictures), 40, 40 / 24) is refuted


def test_a_flash_between_is_no_transition() -> None:
    flashed = shot(1, 40)
    flashed[20:22] = 0.2 * flashed[20:22] + 0.8 * 255
    assert transitions(flashed, (40, 44)) == []


def test_what_comes_back_is_no_transition(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that gives way to another one, for half a second, whatever is thought of each half."""
    monkeypatch.setattr(
        "data_pipeline.shots.gradual.sureness", lambda views, ends: ((ends.j == 30) & (ends.j - ends.i == 5)) * 1.0
    )
    away = shot(1, 60)
    away[29:34] = shot(2, 5)
    assert gradual_transitions(thumbs(away), []) == []
    away[29:] = shot(2, 31)
    assert len(gradual_transitions(thumbs(away), [])) == 1


def test_a_cut_to_a_like_scene_is_not_refuted() -> None:
    """Another person before the same wall: much alike, but nothing was in between."""
    there = shot(1, 20)
    other = there.copy()
    there[:, 3:, 8:13] = (200, 40, 40)
    other[:, 2:, 10:16] = (30, 200, 60)
    assert not is_refuted(thumbs(np.concatenate([there, other])), 40, 40 / 24)


def test_a_step_to_a_like_scene_is_a_cut() -> None:
    """The same person before the same wall a while later: too little for a detector, and nothing was in between."""
    there = shot(1, 20, speed=0.0)
    later = there.copy()
    there[:, 3:, 6:14] = (200, 40, 40)
    later[:, 4:, 8:18] = (180, 60, 40)
    assert transitions(np.concatenate([there, later]), steps=(40,)) == [Transition("cut", 40, 40)]


@pytest.mark.parametrize("change", ["move", "light"])
def test_a_step_that_changes_little_for_good_is_none(change: str) -> None:
    pictures = shot(1, 40, speed=0.0)
    if change == "light":
        pictures[20:] = 0.6 * pictures[20:] + 20
    else:
        pictures[:20, 3:, 8:10] = pictures[20:, 3:, 11:13] = (200, 40, 40)
    assert transitions(pictures, cuts=(40,)) == transitions(pictures, steps=(40,)) == []


def test_steps_close_to_a_cut_are_part_of_it() -> None:
    pictures = np.concatenate([shot(1, 30), shot(2, 4), shot(3, 30)])
    assert transitions(pictures, cuts=(60,), steps=(60, 68)) == [Transition("cut", 60, 60)]


def test_cuts_with_no_thumbnail_between() -> None:
    pictures = np.concatenate([shot(1, 30), shot(2, 30)])
    made, times = thumbs(pictures), np.arange(120) / 48
    assert [each.first for each in reconciled((59, 60), (), made, times, 0.5)] == [59, 60]


def test_a_flash_that_no_thumbnail_shows_is_no_cut_of_a_moving_view() -> None:
    assert transitions(shot(1, 60, speed=0.5), (60,)) == []


def test_a_cut_is_sudden_and_a_fade_is_not() -> None:
    assert is_sudden(thumbs(np.concatenate([shot(1, 20), shot(2, 20)])), 40, 40 / 24)
    assert not is_sudden(thumbs(joined("black", 12)), 2 * 35, 2 * 35 / 24)


def test_a_fade_that_the_detector_takes_for_cuts_is_one_transition() -> None:
    (found,) = transitions(joined("black", 12), (2 * 33, 2 * 38))
    assert found.kind == "gradual" and found.first < 2 * 36 < found.end


def test_black_between_two_fades_belongs_to_them() -> None:
    a, b = shot(1, 30), shot(2, 30)
    gone = (1 - (np.arange(6) + 1) / 6)[:, None, None, None]
    pictures = np.concatenate([a, a[-1] * gone, np.zeros((20, 14, 24, 3)), b[:1] * gone[::-1], b])
    (found,) = transitions(pictures)
    assert found.first == pytest.approx(60, abs=6) and found.end == pytest.approx(2 * (30 + 32), abs=6)


def test_a_cut_that_nothing_explains_stays() -> None:
    assert transitions(np.concatenate([shot(1, 30), shot(2, 30)]), (60,)) == [Transition("cut", 60, 60)]


def test_likeness() -> None:
    a, moved, other = wall(1)[20:34, 20:44], wall(1)[22:36, 24:48], wall(2)[20:34, 20:44]
    dim = 0.5 * a + 20
    a, moved, other, dim = (picture.astype(np.uint8) for picture in (a, moved, other, dim))
    assert likeness(a, a) > 0.999 and likeness(a, moved) > 0.95 and likeness(a, dim) > 0.99
    assert likeness(a, other) < 0.8
    assert likeness(a, np.full_like(a, 90)) <= 0.0


def test_long_videos_are_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is found does not depend on them."""
    pictures = np.concatenate([joined("dissolve", before=50, after=50), joined("wipe", before=50, after=50)[50:]])
    whole = gradual_transitions(thumbs(pictures), [2 * 108])
    monkeypatch.setattr("data_pipeline.shots.gradual._CHUNK", 16)
    assert whole and gradual_transitions(thumbs(pictures), [2 * 108]) == whole
