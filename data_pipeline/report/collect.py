"""From the outputs of a run to what its report shows."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq

from data_pipeline.outputs import digest_of
from data_pipeline.pipeline import Pipeline
from data_pipeline.report.data import FINAL, Album, Failure, ReportData, Shot, Work
from data_pipeline.report.write import HTML, is_written, write_report
from data_pipeline.rows import to_rows
from data_pipeline.stages.filter import FILTER, SCREEN, FilterRule, FilterStage
from data_pipeline.table import MADE_OF, TABLE
from opensora.config.schema import plain

_VERSION = 2  # of what is on the page
_OF_SOURCES = ("probe", "frames")  # stages with one row per source
_SHOWN = ("probe", "shots", "measure", "duplicates", "text", "scores")  # of equal columns the last one's are meant
_FINAL = ("num_frames", "height", "width", "fps")  # of a clip's own file, where it has one


def make_report(pipeline: Pipeline) -> Path:
    """``OUT/report.html`` and ``OUT/report.md``, of outputs and of a table of clips that are all there; what is of the
    same table is left as it is.

    Raises:
        InputMissing: an output is not.
        UserError: one cannot be written, or ``report.training`` cannot be used.
    """
    path, config = pipeline.out / HTML, pipeline.cfg.report
    rules = [[name, plain(rule)] for name, rule in filters_of(pipeline).items()]
    table = json.loads((pipeline.out / MADE_OF).read_bytes())
    key = digest_of([_VERSION, rules, plain(config), table])
    # A training configuration includes others: whether it is as it was is not asked.
    if config.training or not is_written(pipeline.out, key):
        write_report(collect(pipeline), config, pipeline.out, key)
    return path


def collect(pipeline: Pipeline) -> ReportData:
    """All that is known of a run.

    Raises:
        InputMissing: an output is not there.
    """
    return ReportData(
        clips=clip_table(pipeline),
        filters=filters_of(pipeline),
        sources=len(pipeline.plan.sources),
        seconds=_seconds(pipeline),
        failures=tuple(
            Failure(source=source, stage=stage, kind=done.kind, message=done.error)
            for source, (stage, done) in sorted(pipeline.errors().items())
        ),
        work=read_work(pipeline),
        album=album_of(pipeline),
    )


def filters_of(pipeline: Pipeline) -> dict[str, FilterRule]:
    """In the order in which they were asked."""
    stages = [pipeline.stages[name] for name in (SCREEN, FILTER) if name in pipeline.stages]
    return {name: rule for stage in stages if isinstance(stage, FilterStage) for name, rule in stage.rules.items()}


def clip_table(pipeline: Pipeline) -> pa.Table:
    """A row per clip: what was measured, as filters saw it, and what the table of clips says became of it."""
    clips = pipeline.table("shots", pipeline.stages["shots"].columns.names)
    columns = {"source": clips["source"]}
    for stage in _SHOWN:
        if stage in pipeline.stages:
            columns |= _joined(clips, pipeline, stage, pipeline.stages[stage].columns.names)
    for rule in filters_of(pipeline).values():  # of a column that was asked for with its stage
        stage, _, name = rule.column.rpartition(".")
        if stage:
            columns[rule.column] = _joined(clips, pipeline, stage, [name])[name]
    return pa.table(columns | _became(clips, pipeline.out / TABLE))


def _became(clips: pa.Table, path: Path) -> dict[str, pa.ChunkedArray]:
    """Of every clip, by the table of clips: whether it is kept, why not, and the size of its own file."""
    table = papq.read_table(path, columns=["source", "clip_id", "keep", "reason", "rejected_by", *_FINAL])
    row_of = {key: row for row, key in enumerate(_keys(table))}
    taken = table.take(pa.array([row_of[key] for key in _keys(clips)], pa.int64()))
    names = {name: f"{FINAL}.{name}" for name in _FINAL} | {name: name for name in ("keep", "reason", "rejected_by")}
    return {new: taken[name] for name, new in names.items()}


def _keys(table: pa.Table) -> list[tuple[str, str]]:
    """The same clip may be in two files of equal content."""
    return list(zip(table["source"].to_pylist(), table["clip_id"].to_pylist(), strict=True))


def _joined(clips: pa.Table, pipeline: Pipeline, stage: str, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    """Columns of a stage, a row per clip; null where it has nothing to say of a clip."""
    table, start = pipeline.table(stage, names), dict[str, int]()
    for row, source in enumerate(table["source"].to_pylist()):
        start.setdefault(source, row)
    rows = [
        None if source not in start else start[source] + (0 if stage in _OF_SOURCES else number)
        for source, number in zip(clips["source"].to_pylist(), clips["clip"].to_pylist(), strict=True)
    ]
    taken = table.drop_columns(["source"]).take(pa.array(rows, pa.int64()))
    return {name: taken[name] for name in taken.column_names}


def _seconds(pipeline: Pipeline) -> float:
    """Of all videos that could be read."""
    table = pipeline.table("probe", ["num_frames", "fps"])
    frames, fps = (np.array(table[name].to_pylist(), dtype=np.float64) for name in ("num_frames", "fps"))
    return float((frames[fps > 0] / fps[fps > 0]).sum())


def read_work(pipeline: Pipeline) -> tuple[Work, ...]:
    """What the stages took, by the logs; a line that a crash cut off is passed over."""
    sources: dict[str, set[str]] = {name: set() for name in pipeline.stages}
    seconds = dict.fromkeys(pipeline.stages, 0.0)
    for path in sorted((pipeline.out / "log").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                seconds[entry["stage"]] += float(entry["seconds"])
                sources[entry["stage"]].add(str(entry["source"]))
    found = [Work(stage=name, sources=len(sources[name]), seconds=seconds[name]) for name in pipeline.stages]
    return tuple(each for each in found if each.sources)


def album_of(pipeline: Pipeline) -> Album:
    """Pictures of the one decode. Each shard is read once, and only what is asked for is kept of it."""

    def pictures(shots: Sequence[Shot]) -> list[bytes | None]:
        found: list[bytes | None] = [None] * len(shots)
        wanted: dict[str, list[int]] = {}
        for number, shot in enumerate(shots):
            wanted.setdefault(shot.source, []).append(number)
        for shard in pipeline.plan.shards:
            if wanted.keys().isdisjoint(entry.name for entry in shard.sources):
                continue
            for done, table in pipeline.read("frames", shard).by_source():
                numbers = wanted.get(done.source, ()) if not done.error else ()
                rows = to_rows(table.select(["picture_frame", "picture_jpeg"])) if numbers else []
                for number in numbers:
                    found[number] = middle_picture(rows[0]["picture_frame"], rows[0]["picture_jpeg"], shots[number])
        return found

    return pictures


def middle_picture(frames: np.ndarray, jpegs: Sequence[bytes], shot: Shot) -> bytes | None:
    """The one closest to the middle of a shot; None: there is none in it."""
    inside = np.flatnonzero((frames >= shot.first) & (frames < shot.last))
    if not len(inside):
        return None
    closest = inside[np.argmin(np.abs(frames[inside] - (shot.first + shot.last - 1) / 2))]
    return jpegs[int(closest)]
