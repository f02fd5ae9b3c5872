"""What the default finds of transitions in labelled clips, beside what PySceneDetect finds alone."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.shots import DETECTORS, Tally, frames_row, score
from data_pipeline.shots.transitions import Transition
from data_pipeline.stages.shots import find_transitions
from tests.shot_set import CLIPS, HALVES, ONE_SHOT, Truth


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_labelled_clips(shared_media: Path, tmp_path: Path) -> None:
    """All of them: three minutes of a core."""
    tallies = score(tmp_path, shared_media, range(CLIPS), ["default", "adaptive"])
    for half in HALVES:
        default, alone = tallies[half]["default"], tallies[half]["adaptive"]
        assert default.f1 >= 0.97, default.notes
        assert alone.f1 < 0.8 and alone.found["cut"] <= default.found["cut"]
        assert default.split == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_clips_of_one_shot_are_left_whole(shared_media: Path) -> None:
    rows = {name: frames_row(shared_media / "clips" / name, ["default"]) for name in ONE_SHOT}
    split = [name for name, row in rows.items() if find_transitions(row, DETECTORS["default"])]
    assert split == []


def test_a_tally_counts_what_is_found_once() -> None:
    times, tally = np.arange(250) / 25, Tally()
    truths = [Truth("cut", 50, 50), Truth("dissolve", 100, 120), Truth("cut", 200, 200)]
    beside = (57, 58, 93, 128)  # by 0.28 s, by 0.32 s; by 0.28 s before, by 0.32 s behind
    found = [Transition("cut", at, at) for at in beside]
    tally.add("a", truths, found, times)
    assert tally.found == {"cut": 1, "dissolve": 1} and tally.missed == {"cut": 1} and tally.false == 2
    assert (tally.precision, tally.recall, tally.f1) == (2 / 4, 2 / 3, 4 / 7)
    tally.add("b", [], [Transition("cut", 57, 57)], times)
    assert tally.split == ["b"] and tally.false == 3
