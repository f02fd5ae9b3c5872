"""How much faster is reading a window than decoding the clip and slicing?

    python -m benchmarks.decode [--media DIR] [--windows 5] [--frames 33] [--threads 1]

Generates a 30 s 720p clip with keyframes every 24 and every 250 frames; ``--media`` adds the clips of a folder that
last 20 s or longer. Every installed decoder and the full decode run in one process with equally many threads, on the
same random windows, turn by turn. Ours must return the same bytes as the full decode; others convert colours their own
way. Times are of the processor, so that what else runs on the machine matters less; with several threads, of the clock.
Prints a table and one JSON line.
"""

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation

from opensora.datasets.decode.api import DECODERS, VIDEO_SUFFIXES, probe, read_frames, require
from opensora.utils.errors import UserError

SECONDS, FPS, HEIGHT, WIDTH = 31, 30, 720, 1280


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--media", type=Path, help="folder with real clips")
    parser.add_argument("--windows", type=int, default=5, help="random windows per clip")
    parser.add_argument("--frames", type=int, default=33, help="frames in a window")
    parser.add_argument("--threads", type=int, default=1, help="of every decoder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clips = {f"generated 720p, GOP {gop}": generate(Path(folder) / f"{gop}.mp4", gop) for gop in (24, 250)}
        clips |= long_clips(args.media) if args.media else {}
        results = [
            row for name, path in clips.items() for row in measure(name, path, args.windows, args.frames, args.threads)
        ]
    print(f"{'clip':<34} {'decoder':<10} {'frames':>6} {'full ms':>9} {'window ms':>10} {'ratio':>7}  {'identical':<9}")
    for r in results:
        row = f"{r['clip']:<34} {r['decoder']:<10} {r['frames']:>6} {r['full_ms']:>9.0f} {r['window_ms']:>10.1f}"
        print(f"{row} {r['ratio']:>7.1f}  {r['identical']}")
    print(json.dumps({"benchmark": "decode", "window": args.frames, "threads": args.threads, "results": results}))


def generate(path: Path, gop: int) -> str:
    """Noise texture that drifts under moving bars: every frame differs, and motion compensation has work to do."""
    rng = np.random.default_rng(0)
    texture = rng.integers(90, 166, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "23"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.colorspace = stream.codec_context.color_primaries = stream.codec_context.color_trc = 1
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


def full_decode(path: str, threads: int, clock: Callable[[], float]) -> tuple[float, list[bytes]]:
    """(milliseconds to decode every frame as RGB, digest of every frame); digests are not timed."""
    digests = []
    began = clock()
    spent_on_digests = 0.0
    with av.open(path) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = threads
        for frame in container.decode(stream):
            rgb = frame.reformat(format="rgb24", interpolation=Interpolation.BICUBIC).to_ndarray()
            paused = clock()
            digests.append(digest(rgb))
            spent_on_digests += clock() - paused
    return 1e3 * (clock() - began - spent_on_digests), digests


def digest(frame: np.ndarray) -> bytes:
    return hashlib.sha1(frame.tobytes()).digest()


def installed() -> list[str]:
    found = []
    for name in DECODERS:
        try:
            require(name)
            found.append(name)
        except UserError as error:
            print(error)
    return found


def measure(name: str, path: str, windows: int, count: int, threads: int) -> list[dict[str, Any]]:
    clock = time.process_time if threads == 1 else time.perf_counter
    info = probe(path)
    total = info.num_frames
    memory = np.ones((count, info.height, info.width, 3), dtype=np.uint8)  # used again, as workers do
    full: list[float] = []
    times: dict[str, list[float]] = {decoder: [] for decoder in installed()}
    identical = dict.fromkeys(times, True)
    expected: list[bytes] = []
    for start in np.random.default_rng(0).integers(0, total - count + 1, windows).tolist():
        if len(full) < 3:
            full_ms, expected = full_decode(path, threads, clock)
            full.append(full_ms)
        for decoder in times:
            began = clock()
            frames = read_frames(path, start, count, decoder=decoder, threads=threads, allocate=lambda shape: memory)
            times[decoder].append(1e3 * (clock() - began))
            identical[decoder] &= [digest(frame) for frame in frames] == expected[start : start + count]
    full_ms = statistics.median(full)
    return [
        {
            "clip": name,
            "decoder": decoder,
            "frames": total,
            "full_ms": round(full_ms, 1),
            "window_ms": round(statistics.median(spent), 1),
            "ratio": round(full_ms / statistics.median(spent), 1),
            "identical": identical[decoder] and len(expected) == total,
        }
        for decoder, spent in times.items()
    ]


if __name__ == "__main__":
    main()
