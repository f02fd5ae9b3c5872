"""Copies of real footage that are planted: which of them the data pipeline finds, and what else it takes for copies.

    python -m benchmarks.duplicates [--media DIR] [--footage 28] [--clips 100000]

Each kind of change is made to every piece of footage (tests/copies.py), and the search runs over all pieces and these
copies. Then over all real files as they are; over cameras that stand still, whose every few seconds look alike, as
parts of one file and each as a file of its own, and with copies of them; and over made-up hashes of as many clips as
``--clips``, for time and memory. Prints tables and one JSON line.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.analysis.hashes import SIDE, picture_hash, thumbnail
from data_pipeline.limits import SourceLimits
from data_pipeline.matching.candidates import find_candidates
from data_pipeline.media.scan import ScanReport, scan
from data_pipeline.rows import Row
from data_pipeline.stages.base import SourceError
from data_pipeline.stages.duplicates import DuplicatesConfig, DuplicatesStage
from opensora.datasets.decode.api import DecodeError
from opensora.utils.files.video_writer import write_video
from tests.copies import CHANGES, Change, Pile, footage
from tests.made_up_prints import made_up_prints
from tests.shot_set import REAL

STAGE = DuplicatesStage(DuplicatesConfig(), SourceLimits())
# Files of shared media that show the same: a test picture, twice; three of one rabbit; one launch, with other colours.
SAME = (
    {"rabbit.mp4", "rabbit320.mp4", "rabbit320.webm"},
    {"nasa_13013.mp4", "nasa_13013_hdr.mp4"},
    {"av1_video.mkv", "corrupted.mp4"},
)
STANDING = {
    "bottle-detection.mp4": 13,
    "car-detection.mp4": 10,
    "one-by-one-person-detection.mp4": 40,
    "again.mkv": 2,
    "book.mkv": 2,
}  # -> how many pieces
OF_STANDING = (
    "encoded badly", "half the size", "letterboxed", "cropped at a corner", "brighter", "3 frames later",
    "mirrored, badly",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--media", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "media")
    parser.add_argument("--footage", type=int, default=28, help="pieces of it")
    parser.add_argument("--clips", type=int, default=100_000, help="made up, for time and memory")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"benchmark": "duplicates"}
    with tempfile.TemporaryDirectory() as folder:
        result["planted"] = planted(args.media, args.footage, Path(folder))
    result["files"] = as_they_are(args.media)
    result["standing"] = standing_cameras(args.media)
    with tempfile.TemporaryDirectory() as folder:
        result["standing copies"] = standing_copies(args.media, Path(folder))
    result["speed"] = speed(args.clips)
    print(json.dumps(result))
    return 0


def planted(media: Path, count: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Change -> how many of the copies are found, as what they are, and what else is."""
    ranges = [each for half in REAL.values() for each in half][:count]
    pile, pieces = Pile(), dict[str, tuple[np.ndarray, float]]()
    for number, (name, first, end) in enumerate(ranges):
        pieces[f"{number:02d} {name}"] = frames, fps = footage(media / "clips" / name, first, end)
        add(pile, folder, f"{number:02d} {name}", frames, fps, Change(lambda frames: frames, crf=14))
    print(f"{'copies that are':<26}{'found':>12}{'by kind':>9}{'distance':>10}{'falsely':>9}  missed")
    return {label: one_change(pile, folder, pieces, label, change) for label, change in CHANGES.items()}


def add(pile: Pile, folder: Path, name: str, frames: np.ndarray, fps: float, change: Change) -> None:
    path = folder / "clip.mp4"
    write_video(path, np.ascontiguousarray(change.make(frames)), fps, crf=change.crf)
    pile.add(name, path)


def one_change(
    pile: Pile, folder: Path, pieces: dict[str, tuple[np.ndarray, float]], label: str, change: Change
) -> dict[str, Any]:
    for name, (frames, fps) in pieces.items():
        add(pile, folder, f"{name} copy", frames, fps, change)
    found = links(pile, [*pieces, *(f"{name} copy" for name in pieces)])
    right = {one.removesuffix(" copy"): row for (one, two), row in found.items() if two.removesuffix(" copy") == one}
    right |= {two.removesuffix(" copy"): row for (one, two), row in found.items() if one.removesuffix(" copy") == two}
    falsely = [pair for pair in found if pair[0].removesuffix(" copy") != pair[1].removesuffix(" copy")]
    by_kind = sum(row["duplicate_kind"] == change.kind for row in right.values())
    missed = sorted(set(pieces) - set(right))
    far = max((row["duplicate_distance"] for row in right.values()), default=0.0)
    print(
        f"{label:<26}{len(right):>6} of {len(pieces):<2}{by_kind:>9}{far:>10.2f}{len(falsely):>9}  {', '.join(missed)}"
    )
    return {"copies": len(pieces), "found": len(right), "by_kind": by_kind, "falsely": falsely, "missed": missed}


def links(pile: Pile, names: Sequence[str]) -> dict[tuple[str, str], Row]:
    """(clip, the one that is kept of its group) -> its row; clips by source, and number where a source has several."""
    tables = pile.tables(names)
    rows = STAGE.run_all(tables, pile.rows_of).to_pylist()
    shots = list(zip(tables["shots"]["source"].to_pylist(), tables["shots"]["clip_id"].to_pylist(), strict=True))
    label = {clip: f"{source} {clip.partition('-')[2]}".strip() for source, clip in shots}
    return {
        (label[clip], label[row["duplicate_of"]]): row
        for (_, clip), row in zip(shots, rows, strict=True)
        if row["duplicate_of"] is not None and row["duplicate_of"] != clip
    }


def as_they_are(media: Path) -> dict[str, Any]:
    """All real files, each as one clip."""
    pile = Pile()
    for path in sorted([*(media / "clips").iterdir(), *(media / "edge_cases").iterdir()]):
        try:
            pile.add(path.name, path)
        except (DecodeError, SourceError) as error:
            print(f"{path.name}: {error}")
    found = links(pile, list(pile.rows))
    known = {pair: any(set(pair) <= group for group in SAME) for pair in found}
    print("\nall files as they are")
    for pair, row in found.items():
        note = "" if known[pair] else "  FALSELY"
        print(f"{pair[0]:<28}{pair[1]:<28}{row['duplicate_kind']:<9}{row['duplicate_distance']:.2f}{note}")
    return {"files": len(pile.rows), "pairs": list(found), "falsely": [pair for pair in found if not known[pair]]}


def standing_cameras(media: Path) -> dict[str, Any]:
    """Pieces of one scene, seen by a camera that does not move: all are other moments."""
    pile = Pile()
    for name, pieces in STANDING.items():
        pile.add(name, media / "clips" / name, pieces=pieces)
    found, total = links(pile, list(pile.rows)), sum(STANDING.values())
    print(f"\npieces of standing cameras: {total}; taken for copies of another: {len(found)}")
    for pair, row in found.items():
        print(f"{pair[0]:<38}{pair[1]:<38}{row['duplicate_distance']:.2f}")
    apart = links(files := one_file_each(pile), list(files.rows))
    print(f"the same, each as a file of its own: {len(apart)}")
    for pair, row in apart.items():
        print(f"{pair[0]:<38}{pair[1]:<38}{row['duplicate_distance']:.2f}")
    return {"pieces": total, "falsely": list(found), "falsely, files": list(apart)}


def one_file_each(pile: Pile) -> Pile:
    """Clips as if each were all that its file has."""
    apart = Pile()
    for name, rows in pile.rows.items():
        for number in range(len(rows["shots"])):
            of_file = {stage: rows[stage] for stage in ("probe", "frames")}
            of_clip = {stage: [rows[stage][number]] for stage in rows if stage not in of_file}
            apart.rows[f"{name} {number:02d}"] = of_file | of_clip
    return apart


def standing_copies(media: Path, folder: Path) -> dict[str, dict[str, list[int]]]:
    """Half of the pieces of standing cameras -> change -> [copies, found, taken for copies of other pieces]. Even
    pieces are those that limits are chosen on."""
    result = dict[str, dict[str, list[int]]]()
    for half, name in enumerate(("even pieces", "odd pieces")):
        pile, pieces = Pile(), dict[str, tuple[np.ndarray, float]]()
        for file, count in STANDING.items():
            ends = np.linspace(0, _frames(media / "clips" / file), count + 1).astype(int)
            for piece in range(half, count, 2):
                label = f"{piece:02d} {file}"
                pieces[label] = frames, fps = footage(media / "clips" / file, int(ends[piece]), int(ends[piece + 1]))
                add(pile, folder, label, frames, fps, Change(lambda frames: frames, crf=14))
        print(f"\n{name} of standing cameras, each a file; copies that are")
        found = {label: one_change(pile, folder, pieces, label, CHANGES[label]) for label in OF_STANDING}
        result[name] = {label: [row["copies"], row["found"], len(row["falsely"])] for label, row in found.items()}
    return result


def _frames(path: Path) -> int:
    return sum(1 for _ in scan(str(path), ScanReport(), frames=10**6, timeout_s=600))


def speed(clips: int) -> dict[str, float]:
    """Microseconds of a sampled frame, and the search over made-up clips of five seconds."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (36, 64), dtype=np.uint8)
    thumb = rng.integers(0, 256, (1000, SIDE, SIDE), dtype=np.uint8)
    small_us = 1e6 * timed(lambda: [thumbnail(grey) for _ in range(1000)]) / 1000
    hash_us = 1e6 * timed(lambda: picture_hash(thumb)) / 1000
    prints, copies = made_up_prints(clips, seed=0)
    begin = time.process_time()
    found = find_candidates(prints, overlap=0.8)
    search_s = time.process_time() - begin
    pairs = {(min(a, b), max(a, b)) for a, b in zip(found.clip.tolist(), found.other.tolist(), strict=True)}
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    right, others = len(pairs & copies), len(pairs - copies)
    print(f"\na picture {small_us:.0f} us, its hash {hash_us:.1f} us")
    print(f"{clips} clips: {search_s:.0f} s, {peak_mib:.0f} MiB; {right} of {len(copies)} copies, {others} others")
    return {"picture_us": small_us, "hash_us": hash_us, "search_s": search_s, "peak_mib": peak_mib, "others": others}


def timed(work: Any) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
