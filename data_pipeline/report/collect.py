"""From the outputs of a run to what its report shows."""

import contextlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from data_pipeline.pipeline import Pipeline
from data_pipeline.report.data import Album, Failure, ReportData, Shot, Work
from data_pipeline.rows import to_rows
from data_pipeline.stages.filter import FILTER, SCREEN, FilterRule, FilterStage

# Stages of clips whose columns the report shows under their own names; of equal ones the later one's.
_OF_CLIPS = ("shots", "measure", SCREEN, "duplicates", "text", "scores", FILTER)
_OF_SOURCES: Mapping[str, tuple[str, ...]] = {"probe": ("height", "width")}


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
    """A row per clip, with the columns of all stages; null where a stage has nothing to say of a clip."""
    clips = pipeline.table("shots", pipeline.stages["shots"].columns.names)
    columns = {name: clips[name] for name in clips.column_names}
    for stage, names in _OF_SOURCES.items():
        columns |= _joined(clips, pipeline.table(stage, names), of_sources=True)
    for stage in _OF_CLIPS[1:]:
        if stage in pipeline.stages:
            columns |= _joined(clips, pipeline.table(stage, pipeline.stages[stage].columns.names))
    for rule in filters_of(pipeline).values():  # of a column that was asked for with its stage
        stage, _, name = rule.column.rpartition(".")
        if stage:
            table = pipeline.table(stage, [name])
            columns[rule.column] = _joined(clips, table, of_sources=stage in ("probe", "frames"))[name]
    return pa.table(columns)


def _joined(clips: pa.Table, table: pa.Table, *, of_sources: bool = False) -> dict[str, pa.ChunkedArray]:
    """The columns of a stage, a row per clip. ``of_sources``: it has one row per source, which all its clips share."""
    start: dict[str, int] = {}
    for row, name in enumerate(table["source"].to_pylist()):
        start.setdefault(name, row)
    rows = [
        start[source] + (0 if of_sources else number) if source in start else None
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
