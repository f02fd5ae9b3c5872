"""What an index of very many clips costs: building it, sorting it into buckets, starting and restoring a run.

    python -m benchmarks.index [--rows 10000000 100000000] [--folder DIR] [--threads N]

Synthetic parquet shards of a million rows: one is generated (lognormal durations, a fifth images, captions of about
100 characters), the others are hard links to it, which are read, checked, hashed and written as any other. Every start
of a run is a process of its own; its private memory is what imports left plus what is reported. At 100 million rows the
folder needs 18 GB. Then a row-wise pandas apply of the same rules on 100 thousand rows, for comparison. Times are given
as elapsed and as CPU seconds, since the machine may be busy. Prints tables and one JSON line.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as papq
import yaml

from benchmarks.clip_columns import clip_columns
from opensora.datasets.buckets.aspect import area_of, training_sizes
from opensora.datasets.buckets.bucket import BucketTable
from opensora.datasets.buckets.shape_class_index import index_shape_classes
from opensora.datasets.config import DataConfig
from opensora.datasets.plan.batch_plan import BatchPlan
from opensora.datasets.plan.epoch import Epoch, Source
from opensora.datasets.table.index import index_of, open_index
from opensora.datasets.table.manifest import COLUMNS, ClipTable, TextsInMemory

SHARD = 1_000_000
STAGE = Path(__file__).resolve().parents[1] / "configs" / "data" / "stage1.yaml"
WORDS = (
    "a",
    "the",
    "camera",
    "slowly",
    "moves",
    "over",
    "green",
    "hills",
    "while",
    "birds",
    "fly",
    "in",
    "soft",
    "light",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, nargs="+", default=[10 * SHARD, 100 * SHARD])
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder, removed at the end")
    parser.add_argument("--threads", type=int, help="that build the index; default: one per core")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)  # a run's start on this index, in this process
    parser.add_argument("--step", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if any(rows < SHARD or rows % SHARD for rows in args.rows):
        parser.error(f"--rows: must be multiples of {SHARD}, the rows of a shard")
    if args.start:
        print(json.dumps(start_run(args.start, args.step)))
        return
    folder = args.folder or Path(tempfile.mkdtemp())
    try:
        (folder / "tables").mkdir(parents=True, exist_ok=True)
        shard = folder / "shard.parquet"
        write_shard(shard)
        results = [measure(folder, shard, rows, args.threads) for rows in args.rows]
    finally:
        if args.folder is None:
            shutil.rmtree(folder)
    ratio = against_pandas(100_000)
    print(json.dumps({"benchmark": "index", "load": os.getloadavg()[0], "results": results, "pandas": ratio}))


def write_shard(path: Path) -> None:
    rng = np.random.default_rng(0)
    captions = pa.array([" ".join(rng.choice(WORDS, rng.integers(10, 30))) for _ in range(20_000)])
    columns = clip_columns(SHARD, 1)
    names = pc.binary_join_element_wise("part-0001/clips", pc.cast(pa.array(np.arange(SHARD)), pa.string()), "/")
    table = {
        "path": pc.binary_join_element_wise(names, "video.mp4", "/"),
        "text": captions.take(rng.integers(0, 20_000, SHARD)),
    }
    table |= {name: pa.array(values, from_pandas=True) for name, values in columns.items()}
    papq.write_table(pa.table(table), path, row_group_size=SHARD // 8)


def measure(folder: Path, shard: Path, rows: int, threads: int | None) -> dict[str, Any]:
    files = []
    for number in range(rows // SHARD):
        files.append(folder / "tables" / f"{rows}-{number:05}.parquet")
        if not files[-1].exists():
            os.link(shard, files[-1])
    watch = Watch()
    index = index_of(files, folder / "index", threads)
    found: dict[str, Any] = {"rows": rows, "index": watch.lap()}
    index_of(files, folder / "index", threads)
    found["index again"] = watch.lap()
    table = open_index(index)
    index_shape_classes(table, BucketTable(config(), 16))
    found["kinds"] = watch.lap()
    plan = BatchPlan(table, config(), 16, 0)
    steps = plan.steps_in_epoch(0)
    found["first start"] = in_process(index, 0)
    found["restore"] = in_process(index, 3 * steps + steps // 2)
    fixed = sum((index / f"{name}.bin").stat().st_size for name in COLUMNS)
    ids = next(index.glob("kinds-*/ids.bin")).stat().st_size
    texts = sum(file.stat().st_size for file in index.glob("text-*.arrow"))
    found["bytes per row"] = {"columns": fixed / rows, "ids by kind": ids / rows, "texts": texts / rows}
    report(found)
    return found


def report(found: dict[str, Any]) -> None:
    print(f"\n{found['rows']:,} rows; load of the machine {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores")
    for name in ("index", "index again", "kinds"):
        elapsed, cpu = found[name]
        print(f"  {name:<34} {elapsed:>9.2f} s elapsed {cpu:>9.2f} s CPU")
    for name in ("first start", "restore"):
        for key in ("open and plan", "samples of the step", "captions and paths"):
            elapsed, cpu = found[name][key]
            print(f"  {name + ': ' + key:<34} {elapsed:>9.3f} s elapsed {cpu:>9.3f} s CPU")
        memory = found[name]
        print(f"  {name}: private memory {memory['private MiB']:.0f} MiB, mapped files {memory['shared MiB']:.0f} MiB")
    print("  bytes per row: " + ", ".join(f"{key} {value:.1f}" for key, value in found["bytes per row"].items()))


def in_process(index: Path, step: int) -> dict[str, Any]:
    """``start_run`` in a new process."""
    command = [sys.executable, "-m", "benchmarks.index", "--start", str(index), "--step", str(step)]
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root)
    return json.loads(run.stdout)


def start_run(index: Path, step: int) -> dict[str, Any]:
    """From nothing to the samples of a step."""
    anonymous, mapped = memory_mib()
    watch = Watch()
    table = open_index(index)
    plan = BatchPlan(table, config(), 16, 0)
    found: dict[str, Any] = {"open and plan": watch.lap()}
    mine = plan.assign(step, 0, 8)
    found["samples of the step"] = watch.lap()
    texts = [(table.path(i), table.caption(i)) for m in mine for i in m.sample_ids]
    assert texts
    found["captions and paths"] = watch.lap()
    for later in range(step + 1, step + 200):
        plan.assign(later, 0, 8)
    found["200 steps"] = watch.lap()
    after = memory_mib()
    return found | {"epoch": plan.epoch_of(step), "private MiB": after[0] - anonymous, "shared MiB": after[1] - mapped}


def memory_mib() -> tuple[float, float]:
    """Resident memory of this process: its own, and of files, which processes share."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    own, files = (int(fields[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile"))
    return own, files


class Watch:
    """Elapsed and CPU seconds since the last lap."""

    def __init__(self) -> None:
        self._then = time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        then, self._then = self._then, (time.perf_counter(), time.process_time())
        return self._then[0] - then[0], self._then[1] - then[1]


def config() -> DataConfig:
    """Stage 1 of Open-Sora 2 on 224 cards, whose stills are drawn anew every epoch."""
    return DataConfig(buckets=yaml.safe_load(STAGE.read_text())["data"]["buckets"], micro_batches=224)


def against_pandas(rows: int) -> dict[str, float]:
    columns = clip_columns(rows, 2)
    frame = pd.DataFrame(columns)
    watch = Watch()
    frame.apply(lambda row: bucket_of_row(row, CONFIG.buckets), axis=1)
    _, by_row = watch.lap()
    nothing = pa.chunked_array([[""]])
    table = ClipTable(**columns, texts=TextsInMemory(nothing, nothing), folders=("",), first_rows=np.zeros(1, np.int64))
    watch.lap()
    buckets = BucketTable(CONFIG, 16)
    Epoch(Source(buckets, buckets.shares(), index_shape_classes(table, buckets), 0), 0)
    _, by_column = watch.lap()
    ratio = by_row / by_column
    print(f"\nbuckets of {rows:,} rows: pandas apply {by_row:.2f} s CPU, ours {by_column:.3f} s: {ratio:.0f} x")
    return {"rows": rows, "pandas_s": by_row, "ours_s": by_column, "ratio": ratio}


CONFIG = config()
RANDOM = np.random.default_rng(0)


def bucket_of_row(row: pd.Series, table: dict[str, dict[int, Any]]) -> tuple[str, int, int] | None:
    """The rules, a row at a time."""
    frames = int(row["num_frames"])
    if row["fps"] >= 24:
        frames //= math.ceil(row["fps"] / 24)
    for resolution in sorted(table, key=area_of, reverse=True):
        if row["height"] * row["width"] < 0.8 * area_of(resolution):
            continue
        image = row["num_frames"] == 1 or frames == 1
        lengths = [n for n in sorted(table[resolution], reverse=True) if (n == 1 if image else 1 < n <= frames)]
        if lengths and RANDOM.random() < table[resolution][lengths[0]][0]:
            ratio = math.log(row["width"] / row["height"])
            sizes = training_sizes(resolution, 16)
            nearest = min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i][1] / sizes[i][0]) - ratio))
            return resolution, lengths[0], nearest
    return None


if __name__ == "__main__":
    main()
