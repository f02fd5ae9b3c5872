"""What the one decode of the data pipeline costs, and what it costs that a run can be killed.

    python -m benchmarks.pipeline [--clip FILE] [--seconds 20] [--sources 24] [--heights 360 720]

A real clip is encoded anew at each height. Every analysis is a process of its own with one thread; times are CPU
seconds, since the machine may be busy, and the better of two runs counts.

* frames per second and core: decoding alone; all analysers in one decode; each of them with a decode of its own, one
  after the other; and the ratio of the last two.
* the most memory that a worker held in each stage of one source, all of whose clips are kept.
* of a whole run: what journals, keys and outputs take, which are there so that it can be killed; and a second run,
  which has nothing to do.

Prints tables and one JSON line.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from data_pipeline import journal, shard
from data_pipeline.config import PipelineConfig
from data_pipeline.media.scan import ScanReport, scan
from data_pipeline.run import PLAN_ONLY, Options, run
from data_pipeline.stage_list import GLOBAL, make_stages
from data_pipeline.stages.base import ReadsBeside, Unit
from data_pipeline.stages.frames import FramesStage
from data_pipeline.worker import Worker
from opensora.config.load import load_config

ROOT = Path(__file__).resolve().parents[1]
MEDIA = Path(os.environ.get("OPENSORA_MEDIA", ROOT.parent / "shared" / "media"))
CONFIG = ROOT / "configs" / "pipeline" / "default.yaml"
TIMES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--clip", type=Path, default=MEDIA / "clips" / "sintel_trailer_30s.mp4")
    parser.add_argument("--seconds", type=float, default=20.0, help="of it")
    parser.add_argument("--heights", type=int, nargs="+", default=[360, 720])
    parser.add_argument("--sources", type=int, default=24, help="of the whole run, each a copy at the first height")
    parser.add_argument("--analyse", nargs=2, help=argparse.SUPPRESS)  # what a process of its own is asked
    args = parser.parse_args()
    if args.analyse:
        print(json.dumps(analyse(Path(args.analyse[0]), args.analyse[1])))
        return
    folder = Path(tempfile.mkdtemp(prefix="pipeline-"))
    try:
        files = {height: encode(args.clip, folder, height, args.seconds) for height in args.heights}
        found = {str(height): one_decode(file) for height, file in files.items()}
        memory = {str(height): peaks_mib(file, folder) for height, file in files.items()}
        whole = whole_run(folder, files[args.heights[0]], args.sources)
    finally:
        shutil.rmtree(folder)
    show(found, memory, whole)
    print(json.dumps({"one_decode": found, "worker_peak_mib": memory, "run": whole}))


def configuration(source: str = "nothing", out: str = "nowhere", *more: str) -> PipelineConfig:
    return load_config(PipelineConfig, CONFIG, [f"source={source}", f"out={out}", *more])


def encode(clip: Path, folder: Path, height: int, seconds: float) -> Path:
    """The first seconds at this height, as H.264 at 24 frames a second."""
    path = folder / f"{height}.mp4"
    with av.open(str(clip)) as source, av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=24, options={"crf": "20", "g": "48"})
        first = source.streams.video[0]
        stream.width, stream.height = round(height * first.width / first.height / 2) * 2, height
        stream.pix_fmt = "yuv420p"
        for number, frame in enumerate(source.decode(first)):
            if number >= seconds * 24:
                break
            scaled = frame.reformat(stream.width, stream.height, "yuv420p")
            scaled.pts, scaled.time_base = number, Fraction(1, 24)
            out.mux(stream.encode(scaled))
        out.mux(stream.encode())
    return path


def analysers() -> dict[str, Any]:
    stage = make_stages(configuration())["frames"]
    assert isinstance(stage, FramesStage)
    return {each.name: each for each in stage._analysers}


def analyse(file: Path, names: str) -> dict[str, float]:
    """Frames and CPU seconds of one decode for these analysers, joined by commas; none: decoding alone."""
    cfg, report = configuration(), ScanReport()
    every = analysers()
    chosen = tuple(every[name] for name in names.split(",") if name)
    probed = make_stages(cfg)["probe"].run(Unit(source=file.name, file=str(file)))  # type: ignore[union-attr]
    start = time.process_time()
    if not chosen:
        for _ in scan(str(file), report, frames=10**6, timeout_s=3600):
            pass
        return {"frames": report.frames, "seconds": time.process_time() - start}
    (row,) = FramesStage(chosen, cfg.limits).run(Unit(source=file.name, file=str(file), rows={"probe": probed}))
    return {"frames": len(row["pts"]), "seconds": time.process_time() - start}


def measured(file: Path, names: str) -> dict[str, float]:
    """The better of ``TIMES`` processes."""
    command = [sys.executable, "-m", "benchmarks.pipeline", "--analyse", str(file), names]
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"), "1")
    said = [
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(TIMES)
    ]
    return min((json.loads(text.splitlines()[-1]) for text in said), key=lambda one: one["seconds"])


def one_decode(file: Path) -> dict[str, Any]:
    names = list(analysers())
    alone, together = measured(file, ""), measured(file, ",".join(names))
    each = {name: measured(file, name)["seconds"] for name in names}
    return {
        "frames": together["frames"],
        "decode_fps": alone["frames"] / alone["seconds"],
        "one_decode_fps": together["frames"] / together["seconds"],
        "one_by_one_fps": together["frames"] / sum(each.values()),
        "ratio": sum(each.values()) / together["seconds"],
        "over_decode": together["seconds"] / alone["seconds"],
        "seconds": {"decode": alone["seconds"], "together": together["seconds"], **each},
    }


def peaks_mib(file: Path, folder: Path) -> dict[str, float]:
    """Stage -> the most that the worker process held in it, one stage after the other of one source."""
    cfg = configuration(str(file.parent), str(folder / "clips"))
    stages = {name: stage for name, stage in make_stages(cfg).items() if name not in GLOBAL}
    worker, rows, peaks = Worker(stages, cfg.limits), dict[str, Any](), dict[str, float]()  # type: ignore[arg-type]
    for name, stage in stages.items():
        read = {of: [] if of in GLOBAL else to_rows_of(rows[of], columns) for of, columns in stage.reads.items()}
        if worker.pid is not None:
            Path(f"/proc/{worker.pid}/clear_refs").write_text("5")  # the most so far is forgotten
        beside = {"beside": [stage.beside(str(file))]} if isinstance(stage, ReadsBeside) else {}
        rows[name] = worker.run(name, Unit(source=file.name, file=str(file), rows=read | beside))
        status = Path(f"/proc/{worker.pid}/status").read_text()
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert peak
        peaks[name] = int(peak[1]) / 1024
    worker.close()
    return peaks


def to_rows_of(table: Any, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Every clip is kept, so that all stages have work."""
    rows = shard.to_rows(table.select(list(columns)))
    return [row | {"keep": True} if "keep" in row else row for row in rows]


def whole_run(folder: Path, file: Path, sources: int) -> dict[str, float]:
    """Seconds of the analysis of all sources, with verdicts; of what makes it restartable, and of a run that
    has nothing to do."""
    where = folder / "sources"
    where.mkdir()
    for number in range(sources):
        content = file.read_bytes() + b"\0\0\0\x0cfree" + number.to_bytes(4, "big")  # other bytes, the same video
        (where / f"{number}.mp4").write_bytes(content)
    last = "screen"
    cfg = configuration(str(where), str(folder / "run"), "engine.workers=1")
    run(cfg, Options(until=PLAN_ONLY))
    spent = time_spent()
    start = time.perf_counter()
    run(cfg, Options(until=last))
    seconds, books = time.perf_counter() - start, sum(spent.values())
    start = time.perf_counter()
    command = [sys.executable, "-m", "data_pipeline.run", str(folder / "run" / "config.yaml"), "--until", last]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    again = time.perf_counter() - start
    return {"sources": sources, "seconds": seconds, "bookkeeping_s": books, "share": books / seconds, "again_s": again}


def time_spent() -> dict[str, float]:
    """Seconds that go by in what a run that cannot be killed would not do, from now on."""
    spent: dict[str, float] = {}

    def timed(owner: Any, name: str) -> None:
        original = getattr(owner, name)
        spent[name] = 0.0

        def wrapper(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **options)
            finally:
                spent[name] += time.perf_counter() - start

        setattr(owner, name, wrapper)

    timed(journal.Journal, "_append")
    timed(shard, "unit_key")
    timed(shard.ShardRun, "_known")
    timed(shard.ShardRun, "finish")
    return spent


def show(found: dict[str, Any], memory: dict[str, dict[str, float]], whole: dict[str, float]) -> None:
    print("\n| height | decode, fps | one decode, fps | one by one, fps | ratio | over decode |")
    print("|---|---|---|---|---|---|")
    for height, one in found.items():
        speeds = " | ".join(f"{one[name]:.0f}" for name in ("decode_fps", "one_decode_fps", "one_by_one_fps"))
        print(f"| {height} | {speeds} | {one['ratio']:.2f} | {one['over_decode']:.2f} |")
    names = list(next(iter(memory.values())))
    print(f"\n| height; MiB of a worker in | {' | '.join(names)} |\n|{'---|' * (1 + len(names))}")
    for height, peaks in memory.items():
        print(f"| {height} | {' | '.join(f'{peaks[name]:.0f}' for name in names)} |")
    print("\n| sources | run, s | to be restartable, s | share | second run, s |\n|---|---|---|---|---|")
    print(
        f"| {whole['sources']:.0f} | {whole['seconds']:.1f} | {whole['bookkeeping_s']:.3f} | {whole['share']:.2%} "
        f"| {whole['again_s']:.2f} |\n"
    )


if __name__ == "__main__":
    main()
