"""A stage of clips makes only the rows of clips whose own inputs changed, however many clips a source has."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from data_pipeline.log import RunLog
from data_pipeline.outputs import Done, list_outputs, read_output, write_output
from data_pipeline.plan import SourceFile
from data_pipeline.rows import Row, to_rows, to_table
from data_pipeline.shard import ShardRun, ShardTask
from data_pipeline.stages.base import Resources, Unit

FRAMES, SHOTS = pa.schema([("pts", pa.list_(pa.int64()))]), pa.schema([("first", pa.int32())])
SCREEN = pa.schema([("keep", pa.bool_())])


class LettersStage:
    """Reads what is kept; remembers what it was asked to read."""

    name: ClassVar[str] = "letters"
    version: ClassVar[int] = 1
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {"frames": ("pts",), "shots": ("first",), "screen": ("keep",)}
    columns: ClassVar[pa.Schema] = pa.schema([("letters", pa.int64()), ("error", pa.string())])
    resources: ClassVar[Resources] = Resources()
    per_clip: ClassVar[bool] = True
    retry_column: ClassVar[str] = "error"
    config: Any = None

    def __init__(self) -> None:
        self.made: list[int] = []
        self.fails_at = -1

    def run(self, unit: Unit) -> list[Row]:
        clips = zip(unit.rows["shots"], unit.rows["screen"], unit.before or [None] * 99, strict=False)
        return [before or self._row(shot["first"], kept["keep"]) for shot, kept, before in clips]

    def _row(self, first: int, keep: bool) -> Row:
        if not keep:
            return {}
        self.made.append(first)
        return {"letters": None, "error": "busy"} if first == self.fails_at else {"letters": 100 + first}


class Here:
    """A worker without a process."""

    def __init__(self, stage: LettersStage) -> None:
        self._stage = stage

    def run(self, stage: str, unit: Unit) -> pa.Table:
        return to_table(self._stage.run(unit), self._stage.columns)


def letters(
    out: Path, stage: LettersStage, key: str, *, pts: list[int], keep: list[bool], retry: bool = False
) -> list[Row]:
    """The rows of the one source, from the inputs given; ``stage.made`` are the clips that were read now."""
    stage.made.clear()
    tables = {
        "frames": to_table([{"pts": pts}], FRAMES),
        "shots": to_table([{"first": 10 * number} for number in range(len(keep))], SHOTS),
        "screen": to_table([{"keep": each} for each in keep], SCREEN),
    }
    inputs = {
        name: write_output(out / name, "000000", key, table.schema, [(Done("a.mp4", "", table.num_rows), table)])
        for name, table in tables.items()
    }
    (out / "a.mp4").touch()
    found = (out / "a.mp4").stat()
    source = SourceFile("a.mp4", str(out / "a.mp4"), found.st_size, found.st_mtime_ns)
    task = ShardTask(
        out=out, stage=stage, stage_key="letters", shard="000000", key=key, sources=(source,), inputs=inputs,
        shared={}, attempts=1, retry=retry,
    )  # fmt: skip
    run = ShardRun(task, RunLog(out))
    for unit in run.pending:
        run.compute(unit, Here(stage))  # type: ignore[arg-type]
    run.finish()
    output = read_output(list_outputs(out / "letters")["000000", key])
    assert output is not None
    return to_rows(output.table)


def test_a_clip_that_a_threshold_lets_pass_costs_itself_alone(tmp_path: Path) -> None:
    stage, key = LettersStage(), "0123456789abcde{}".format
    rows = letters(tmp_path, stage, key(0), pts=[1, 2], keep=[True, False, True])
    assert stage.made == [0, 20] and [row["letters"] for row in rows] == [100, None, 120]
    rows = letters(tmp_path, stage, key(1), pts=[1, 2], keep=[True, True, True])
    assert stage.made == [10] and [row["letters"] for row in rows] == [100, 110, 120]
    rows = letters(tmp_path, stage, key(2), pts=[1, 2], keep=[False, True, False])
    assert stage.made == [] and [row["letters"] for row in rows] == [None, 110, None]
    rows = letters(tmp_path, stage, key(3), pts=[1, 2], keep=[True, True, False])
    assert stage.made == [] and [row["letters"] for row in rows] == [100, 110, None]


def test_what_all_clips_share_makes_all_of_them_again(tmp_path: Path) -> None:
    stage = LettersStage()
    letters(tmp_path, stage, "0" * 16, pts=[1, 2], keep=[True, True])
    letters(tmp_path, stage, "1" * 16, pts=[1, 3], keep=[True, True])
    assert stage.made == [0, 10]


def test_only_rows_that_failed_are_tried_again(tmp_path: Path) -> None:
    stage = LettersStage()
    stage.fails_at = 10
    letters(tmp_path, stage, "0" * 16, pts=[1], keep=[True, True, True])
    stage.fails_at = -1
    rows = letters(tmp_path, stage, "1" * 16, pts=[1], keep=[True, True, False])
    assert stage.made == [] and rows[1]["error"] == "busy"  # nobody said to try again
    rows = letters(tmp_path, stage, "2" * 16, pts=[1], keep=[True, True, True], retry=True)
    assert stage.made == [10] and [row["letters"] for row in rows] == [100, 110, 120]
