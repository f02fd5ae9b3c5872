"""How well transitions are found: precision, recall and F1 on labelled clips, and how fast.

    python -m benchmarks.shots [--media DIR] [--clips N] [--first N] [--detectors default adaptive content transnetv2]

The labelled clips are those of ``tests/shot_set.py``, encoded: the rules were tuned on one half, and the other half
shares no footage with it. ``--first 1360`` takes clips that nobody who tuned has looked at. What is found counts if it
lies within a transition or 0.3 s beside it, once; all else is false. Then real clips that are one shot, which nothing
may split, and the cuts of a trailer that two detectors agree about. Speeds are of one thread, in CPU seconds: the
machine may be busy. Prints tables and one JSON line.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.analysis.base import Analyser, Video
from data_pipeline.analysis.content import ContentAnalyser, ContentConfig
from data_pipeline.analysis.transnet import TransnetAnalyser, TransnetConfig
from data_pipeline.limits import SourceLimits
from data_pipeline.media.scan import ScanReport, scan
from data_pipeline.rows import Row
from data_pipeline.shots.transitions import Transition
from data_pipeline.stages.base import Unit
from data_pipeline.stages.frames import FramesStage
from data_pipeline.stages.shots import ShotsConfig, find_transitions
from tests.shot_set import CLIPS, GRADUAL, HALVES, MORE, ONE_SHOT, Truth, write_set

MEDIA = Path(__file__).resolve().parents[2] / "shared" / "media"
TOLERANCE_S = 0.3
KINDS = ("cut", *GRADUAL)
TRAILER, TRAILER_CUTS = "sintel_trailer_30s.mp4", (286, 348, 372, 388, 523, 573, 610)  # by the media's README
DETECTORS = {
    "default": ShotsConfig(),
    "adaptive": ShotsConfig(gradual=False, merge_s=0.0),  # PySceneDetect alone
    "content": ShotsConfig(detector="content", gradual=False, merge_s=0.0),
    "transnetv2": ShotsConfig(detector="transnetv2"),
}


@dataclass
class Tally:
    """What one detector did on some clips."""

    found: Counter[str] = field(default_factory=Counter)  # by kind of transition
    missed: Counter[str] = field(default_factory=Counter)
    false: int = 0
    split: list[str] = field(default_factory=list)  # clips of one shot in which it found a transition
    notes: list[str] = field(default_factory=list)

    @property
    def precision(self) -> float:
        return self.found.total() / max(1, self.found.total() + self.false)

    @property
    def recall(self) -> float:
        return self.found.total() / max(1, self.found.total() + self.missed.total())

    @property
    def f1(self) -> float:
        return 2 * self.found.total() / max(1, 2 * self.found.total() + self.false + self.missed.total())

    def add(self, name: str, truths: Sequence[Truth], found: Sequence[Transition], times: np.ndarray) -> None:
        """One clip."""
        left = list(truths)
        for each in found:
            at = each.middle(times)
            near = [one for one in left if _is_near(one, at, times)]
            if near:
                hit = min(near, key=lambda one: abs(_at(times, one.first) + _at(times, one.end) - 2 * at))
                left.remove(hit)
                self.found[hit.kind] += 1
            else:
                self.false += 1
                self.notes.append(f"{name}: false {each.kind} at {at:.2f} s")
        self.missed.update(one.kind for one in left)
        self.notes += [f"{name}: {one.kind} at {_at(times, one.first):.2f} s missed" for one in left]
        if not truths and found:
            self.split.append(name)


def _is_near(truth: Truth, at: float, times: np.ndarray) -> bool:
    return _at(times, truth.first) - TOLERANCE_S <= at <= _at(times, truth.end) + TOLERANCE_S


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints everything; returns what the JSON line has."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shots", description=__doc__.splitlines()[0])
    parser.add_argument("--media", type=Path, default=MEDIA)
    parser.add_argument("--clips", type=int, default=CLIPS, help="of the labelled set, half of them for tuning")
    parser.add_argument("--first", type=int, default=0, help=f"number of the first: untouched from {MORE} on")
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=["default", "adaptive", "content"])
    parser.add_argument("--folder", type=Path, help="where the labelled clips are written, and stay")
    parser.add_argument("--notes", action="store_true", help="say what the default missed, and what was false")
    chosen = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        numbers = range(chosen.first, chosen.first + chosen.clips)
        tallies = score(chosen.folder or Path(folder), chosen.media, numbers, chosen.detectors)
    facts: dict[str, Any] = {"clips": chosen.clips, "first": chosen.first}
    facts |= {half: _print_half(half, tallies[half]) for half in HALVES}
    if chosen.notes:
        print("\n".join(note for half in HALVES for note in tallies[half]["default"].notes))
    facts["one_shot"] = _print_one_shot(chosen.media, chosen.detectors)
    facts["speed"] = _print_speed(chosen.media, chosen.detectors)
    print(json.dumps(facts))
    return facts


def score(folder: Path, media: Path, numbers: Sequence[int], detectors: Sequence[str]) -> dict[str, dict[str, Tally]]:
    """half -> detector -> what it did on labelled clips of these numbers."""
    tallies = {half: {name: Tally() for name in detectors} for half in HALVES}
    for path, clip in write_set(folder, media, numbers):
        row = frames_row(path, detectors)
        for name in detectors:
            tallies[clip.half][name].add(
                path.name, clip.transitions, find_transitions(row, DETECTORS[name]), _times(row)
            )
    return tallies


def frames_row(path: Path, detectors: Sequence[str]) -> Row:
    """What stage ``frames`` makes of a video."""
    probed = {"sha256": "", "num_frames": 0, "fps": 0.0, "height": 0, "width": 0}
    stage = FramesStage(tuple(_analysers(detectors)), SourceLimits())
    (row,) = stage.run(Unit(source=path.name, file=str(path), rows={"probe": [probed]}))
    return row | {"pts": np.array(row["pts"])}


def _analysers(detectors: Sequence[str]) -> Iterator[Analyser]:
    yield ContentAnalyser(ContentConfig())
    if "transnetv2" in detectors:
        yield TransnetAnalyser(TransnetConfig())


def _print_half(half: str, tallies: dict[str, Tally]) -> dict[str, Any]:
    whole = next(iter(tallies.values()))
    counts = {kind: whole.found[kind] + whole.missed[kind] for kind in KINDS}
    print(f"\n{half}: {', '.join(f'{count} {kind}' for kind, count in counts.items())}")
    print(f"{'detector':<12}{'precision':>10}{'recall':>8}{'F1':>7}{'false':>7}{'split':>7}   found")
    for name, tally in tallies.items():
        kinds = ", ".join(f"{tally.found[kind]} {kind}" for kind in KINDS)
        rates = f"{tally.precision:>10.3f}{tally.recall:>8.3f}{tally.f1:>7.3f}"
        print(f"{name:<12}{rates}{tally.false:>7}{len(tally.split):>7}   {kinds}")
    return {
        name: {"precision": tally.precision, "recall": tally.recall, "f1": tally.f1, "split": len(tally.split)}
        for name, tally in tallies.items()
    }


def _print_one_shot(media: Path, detectors: Sequence[str]) -> dict[str, Any]:
    """Real clips that are one shot, and the trailer."""
    facts: dict[str, Any] = {}
    rows = {name: frames_row(media / "clips" / name, detectors) for name in (*ONE_SHOT, TRAILER)}
    print(f"\n{len(ONE_SHOT)} real clips of one shot, and {len(TRAILER_CUTS)} known cuts of {TRAILER}")
    for name in detectors:
        split = [clip for clip in ONE_SHOT if find_transitions(rows[clip], DETECTORS[name])]
        times, found = _times(rows[TRAILER]), find_transitions(rows[TRAILER], DETECTORS[name])
        hit = sum(any(_holds(each, cut, times) for each in found) for cut in TRAILER_CUTS)
        print(f"{name:<12}{len(split):>3} split, {hit} cuts found   {', '.join(split)}")
        facts[name] = {"split": len(split), "trailer_cuts": hit}
    return facts


def _holds(each: Transition, cut: int, times: np.ndarray) -> bool:
    """Whether a known cut is one end of what was found, or within."""
    return _at(times, each.first) - TOLERANCE_S <= times[cut] <= _at(times, each.end) + TOLERANCE_S


def _print_speed(media: Path, detectors: Sequence[str]) -> dict[str, float]:
    """Frames a CPU second: decoded alone, with each analyser, an analyser alone, and the stage that decides."""
    path = media / "clips" / TRAILER
    facts = {"decode": _rate(lambda: sum(1 for _ in scan(str(path), ScanReport(), frames=1 << 20, timeout_s=600)))}
    for analyser in _analysers(detectors):
        facts[f"decode and {analyser.name}"] = _rate(lambda analyser=analyser: _seen(path, analyser))
        facts[f"{analyser.name} alone"] = _alone(path, analyser)
    row = frames_row(path, detectors)
    for name in detectors:
        facts[f"stage shots, {name}"] = _rate(lambda name=name: _decided(row, DETECTORS[name]))
    print("\nframes a CPU second, 854x480: " + ", ".join(f"{name} {rate:.0f}" for name, rate in facts.items()))
    return facts


def _decided(row: Row, cfg: ShotsConfig) -> int:
    find_transitions(row, cfg)
    return len(row["pts"])


def _seen(path: Path, analyser: Analyser) -> int:
    measurement = analyser.start(Video(file=str(path), num_frames=0, fps=0.0, height=0, width=0))
    count = 0
    for frame in scan(str(path), ScanReport(), frames=1 << 20, timeout_s=600):
        measurement.see(frame)
        count += 1
    measurement.columns()
    return count


def _alone(path: Path, analyser: Analyser) -> float:
    """Of pictures that are there already, as another analyser may have asked for them."""
    measurement = analyser.start(Video(file=str(path), num_frames=0, fps=0.0, height=0, width=0))
    taken, count = 0.0, 0
    for frame in scan(str(path), ScanReport(), frames=1 << 20, timeout_s=600):
        frame.bgr(256)
        began = time.process_time()
        measurement.see(frame)
        taken += time.process_time() - began
        count += 1
    began = time.process_time()
    measurement.columns()
    return count / (taken + time.process_time() - began)


def _rate(work: Any) -> float:
    began = time.process_time()
    count = work()
    return float(count / (time.process_time() - began))


def _times(row: Row) -> np.ndarray:
    """Seconds since the first frame."""
    return np.asarray((row["pts"] - row["pts"][0]) * float(Fraction(row["time_base"])))


def _at(times: np.ndarray, frame: int) -> float:
    return float(times[min(frame, len(times) - 1)])


if __name__ == "__main__":
    main()
