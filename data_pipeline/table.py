"""The clip table: what all stages found out, one row per clip, kept or not, and one per source that failed.

OUT/clips.parquet is made from the outputs of the stages alone, in order of source and time, so that its bytes do not
depend on who computed them in which order, nor on shards. ``.clips.json`` beside it holds the key of all that it was
made of, and its own digest; a second run leaves it as it is.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as papq

from data_pipeline.media.storage import (
    Clip,
    ClipDamaged,
    Place,
    is_there,
    is_whole,
    pack,
    remove_archives,
    remove_packed,
    unpack,
)
from data_pipeline.outputs import Done, digest_of, key_and_digest, outputs_of
from data_pipeline.pipeline import Pipeline
from data_pipeline.plan import Shard
from data_pipeline.report.amounts import plural
from data_pipeline.stage_list import GLOBAL
from opensora.config.schema import plain
from opensora.utils.console import announce
from opensora.utils.files.user_files import write_whole, written_whole

TABLE = "clips.parquet"
MADE_OF = ".clips.json"
_ABOUT = b"pipeline"
_VERSION = 1  # of the columns
_ROW_GROUP = 1 << 16
_PER_CLIP = "shots"  # the stage that says which clips there are
_LEFT_OUT = ("frames", "screen")  # a value per frame; what the filters said before all was known
_FIRST = (
    ("path", pa.string()),
    ("text", pa.string()),
    ("num_frames", pa.int32()),
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("aspect_ratio", pa.float64()),
    ("resolution", pa.int64()),
    ("fps", pa.float64()),
    ("keep", pa.bool_()),
    ("reason", pa.string()),
    ("rejected_by", pa.list_(pa.string())),
    ("source", pa.string()),
    ("start_s", pa.float64()),
    ("end_s", pa.float64()),
    ("clip_id", pa.string()),
    ("sha256", pa.string()),
    ("bytes", pa.int64()),
    ("offset", pa.int64()),
    ("length", pa.int64()),
    ("failed_in", pa.string()),
    ("config_hash", pa.string()),
    ("versions", pa.string()),
)
_OF_TRAINING = ("motion_score", "aesthetic", "camera_motion")  # behind fps, where a stage has them
_KINDS = 5  # of caption errors, that are said
_OTHER_NAMES = {("text", "text"): "text_read"}  # captions have the name


class ClipsGone(Exception):
    """Clips that are in no place any more: the outputs that told of them are put aside, and made again."""


def make_table(pipeline: Pipeline) -> Path:
    """``OUT/clips.parquet``, of outputs that are all there.

    Raises:
        InputMissing: one is not.
        ClipsGone: clips were removed or damaged meanwhile; run the stages again.
        UserError: it cannot be written.
    """
    path = pipeline.out / TABLE
    key = _key(pipeline)
    if not _is_current(path, key, check=pipeline.check):
        whole = _Assembly(pipeline).table()
        about = json.dumps(provenance(pipeline), sort_keys=True).encode()
        with written_whole(path) as aside:
            papq.write_table(
                whole.replace_schema_metadata({_ABOUT: about}), aside, compression="zstd", row_group_size=_ROW_GROUP
            )
        made_of = {"key": key, "digest": _digest(path)}
        write_whole(path.with_name(MADE_OF), lambda file: json.dump(made_of, file))
    if pipeline.cfg.cut.container == "tar":
        remove_packed(pipeline.out, [clip for _, clips in _made(pipeline) for clip in clips])
    # Last: whatever ends this before, all that a table names is there.
    places = papq.read_table(path, columns=["path"])["path"].drop_null().to_pylist()
    remove_archives(pipeline.out, path, {place.partition("#")[0] for place in places})
    return path


def summary(path: Path) -> str:
    """One line about a table."""
    table = papq.read_table(
        path, columns=["keep", "clip_id", "start_s", "end_s", "source", "failed_in", "caption_error"]
    )
    clips = table.filter(table["clip_id"].is_valid())
    kept = clips.filter(clips["keep"])
    failed = table.filter(table["failed_in"].is_valid())["source"].unique()
    line = f"{path}: {kept.num_rows} of {clips.num_rows} clips kept, {_minutes(kept)} of {_minutes(clips)} minutes"
    line += f"; {plural(len(failed), 'source')} failed" if len(failed) else ""
    without = caption_errors(clips["caption_error"].to_pylist())
    return f"{line}; {without}" if without else line


def caption_errors(found: Iterable[str | None]) -> str:
    """How many clips have which kind of ``caption_error``; what stands behind a second colon is one clip's own."""
    kinds = Counter(": ".join(each.split(": ")[:2]) for each in found if each)
    if not kinds:
        return ""
    said = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(_KINDS))
    others = f" and {len(kinds) - _KINDS} others" if len(kinds) > _KINDS else ""
    count = kinds.total()
    return f"{plural(count, 'clip')} {'has' if count == 1 else 'have'} a caption_error: {said}{others}"


def _minutes(clips: pa.Table) -> str:
    return f"{(pc.sum(pc.subtract(clips['end_s'], clips['start_s'])).as_py() or 0.0) / 60:.1f}"


def provenance(pipeline: Pipeline) -> dict[str, Any]:
    """What the rows were made by: of each stage its version and configuration."""
    return {name: {"version": stage.version, "config": plain(stage.config)} for name, stage in pipeline.stages.items()}


def _key(pipeline: Pipeline) -> str:
    """Of all that the table is made of."""
    digests: dict[str, list[str]] = {}
    for stage in pipeline.stages:
        shards = pipeline.plan.shards[:1] if stage in GLOBAL else pipeline.plan.shards
        paths = [pipeline.output(stage, shard) for shard in shards]
        digests[stage] = [key_and_digest(path)[1] if path is not None else "" for path in paths]
    cut = pipeline.cfg.cut
    listed = [[shard.name, [source.name for source in shard.sources]] for shard in pipeline.plan.shards]
    return digest_of([_VERSION, cut.container, cut.tar_mib, provenance(pipeline), digests, listed])


def _is_current(path: Path, key: str, *, check: bool) -> bool:
    """Whether the table is there, of this key and as it was written, and every clip in its place; ``check``: and as it
    was made."""
    try:
        made_of = json.loads(path.with_name(MADE_OF).read_bytes())
        if made_of != {"key": key, "digest": _digest(path)}:
            return False
        columns = papq.read_table(path, columns=["path", "bytes", "offset", "length", "sha256"])
    except (OSError, ValueError, pa.ArrowException):
        return False
    rows = zip(*(columns[name].to_pylist() for name in columns.column_names), strict=True)
    places = ((Place(name, offset, length), size, sha) for name, size, offset, length, sha in rows if name is not None)
    return all(_holds(path.parent, place, size, sha, check=check) for place, size, sha in places)


def _holds(out: Path, place: Place, size: int, sha256: str, *, check: bool) -> bool:
    return is_there(out, place, size) and (not check or is_whole(out, place, sha256))


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class _Assembly:
    """The table of one state of the outputs."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._errors = pipeline.errors()
        columns = pipeline.stages[_PER_CLIP].columns.names
        self._spine = pipeline.table(_PER_CLIP, columns)
        self._sources: list[str] = self._spine["source"].to_pylist()
        self._runs = _runs(self._sources)

    def table(self) -> pa.Table:
        """One row per clip, and one per source without any."""
        clips = self._clips()
        others = self._without_clips(clips.schema)
        whole = pa.concat_tables([clips, others]).combine_chunks()
        return whole.sort_by([("source", "ascending"), ("start_s", "ascending"), ("clip_id", "ascending")])

    def _clips(self) -> pa.Table:
        found = self._measured()
        cut = self._aligned("cut")
        captions = self._aligned("captions")
        places = self._places()
        kept = pc.fill_null(self._aligned("filter")["keep"], False)
        has_clip, has_text = cut["path"].is_valid(), pc.fill_null(pc.not_equal(captions["text"], ""), False)
        in_table = pc.and_(pc.and_(kept, has_clip), has_text)
        own = {name: cut[name] for name in ("num_frames", "height", "width", "fps", "sha256", "bytes")}
        of_source = {"num_frames": self._spine["num_frames"], "fps": self._spine["fps"], **self._shown_sizes()}
        columns = dict(found)
        for name, values in of_source.items():
            columns[name] = pc.if_else(has_clip, own[name].cast(dict(_FIRST)[name]), values.cast(dict(_FIRST)[name]))
        columns |= {"sha256": own["sha256"], "bytes": own["bytes"], "text": captions["text"]}
        columns |= {"keep": in_table, **self._reasons(has_clip, cut, captions)}
        paths = [places[path] if path is not None else Place("") for path in cut["path"].to_pylist()]
        columns["path"] = pa.array([place.path or None for place in paths], pa.string())
        columns["offset"] = pa.array([place.offset for place in paths], pa.int64())
        columns["length"] = pa.array([place.length for place in paths], pa.int64())
        return self._ordered(columns)

    def _measured(self) -> dict[str, pa.ChunkedArray]:
        """The columns of all stages by the names that they have in the table."""
        taken = {name for name, _ in _FIRST}
        found: dict[str, pa.ChunkedArray] = {
            name: self._spine[name] for name in ("source", "start_s", "end_s", "clip_id")
        }
        stages = self._pipeline.stages
        for stage in stages:
            if stage in _LEFT_OUT or stage == "probe" or all(_is_bulk(each.type) for each in stages[stage].columns):
                continue
            table = self._spine.drop_columns(["source"]) if stage == _PER_CLIP else self._aligned(stage)
            for name in table.column_names:
                new = column_name(stage, name, taken)
                if new is not None and new not in found:
                    found[new] = table[name]
                    taken.add(new)
        return found

    def _aligned(self, stage: str) -> pa.Table:
        """The rows of a stage beside those of the clips; null where it has none of a source."""
        fields = self._pipeline.stages[stage].columns
        table = self._pipeline.table(stage, [field.name for field in fields if not _is_bulk(field.type)])
        if table.num_rows == len(self._sources) and table["source"].equals(self._spine["source"]):
            return table.drop_columns(["source"])
        own = _runs(table["source"].to_pylist())
        rows = np.full(len(self._sources), -1, dtype=np.int64)
        for source, (first, count) in self._runs.items():
            if own.get(source, (0, 0))[1] == count:
                rows[first : first + count] = own[source][0] + np.arange(count)
        return table.drop_columns(["source"]).take(pa.array(rows, mask=rows < 0))

    def _shown_sizes(self) -> dict[str, pa.Array]:
        """Height and width of the source of every clip."""
        table = self._pipeline.table("probe", ("height", "width"))
        index = pc.index_in(self._spine["source"], table["source"].combine_chunks())
        return {name: table[name].take(index) for name in ("height", "width")}

    def _reasons(self, has_clip: pa.ChunkedArray, cut: pa.Table, captions: pa.Table) -> dict[str, pa.Array]:
        """Why a clip is not in the table for training: a filter, a later stage that failed, no caption."""
        filters = self._aligned("filter").select(["reason", "rejected_by"]).to_pylist()
        reasons, rejected, failed = list[str](), list[list[str]](), list[str | None]()
        texts, errors = captions["text"].to_pylist(), captions["caption_error"].to_pylist()
        is_cut, cut_errors = has_clip.to_pylist(), cut["cut_error"].to_pylist()
        for row, source in enumerate(self._sources):
            stage, done = self._errors.get(source, ("", None))
            rejected_by = filters[row]["rejected_by"] or []
            if not rejected_by and done is not None:
                verdict, by = error_reason(done), ["error"]
            elif not rejected_by and cut_errors[row]:
                verdict, by = f"cut: {cut_errors[row]}", ["cut"]
            elif not rejected_by and is_cut[row] and not texts[row]:
                verdict, by = f"no caption: {errors[row] or 'none found'}", ["captions"]
            else:
                verdict, by = filters[row]["reason"] or "", rejected_by
            reasons.append(verdict)
            rejected.append(by)
            failed.append(stage or None)
        columns = dict(_FIRST)
        return {
            "reason": pa.array(reasons, pa.string()),
            "rejected_by": pa.array(rejected, columns["rejected_by"]),
            "failed_in": pa.array(failed, pa.string()),
        }

    def _places(self) -> dict[str, Place]:
        """Path of a clip's own file -> where it lies."""
        pipeline, found = self._pipeline, dict[str, Place]()
        for shard, clips in _made(pipeline):
            try:
                places = self._placed(shard, clips)
            except ClipDamaged as error:
                raise _make_again(pipeline, shard, str(error)) from error
            found |= {clip.path: place for clip, place in zip(clips, places, strict=True)}
        return found

    def _placed(self, shard: Shard, clips: Sequence[Clip]) -> list[Place]:
        """Of each clip of a shard, where it lies as it was made, or is put now."""
        out, cut, check = self._pipeline.out, self._pipeline.cfg.cut, self._pipeline.check
        if cut.container == "tar":
            return pack(out, shard.name, clips, cut.tar_mib << 20, check=check)
        places = [Place(clip.path) for clip in clips]
        for clip, place in zip(clips, places, strict=True):
            if not _holds(out, place, clip.bytes, clip.sha256, check=check):
                unpack(out, clip)
        return places

    def _without_clips(self, schema: pa.Schema) -> pa.Table:
        """Sources that failed before there were clips of them, and those that no clip is in."""
        names = sorted({source.name for source in self._pipeline.plan.sources} - set(self._runs))
        table = self._pipeline.table("probe", ("height", "width", "num_frames", "fps"))
        probed = {row["source"]: row for row in table.to_pylist()}
        rows = []
        for name in names:
            stage, done = self._errors.get(name, ("", None))
            reason = error_reason(done) if done is not None else "no clip: no range of it is long enough"
            row = {"source": name, "keep": False, "reason": reason, "failed_in": stage or None}
            rows.append(row | probed.get(name, {}) | {"rejected_by": ["error" if done is not None else "shots"]})
        columns = {name: pa.array([row.get(name) for row in rows], schema.field(name).type) for name in schema.names}
        return self._ordered(columns, schema)

    def _ordered(self, columns: Mapping[str, Any], schema: pa.Schema | None = None) -> pa.Table:
        """All columns in the order of the table, with those that follow from others."""
        columns = dict(columns)
        count = len(columns["source"])
        height, width = (columns[name].cast(pa.int64()) for name in ("height", "width"))
        columns["aspect_ratio"] = pc.round(pc.divide(height.cast(pa.float64()), width.cast(pa.float64())), 6)
        columns["resolution"] = pc.multiply(height, width)
        about = provenance(self._pipeline)
        versions = ", ".join(f"{name} {stage['version']}" for name, stage in about.items())
        columns["config_hash"] = pa.array([digest_of(about)] * count, pa.string())
        columns["versions"] = pa.array([versions] * count, pa.string())
        first = [name for name, _ in _FIRST]
        at = first.index("fps") + 1
        names = [*first[:at], *(name for name in _OF_TRAINING if name in columns), *first[at:]]
        names += [name for name in columns if name not in names]
        types = dict(_FIRST)
        arrays = [
            columns[name].cast(types[name]) if schema is None and name in types else columns[name] for name in names
        ]
        return pa.table(arrays, names=names) if schema is None else pa.table(arrays, schema=schema)


def _is_bulk(kind: pa.DataType) -> bool:
    """Whether a column holds a list of numbers for each clip, which later stages read and nobody filters by."""
    return pa.types.is_list(kind) and not pa.types.is_string(kind.value_type)


def column_name(stage: str, name: str, taken: Iterable[str]) -> str | None:
    """What a column of a stage is called in the table; None: it is there in another column."""
    if stage in ("cut", "filter") or (stage == "captions" and name == "text"):
        return None if name in dict(_FIRST) else name
    if stage == _PER_CLIP and name in ("start_s", "end_s", "clip_id"):
        return None
    return _OTHER_NAMES.get((stage, name)) or (f"{stage}_{name}" if name in taken else name)


def error_reason(done: Done) -> str:
    """As a row says it."""
    return f"error: {done.kind}: {done.error}"


def _runs(sources: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Source -> (its first row, how many)."""
    found, first = dict[str, tuple[int, int]](), 0
    for source, rows in groupby(sources):
        count = len(list(rows))
        found[source] = (first, count)
        first += count
    return found


def _made(pipeline: Pipeline) -> list[tuple[Shard, list[Clip]]]:
    """The clips that the stage has cut, each once in a shard, in order of source and time."""
    found = []
    for shard in pipeline.plan.shards:
        output = pipeline.read("cut", shard)
        pairs = sorted(output.by_source(), key=lambda pair: pair[0].source)
        rows = [row for _, table in pairs for row in table.select(["path", "bytes", "sha256"]).to_pylist()]
        clips = {row["path"]: Clip(**row) for row in rows if row["path"] is not None}
        found.append((shard, list(clips.values())))
    return found


def _make_again(pipeline: Pipeline, shard: Shard, path: str) -> ClipsGone:
    """Puts aside what says that the clips of this shard are there. Those that are whole are not encoded again."""
    announce(f"{path} is gone or damaged: the clips of shard {shard.name} are looked through, and cut again if need be")
    for output in outputs_of(pipeline.out / "cut", shard.name):
        output.replace(output.with_suffix(".gone"))
    pipeline.forget()
    return ClipsGone(path)
