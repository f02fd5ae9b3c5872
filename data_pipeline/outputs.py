"""The outputs of stages: one parquet file per stage and shard, complete or absent, named by all that it depends on.

    OUT/<stage>/<shard>.<key>.<digest>.parquet

``key`` is a hash of the stage's configuration and version and of the digests of what it reads; an output with the key
that is wanted is not made again. ``digest`` is that of the file's own bytes: one that does not have it any more is
damaged, and counts as absent. Outputs of other keys stay, so that a setting that is changed back costs nothing.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as papq

from data_pipeline.rows import Row, feed
from opensora.utils.console import announce
from opensora.utils.files.user_files import written_whole

_NAME = re.compile(r"(?P<shard>[a-z0-9]+)\.(?P<key>[0-9a-f]{16})\.(?P<digest>[0-9a-f]{16})\.parquet")
_UNITS = b"units"
OF_SOURCES = ("probe", "frames", "beside")  # inputs with one row per source, which all of its clips share
# What is written aside: outputs and archives, clips, and files of the folder itself.
_LEFTOVERS = ("*/.*.tmp*", "media/*/.*.tmp*", ".*.tmp*", ".plan.json.*", ".config.yaml.*", "..clips.json.*")


@dataclass(frozen=True)
class Done:
    """What became of one source in one stage."""

    source: str
    key: str  # of the unit: see ``unit_key``
    rows: int
    error: str = ""  # why there are none
    kind: str = ""  # of the error: its type, or poison
    row_keys: tuple[str, ...] = ()  # of a stage ``PerClip``: see ``row_keys_of``

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> "Done":
        """From what was written."""
        return cls(**{**about, "row_keys": tuple(about.get("row_keys", ()))})


@dataclass(frozen=True)
class Output:
    """One file, read."""

    table: pa.Table  # without ``source``, the rows of one source together
    done: tuple[Done, ...]  # in order of the rows

    def by_source(self) -> Iterator[tuple[Done, pa.Table]]:
        """Every source with its rows: none where there is an error."""
        first = 0
        for done in self.done:
            yield done, self.table.slice(first, done.rows)
            first += done.rows


def digest_of(value: Any) -> str:
    """16 hex digits of plain data: what JSON can say."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def row_keys_of(stage_key: str, rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """The key of each row of a stage that makes one per clip: of the inputs of this clip, and of the whole source."""
    of_source = unit_key(stage_key, {name: found for name, found in rows.items() if name in OF_SOURCES})
    of_clips = {name: found for name, found in rows.items() if name not in OF_SOURCES}
    clips = zip(*of_clips.values(), strict=True)
    return [unit_key(of_source, {name: [row] for name, row in zip(of_clips, clip, strict=True)}) for clip in clips]


def unit_key(stage_key: str, rows: Mapping[str, Sequence[Row]]) -> str:
    """The key of what a stage makes of one source: equal for equal content, whatever the file is called.

    Args:
        stage_key: of the stage's name, version and configuration.
        rows: what it reads, the declared columns only.
    """
    digest = hashlib.blake2b(stage_key.encode(), digest_size=16)
    feed(digest, dict(rows))
    return digest.hexdigest()


def list_outputs(folder: Path) -> dict[tuple[str, str], Path]:
    """(shard, key) -> the file of a stage that has it; of several, which a crash can leave, the newest."""
    found: dict[tuple[str, str], list[Path]] = {}
    for name in os.listdir(folder) if folder.is_dir() else []:
        if match := _NAME.fullmatch(name):
            found.setdefault((match["shard"], match["key"]), []).append(folder / name)
    return {key: paths[0] if len(paths) == 1 else _newest_first(paths)[0] for key, paths in found.items()}


def outputs_of(folder: Path, shard: str) -> list[Path]:
    """All files of a stage and shard, the newest first."""
    names = os.listdir(folder) if folder.is_dir() else []
    return _newest_first(
        folder / name for name in names if (match := _NAME.fullmatch(name)) and match["shard"] == shard
    )


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    """Another process may remove one meanwhile."""

    def age(path: Path) -> tuple[int, str]:
        try:
            return path.stat().st_mtime_ns, path.name
        except FileNotFoundError:
            return 0, path.name

    return sorted(paths, key=age, reverse=True)


def clear_leftovers(folder: Path, older_than_s: float = 86400.0) -> None:
    """Remove what processes that were killed had written aside; what is younger may be somebody's work."""
    for path in chain.from_iterable(folder.glob(pattern) for pattern in _LEFTOVERS):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > older_than_s:
                path.unlink()


def key_and_digest(path: Path) -> tuple[str, str]:
    """What the name of an output says of it."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return match["key"], match["digest"]


def read_output(path: Path, columns: Sequence[str] = ()) -> Output | None:
    """None: the file is not as it was written; it is renamed, so that it is made again, and a line says so.

    Args:
        columns: those that are needed: others may be as large as pictures are. None named: all of them.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    match = _NAME.fullmatch(path.name)
    if match is None or hashlib.blake2b(content, digest_size=8).hexdigest() != match["digest"]:
        announce(f"{path} is damaged: it is put aside and made again", every_rank=True)
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            path.replace(path.with_suffix(".damaged"))
        return None
    table = papq.read_table(pa.BufferReader(content), columns=["source", *columns] if columns else None)
    done = _units(table.schema)
    return Output(table.replace_schema_metadata(None).drop_columns(["source"]), done)


def read_done(path: Path) -> tuple[Done, ...]:
    """What became of each source, without reading what was found; none where the file is damaged or gone."""
    try:
        return _units(papq.read_schema(path))
    except (OSError, pa.ArrowException, LookupError, TypeError, ValueError):
        return ()


def _units(schema: pa.Schema) -> tuple[Done, ...]:
    return tuple(Done.of(unit) for unit in json.loads(schema.metadata[_UNITS]))


def write_output(
    folder: Path, shard: str, key: str, columns: pa.Schema, results: Iterable[tuple[Done, pa.Table]]
) -> Path:
    """The rows of all sources of a shard, in the order given, as one file.

    Raises:
        UserError: it cannot be written.
    """
    done, tables = list[Done](), [columns.empty_table()]
    for unit, table in results:
        done.append(unit)
        tables.append(table)
    names = [unit.source for unit in done for _ in range(unit.rows)]
    table = pa.concat_tables(tables).add_column(0, pa.field("source", pa.string()), pa.array(names, pa.string()))
    units = json.dumps([asdict(unit) for unit in done], separators=(",", ":")).encode()
    sink = pa.BufferOutputStream()
    papq.write_table(table.replace_schema_metadata({_UNITS: units}), sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    path = folder / f"{shard}.{key}.{hashlib.blake2b(content, digest_size=8).hexdigest()}.parquet"
    with written_whole(path) as aside:
        aside.write_bytes(content)
    for other in outputs_of(folder, shard):  # of the same key: what failed then was tried again
        if other != path and key_and_digest(other)[0] == key:
            other.unlink(missing_ok=True)
    return path
