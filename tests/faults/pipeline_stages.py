"""A pipeline of tests: the real probe and decode, a stage that does to its worker what a file's name says, one over all
sources and one behind it. ``python -m tests.faults.pipeline_stages CONFIG [...]`` is data_pipeline.run with these.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from data_pipeline import pipeline, run
from data_pipeline.rows import Row
from data_pipeline.stages.base import Resources, RowsOf, SourceError, Unit
from data_pipeline.stages.frames import FramesStage
from data_pipeline.stages.probe import ProbeStage

# An option of the configuration would reach real runs; the environment reaches the workers of every engine.
PAUSE = "OPENSORA_TEST_PAUSE_S"
HOSTILE = ("dies", "hangs", "hogs", "leaves", "asks", "exits", "raises", "refuses", "full")
_KEPT: list[np.ndarray] = []


@dataclass(frozen=True)
class NoConfig:
    """There is nothing to choose."""


class HostileStage:
    """One row per frame, but for files whose name begins with a word of ``HOSTILE``."""

    name: ClassVar[str] = "hostile"
    version: ClassVar[int] = 1
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {"probe": ("sha256",), "frames": ("pts", "time_base")}
    columns: ClassVar[pa.Schema] = pa.schema([("pts", pa.int64()), ("values", pa.list_(pa.float32()))])
    resources: ClassVar[Resources] = Resources()
    config: Any = NoConfig()

    def run(self, unit: Unit) -> list[Row]:
        time.sleep(float(os.environ.get(PAUSE, "0")))
        word = os.path.basename(unit.source).partition("-")[0]
        if word in HOSTILE:
            getattr(self, f"_{word}")()
        times = unit.row("frames")["pts"]
        return [{"pts": int(pts), "values": np.sqrt(np.arange(pts % 7, dtype=np.float32))} for pts in times]

    def _dies(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def _exits(self) -> None:
        os._exit(0)

    def _hangs(self) -> None:
        time.sleep(3600)

    def _hogs(self) -> None:
        held = []
        while True:
            held.append(np.ones(2**24))

    def _leaves(self) -> None:
        _KEPT.append(np.ones(2**25))  # 256 MiB

    def _asks(self) -> None:
        np.ones(2**25)

    def _raises(self) -> None:
        raise ZeroDivisionError("a mistake of a library\nin two lines")

    def _refuses(self) -> None:
        raise SourceError("not today", kind="mood")

    def _full(self) -> None:
        raise OSError(28, "No space left on device", "/somewhere/clip.mp4")


class CensusStage:
    """Over all sources: how many have as many frames."""

    name: ClassVar[str] = "census"
    version: ClassVar[int] = 1
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {"frames": ("height",), "hostile": ("pts",)}
    columns: ClassVar[pa.Schema] = pa.schema([("frames", pa.int32()), ("like_it", pa.int32())])
    config: Any = NoConfig()

    def run_all(self, tables: Mapping[str, pa.Table], rows_of: RowsOf) -> pa.Table:
        names = tables["hostile"]["source"].to_pylist()
        counts = {name: names.count(name) for name in dict.fromkeys(names)}
        like_it = [list(counts.values()).count(count) for count in counts.values()]
        columns = {"source": list(counts), "frames": list(counts.values()), "like_it": like_it}
        return pa.table(columns, schema=pa.schema([("source", pa.string()), *self.columns]))


class VerdictStage:
    """What the one over all sources says of each."""

    name: ClassVar[str] = "verdict"
    version: ClassVar[int] = 1
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {"hostile": ("pts",), "census": ("frames", "like_it")}
    columns: ClassVar[pa.Schema] = pa.schema([("keep", pa.bool_())])
    resources: ClassVar[Resources] = Resources()
    config: Any = NoConfig()

    def run(self, unit: Unit) -> list[Row]:
        time.sleep(float(os.environ.get(PAUSE, "0")) / 4)
        return [{"keep": row["like_it"] > 1} for row in unit.rows["census"]]


def make_stages(cfg: Any) -> dict[str, Any]:
    stages = [
        ProbeStage(cfg.probe, cfg.limits),
        FramesStage((), cfg.limits),
        HostileStage(),
        CensusStage(),
        VerdictStage(),
    ]
    return {stage.name: stage for stage in stages}


def main() -> int:
    pipeline.make_stages = make_stages
    pipeline.GLOBAL = run.GLOBAL = ("census",)
    run._make_table = lambda *_: None  # it asks for stages that are not here
    return run.main()


if __name__ == "__main__":
    # Stages travel by name, and __main__ is another module in a worker.
    from tests.faults.pipeline_stages import main as main_by_name

    sys.exit(main_by_name())
