"""What the data pipeline says of clips in which something is planted: a confusion table per property.

    python -m benchmarks.filters [--clips 10] [--footage 6] [--media DIR] [kind ...]

Rows are what is planted (tests/planted.py: bars, black, freezes, blur, every motion of a camera, at several sizes and
rates, mirrored and turned, some with noise), columns what is found, cells how many of the clips. Below, how far numbers
are off those that were planted, and the milliseconds a frame of each measurement. Text, marks and copies are planted in
``--footage`` pieces of real clips (benchmarks.planted_text and benchmarks.duplicates; 0: not at all). At last one
table of all filters: in how many of the clips that have it it is found, and in how many of those that do not. Prints
one JSON line at the end.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.duplicates import planted, standing_cameras
from benchmarks.planted_text import text_table
from data_pipeline.media.scan import ScanReport, scan
from data_pipeline.rows import Row
from tests.copies import CHANGES
from tests.planted import CAMERAS, DEFECTS, PlantedClip, planted_clip
from tests.planted_found import ANALYSERS, FOUND, measured
from tests.planted_text import OVERLAYS, TEXTS

Planted = Sequence[tuple[PlantedClip, Row]]  # clips, and what the stages say of each
NUMBERS = ("bar_top", "bar_bottom", "bar_left", "bar_right", "black_share", "frozen_share", "camera_speed")
# What is planted -> the columns of the truth that are above 0 where it is; it is not where one of them is 0.
COLUMNS = {
    "letterbox": ("bar_top",),
    "pillarbox": ("bar_left",),
    "black": ("black_share",),
    "frozen": ("frozen_share",),
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("kinds", nargs="*", default=[*DEFECTS, *CAMERAS], metavar="kind")
    parser.add_argument("--clips", type=int, default=10, help="of each kind")
    parser.add_argument("--footage", type=int, default=6, help="pieces that text and copies are planted in")
    parser.add_argument("--media", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "media")
    args = parser.parse_args(argv)
    found: dict[str, list[tuple[PlantedClip, Row]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds:
            for number in range(args.clips):
                clip = planted_clip(kind, number, args.media)
                row = measured(clip, Path(folder))
                found[kind].append((replace(clip, frames=clip.frames[:0]), row))
    defects = {kind: rows for kind, rows in found.items() if kind in DEFECTS}
    cameras = [pair for kind, rows in found.items() if kind in CAMERAS for pair in rows]
    result = {"defects": defect_table(defects), "cameras": camera_table(cameras), "off": errors(found)}
    result["ms a frame"] = cost(args.media / "clips" / "bottle-detection.mp4")
    rows = [*defect_rows(found), *camera_rows(cameras)]
    if args.footage:
        rows += [*text_rows(args.media, args.footage), *copy_rows(args.media, args.footage)]
    result["filters"] = {name: counts for name, *counts in rows}
    print_filters(rows)
    print(json.dumps({"benchmark": "filters", "clips": args.clips, **result}))
    return 0


Counts = tuple[str, int, int, int, int]  # filter, planted, found of these, clips without, falsely found of these


def defect_rows(found: Mapping[str, Planted]) -> list[Counts]:
    """Of bars, black, freezes and blur. Clips of which nobody knows whether they have it do not count."""
    clips, rows = [pair for pairs in found.values() for pair in pairs], list[Counts]()
    for name, columns in COLUMNS.items():
        truth = [any(clip.truth[column] > 0 for column in columns) for clip, _ in clips if columns[0] in clip.truth]
        said = [FOUND[name](row) for clip, row in clips if columns[0] in clip.truth]
        rows.append(_counts(name, truth, said))
    sharp = [pair for kind in ("clean", "letterbox", "pillarbox", "windowbox") for pair in found.get(kind, ())]
    blurred = list(found.get("blurred", ()))
    truth = [True] * len(blurred) + [False] * len(sharp)
    return [*rows, _counts("blurred", truth, [FOUND["blurred"](row) for _, row in blurred + sharp])]


def camera_rows(clips: Planted) -> list[Counts]:
    """Of every motion by its name."""
    return [
        _counts(
            f"camera: {name}",
            [clip.truth["camera_motion"] == name for clip, _ in clips],
            [row["camera_motion"] == name for _, row in clips],
        )
        for name in CAMERAS
    ]


def _counts(name: str, truth: Sequence[bool], said: Sequence[bool]) -> Counts:
    right = sum(both for each, both in zip(truth, said, strict=True) if each)
    return name, sum(truth), right, len(truth) - sum(truth), sum(said) - right


def text_rows(media: Path, footage: int) -> list[Counts]:
    """Of text, and of marks: those with letters and those without; of the latter where the camera moves as well."""
    print()
    of = text_table(media, footage)
    clean = of["clean"]
    signs = sorted(set(OVERLAYS) - set(TEXTS))
    rows = (("text", TEXTS, "text"), ("mark with letters", TEXTS, "mark"), ("mark without", signs, "mark"))
    found = list[Counts]()
    for name, those, column in rows:
        pieces, right = (sum(of[each][key] for each in those) for key in ("pieces", column))
        found.append((name, pieces, right, clean["pieces"], clean[column]))
    return found


def copy_rows(media: Path, footage: int) -> list[Counts]:
    """Of copies, and of pieces of standing cameras, which are none."""
    print()
    with tempfile.TemporaryDirectory() as folder:
        of = planted(media, footage, Path(folder))
    rows = list[Counts]()
    for kind in ("near", "mirrored"):
        those = [of[label] for label, change in CHANGES.items() if change.kind == kind]
        copies, right = sum(each["copies"] for each in those), sum(each["by_kind"] for each in those)
        rows.append((f"duplicate: {kind}", copies, right, copies, sum(len(each["falsely"]) for each in those)))
    standing = standing_cameras(media)
    return [*rows, ("duplicate: standing", 0, 0, standing["pieces"], len(standing["falsely"]))]


def print_filters(rows: Sequence[Counts]) -> None:
    print(f"\n{'filter':<22}{'planted':>9}{'found':>7}{'without':>9}{'falsely':>9}")
    for name, clips, right, others, wrong in rows:
        print(f"{name:<22}{clips:>9}{right:>7}{others:>9}{wrong:>9}")


def defect_table(found: Mapping[str, Sequence[tuple[PlantedClip, Row]]]) -> dict[str, dict[str, int]]:
    """Planted -> found -> of how many clips."""
    counts = {
        kind: {name: sum(is_found(row) for _, row in rows) for name, is_found in FOUND.items()}
        for kind, rows in found.items()
    }
    print_table("planted, found", list(FOUND), counts)
    return counts


def camera_table(clips: Sequence[tuple[PlantedClip, Row]]) -> dict[str, dict[str, int]]:
    """The same of what the camera does."""
    counts = {name: dict.fromkeys((*CAMERAS, "none"), 0) for name in CAMERAS}
    for clip, row in clips:
        counts[clip.truth["camera_motion"]][row["camera_motion"] or "none"] += 1
    counts = {name: row for name, row in counts.items() if sum(row.values())}
    print_table("camera", [*CAMERAS, "none"], counts)
    right = sum(row[name] for name, row in counts.items())
    print(f"{right} of {len(clips)} by their name")
    return counts


def print_table(title: str, columns: Sequence[str], counts: Mapping[str, Mapping[str, int]]) -> None:
    print("\n" + f"{title:<16}" + "".join(f"{name:>11}" for name in columns))
    for name, row in counts.items():
        print(f"{name:<16}" + "".join(f"{row[column] or '.':>11}" for column in columns))


def errors(found: Mapping[str, Sequence[tuple[PlantedClip, Row]]]) -> dict[str, dict[str, float]]:
    """Column -> how far it is off, over the clips of which it is known."""
    print("\n" + f"{'off by':<16}{'median':>11}{'9 of 10':>11}{'most':>11}")
    result = {}
    for name in NUMBERS:
        known = [(clip.truth[name], row[name]) for rows in found.values() for clip, row in rows if name in clip.truth]
        off = [
            abs(value - truth) / (truth if name == "camera_speed" else 1) for truth, value in known if value is not None
        ]
        if off:
            result[name] = {"median": float(np.median(off)), "most": float(np.max(off))}
            print(f"{name:<16}{np.median(off):>11.4f}{np.quantile(off, 0.9):>11.4f}{np.max(off):>11.4f}")
    print("(camera_speed in shares of the truth, the others as they are)")
    return result


def cost(path: Path) -> dict[str, float]:
    """Milliseconds of CPU time a frame: of the decode alone, and what each measurement adds to it."""
    alone = min(_ms(path, ()) for _ in range(3))
    result = {"decode": alone}
    for analyser in ANALYSERS:
        result[analyser.name] = min(_ms(path, (analyser,)) for _ in range(3)) - alone
    print("\nms a frame, " + path.name + ": " + ", ".join(f"{name} {ms:.3f}" for name, ms in result.items()))
    return result


def _ms(path: Path, analysers: Sequence[Any]) -> float:
    measurements, frames = [analyser.start(None) for analyser in analysers], 0
    start = time.process_time()
    for frame in scan(str(path), ScanReport(), frames=10**6, timeout_s=600):
        for measurement in measurements:
            measurement.see(frame)
        frames += 1
    return (time.process_time() - start) / frames * 1e3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
