"""From raw videos to a trained step: ``python -m benchmarks.raw_to_step [--media DIR] [--out DIR] [--steps N]``.

Real one-shot clips of the media folder are joined into long videos, so that every cut is known to the frame; then
``launch/demo.sh --raw`` is run as a user would. Printed: the cuts found and missed, the clips, and what each part took.
"""

import argparse
import json
import subprocess
import sys
import time
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as papq

from data_pipeline.media.scan import ScanReport, scan
from opensora.utils.files.video_writer import write_video
from tests.shot_set import ONE_SHOT

ROOT = Path(__file__).resolve().parents[1]
HEIGHT, WIDTH, FPS = 270, 480, 24
VIDEOS = 3
MOST_FRAMES = 144  # of a clip: six seconds
TOLERANCE_S = 0.3


def main() -> int:
    args = _parse()
    raw, out = args.out / "raw", args.out / "demo"
    raw.mkdir(parents=True, exist_ok=True)
    cuts = make_videos(args.media, raw)
    print(f"{len(cuts)} videos, {sum(map(len, cuts.values()))} cuts", flush=True)
    began = time.monotonic()
    demo = ["bash", "launch/demo.sh", "--raw", str(raw), "--out", str(out), "--steps", str(args.steps)]
    code = subprocess.run(demo, cwd=ROOT).returncode
    if code:
        return code
    minutes = (time.monotonic() - began) / 60
    rows = papq.read_table(out / "data" / "clips.parquet").to_pylist()
    print(f"\nraw videos to trained model and samples: {minutes:.1f} minutes, {args.steps} steps")
    print(f"{len(rows)} clips, {sum(row['keep'] for row in rows)} kept")
    return _compare(cuts, rows)


def make_videos(media: Path, folder: Path) -> dict[str, list[float]]:
    """Long videos of real clips, one behind the other; the seconds of the cuts of each."""
    cuts: dict[str, list[float]] = {}
    for number in range(VIDEOS):
        shots = [_frames(media / "clips" / name) for name in ONE_SHOT[number::VIDEOS]]
        name = f"long_{number}.mp4"
        write_video(folder / name, np.concatenate(shots), FPS, crf=20)
        ends = list(accumulate(len(shot) for shot in shots))[:-1]
        cuts[name] = [float(Fraction(end, FPS)) for end in ends]
    (folder / "cuts.json").write_text(json.dumps(cuts, indent=1))
    return cuts


def _frames(path: Path) -> np.ndarray:
    """(n, HEIGHT, WIDTH, 3) uint8 RGB, cropped to fill; at most ``MOST_FRAMES``."""
    found = []
    for frame in scan(str(path), ScanReport(), frames=10**6, timeout_s=3600):
        bgr = frame.bgr(854)
        scale = max(HEIGHT / bgr.shape[0], WIDTH / bgr.shape[1])
        size = max(WIDTH, round(bgr.shape[1] * scale)), max(HEIGHT, round(bgr.shape[0] * scale))
        scaled = cv2.resize(bgr, size, interpolation=cv2.INTER_AREA)
        top, left = (scaled.shape[0] - HEIGHT) // 2, (scaled.shape[1] - WIDTH) // 2
        found.append(scaled[top : top + HEIGHT, left : left + WIDTH, ::-1])
        if len(found) == MOST_FRAMES:
            break
    return np.array(found)


def _compare(cuts: dict[str, list[float]], rows: list[dict]) -> int:
    """A clip of a source begins at every cut; 0: at all of them and nowhere else."""
    missed = false = 0
    for name, known in cuts.items():
        starts = [row["start_s"] for row in rows if row["source"] == name and row["start_s"]]
        missed += sum(all(abs(at - start) > TOLERANCE_S for start in starts) for at in known)
        false += sum(all(abs(at - start) > TOLERANCE_S for at in known) for start in starts)
    total = sum(map(len, cuts.values()))
    print(f"cuts: {total - missed} of {total} found, {false} where none is")
    return int(bool(missed or false))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--media", type=Path, default=ROOT.parent / "shared" / "media")
    parser.add_argument("--out", type=Path, default=Path("outputs/raw_to_step"))
    parser.add_argument("--steps", type=int, default=40)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
