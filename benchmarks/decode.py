"""How much faster is reading a window than decoding the clip and slicing?

    python benchmarks/decode.py [--media DIR] [--windows 5] [--frames 33]

Generates a 30 s 720p clip with keyframes every 24 and every 250 frames; ``--media`` adds the clips of a folder that
last 20 s or longer. Both ways run in one process and one thread, on the same random windows, and must return the same
bytes. Prints a table and one JSON line.
"""

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation

from opensora.datasets.decode import VIDEO_SUFFIXES, probe, read_frames

SECONDS, FPS, HEIGHT, WIDTH = 30, 30, 720, 1280


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--media", type=Path, help="folder with real clips")
    parser.add_argument("--windows", type=int, default=5, help="random windows per clip")
    parser.add_argument("--frames", type=int, default=33, help="frames in a window")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clips = {f"generated 720p, GOP {gop}": generate(Path(folder) / f"{gop}.mp4", gop) for gop in (24, 250)}
        clips |= long_clips(args.media) if args.media else {}
        results = [measure(name, path, args.windows, args.frames) for name, path in clips.items()]
    print(f"{'clip':<34} {'frames':>6} {'full ms':>9} {'window ms':>10} {'ratio':>7}  identical")
    for r in results:
        row = f"{r['clip']:<34} {r['frames']:>6} {r['full_ms']:>9.0f} {r['window_ms']:>10.1f} {r['ratio']:>7.1f}"
        print(f"{row}  {r['identical']}")
    print(json.dumps({"benchmark": "decode", "window": args.frames, "results": results}))


def generate(path: Path, gop: int) -> str:
    """Noise texture that drifts under moving bars: every frame differs, and motion compensation has work to do."""
    rng = np.random.default_rng(0)
    texture = rng.integers(90, 166, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "23"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.options |= {"keyint_min": str(gop), "sc_threshold": "0"}
        for i in range(SECONDS * FPS):
            picture = np.roll(texture, (i, 2 * i), axis=(0, 1))
            picture[:, 8 * i % WIDTH : 8 * i % WIDTH + 60] = (i % 256, 255 - i % 256, 128)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def long_clips(folder: Path) -> dict[str, str]:
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES)
    infos = {path: probe(str(path)) for path in paths}
    return {p.name: str(p) for p, info in infos.items() if info.fps and info.num_frames / info.fps >= 20}


def full_decode(path: str) -> tuple[float, list[bytes]]:
    """(milliseconds to decode every frame as RGB, digest of every frame); digests are not timed."""
    digests = []
    began = time.perf_counter()
    spent_on_digests = 0.0
    with av.open(path) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            rgb = frame.reformat(format="rgb24", interpolation=Interpolation.BICUBIC).to_ndarray()
            paused = time.perf_counter()
            digests.append(digest(rgb))
            spent_on_digests += time.perf_counter() - paused
    return 1e3 * (time.perf_counter() - began - spent_on_digests), digests


def digest(frame: np.ndarray) -> bytes:
    return hashlib.sha1(frame.tobytes()).digest()


def measure(name: str, path: str, windows: int, count: int) -> dict[str, object]:
    total = probe(path).num_frames
    full_ms, expected = full_decode(path)
    times, identical = [], len(expected) == total
    for start in np.random.default_rng(0).integers(0, total - count + 1, windows).tolist():
        began = time.perf_counter()
        frames = read_frames(path, start, count)
        times.append(1e3 * (time.perf_counter() - began))
        identical &= [digest(frame) for frame in frames] == expected[start : start + count]
    window_ms = statistics.median(times)
    return {
        "clip": name,
        "frames": total,
        "full_ms": round(full_ms, 1),
        "window_ms": round(window_ms, 1),
        "ratio": round(full_ms / window_ms, 1),
        "identical": identical,
    }


if __name__ == "__main__":
    main()
