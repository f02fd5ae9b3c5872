"""A clip table of any size, built once into files that every process of a node maps: 20 bytes a row of numbers, and
paths and captions in Arrow.

An index is a folder named after its table files, with their sizes and times of change:

    index.json         format, sources, rows, content hash; with checksums.bin the checksums of all others (``sealed``)
    num_frames.bin     and the other columns of ``manifest.COLUMNS``: one plain array each
    text-00000.arrow   paths, captions and words about the camera, uncompressed, in batches of BATCH_ROWS; one file per
                       part of the build

A changed table has another name and is built anew; nothing is deleted, as other runs may be reading it. A damaged index
is built anew, with a line that says so: ``open_table`` verifies all of it up to VERIFIED_BYTES (some million rows); of
a larger one every process verifies what it uses, before it uses it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq

from opensora.datasets.table.build_once import build_once
from opensora.datasets.table.checksums import ABOUT, Damaged, Sealed, seal, verified
from opensora.datasets.table.manifest import COLUMNS, ClipTable, folders_of
from opensora.datasets.table.table_files import no_rows, read_batches, table_files
from opensora.utils.console import announce

FOLDER = ".clip_index"  # beside the table, unless data.index says where
VERIFIED_BYTES = 1 << 28  # verified whole when a table is opened: 0.1 s
BATCH_ROWS = 1 << 12  # rows of texts that are verified together: half a megabyte
_FORMAT = 3
_STEM = 40  # characters of a table's name that its index has in its own
_PART_BYTES = 1 << 26  # least source bytes that are worth a thread's turn
_MOST_PARTS = 256  # so that a process can keep all of them open
_MOST_THREADS = 16
_TEXT_SCHEMA = pa.schema([("path", pa.string()), ("text", pa.string()), ("camera_motion", pa.string())])


@dataclass(frozen=True, kw_only=True)
class IndexedTable(ClipTable):
    """A ``ClipTable`` on the files of an index. Pickles as the folder's name: workers map the same files."""

    index: Path
    content: str  # 32 hex digits of all values, in order; equal wherever and however the index was built
    root: str

    sealed: Sealed

    def __reduce__(self) -> tuple:
        return open_index, (self.index, self.root)

    def check(self, first: int, last: int) -> None:
        for name, kind in COLUMNS.items():
            self.sealed.check(f"{name}.bin", first * kind.itemsize, last * kind.itemsize)


def open_table(table: str | Sequence[str], root: str = "", index: str = "") -> IndexedTable:
    """The table behind ``data.table``, indexed now if it was not yet. Any number of processes may call this at once.

    Raises:
        UserError: as ``read_table``; or the index folder cannot be written.
    """
    files = [file.absolute() for file in table_files(table)]
    return open_index(index_of(files, Path(index) if index else files[0].parent / FOLDER), root)


def index_of(files: Sequence[Path], folder: Path, threads: int | None = None) -> Path:
    """The index of these table files inside ``folder``, built if it is not there, or is damaged."""
    stats = [file.stat() for file in files]
    sources = [_Source(str(file), at.st_size, at.st_mtime_ns) for file, at in zip(files, stats, strict=True)]
    name = hashlib.blake2b(json.dumps([_FORMAT, *map(asdict, sources)]).encode(), digest_size=8).hexdigest()

    def build(aside: Path) -> None:
        _build(aside, sources, threads)
        open_index.cache_clear()  # what stood there before, if anything did, was damaged

    return build_once(folder / f"{files[0].stem[:_STEM]}-{name}", build, _verify)


@lru_cache(maxsize=8)
def open_index(index: Path, root: str = "") -> IndexedTable:
    """Map an index. ``root``: what relative clip paths start at; empty: the folder of the table they stand in.

    Raises:
        Damaged: by its own word or its sizes; values are verified when they are used.
    """
    sealed = Sealed(index)
    about = sealed.about
    files = [Path(source["path"]) for source in about["sources"]]
    rows = [source["rows"] for source in about["sources"]]
    return IndexedTable(
        **{name: sealed.map(f"{name}.bin").view(kind) for name, kind in COLUMNS.items()},
        texts=_MappedTexts(sealed, np.cumsum([0, *about["text_rows"]])),
        folders=folders_of(files, root),
        first_rows=np.cumsum([0, *rows[:-1]]),
        index=index,
        content=about["content"],
        root=root,
        sealed=sealed,
    )


def _verify(index: Path) -> None:
    """Raises: Damaged: it must be built anew."""
    sealed = verified(index, VERIFIED_BYTES)
    if sealed.about.get("format") != _FORMAT:
        raise Damaged(index / ABOUT, f"format {sealed.about.get('format')!r}, this is {_FORMAT}")


class _MappedTexts:
    """Paths and captions where they lie on disk; a process holds the pages it has touched."""

    def __init__(self, sealed: Sealed, first_rows: np.ndarray) -> None:
        self._sealed = sealed
        self._first_rows = first_rows  # (parts + 1,)
        self._readers: dict[int, pa.ipc.RecordBatchFileReader] = {}

    def path(self, row: int) -> str:
        return self._value(row, 0)

    def caption(self, row: int) -> str:
        return self._value(row, 1)

    def camera_motion(self, row: int) -> str:
        return self._value(row, 2)

    def _value(self, row: int, column: int) -> str:
        if not 0 <= row < self._first_rows[-1]:
            raise IndexError(f"row {row} of {self._first_rows[-1]}")
        part = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        name = _text_file(part)
        if part not in self._readers:
            self._sealed.check_segment(name, -1)  # where the batches are
            self._readers[part] = pa.ipc.open_file(pa.py_buffer(self._sealed.map(name)))
        batch, position = divmod(row - int(self._first_rows[part]), BATCH_ROWS)
        self._sealed.check_segment(name, batch)
        return str(self._readers[part].get_batch(batch).column(column)[position].as_py())


@dataclass(frozen=True)
class _Source:
    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class _Unit:
    """What is read and hashed in one go, so that the hash does not know of parts: a csv file, or a row group."""

    source: int
    bytes: int
    row_group: int | None = None
    first_row: int = 0  # in its file


@dataclass
class _Built:
    """What a part adds to ``index.json``."""

    rows: list[int] = field(default_factory=list)  # of each unit
    digests: list[bytes] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # of the batches in its text file, and of the file


def _text_file(part: int) -> str:
    return f"text-{part:05}.arrow"


def _build(index: Path, sources: Sequence[_Source], threads: int | None) -> None:
    """Parts are built in threads (parsing, hashing and writing run outside the interpreter's lock), each into files of
    its own, and the columns joined at the end."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(threads or min(_MOST_THREADS, cores)) as pool:
        parts = _parts([unit for units in pool.map(_units, range(len(sources)), sources) for unit in units])
        if len(parts) > 1:  # else it is a matter of a moment
            announce(f"indexing {len(sources)} table files in {len(parts)} parts, once: {index.parent}")
        built = list(pool.map(lambda job: _build_part(index, sources, *job), enumerate(parts)))
    rows = [0] * len(sources)
    for part, result in zip(parts, built, strict=True):
        for unit, count in zip(part, result.rows, strict=True):
            rows[unit.source] += count
    if sum(rows) == 0:
        raise no_rows([Path(source.path) for source in sources])
    for name in COLUMNS:
        _join([_column_file(index, name, part) for part in range(len(parts))], index / f"{name}.bin")
    content = hashlib.blake2b(b"".join(digest for result in built for digest in result.digests), digest_size=16)
    about = {
        "format": _FORMAT,
        "sources": [asdict(source) | {"rows": count} for source, count in zip(sources, rows, strict=True)],
        "text_rows": [sum(result.rows) for result in built],
        "content": content.hexdigest(),
    }
    ends = {_text_file(part): result.ends for part, result in enumerate(built)}
    seal(index, about, [*(f"{name}.bin" for name in COLUMNS), *ends], ends)


def _units(number: int, source: _Source) -> list[_Unit]:
    whole = _Unit(number, source.size)
    if not source.path.endswith(".parquet"):
        return [whole]
    try:
        about = papq.read_metadata(source.path)
    except (pa.ArrowException, OSError):
        return [whole]  # whoever reads it finds the words
    units, first_row = [], 0
    for group in range(about.num_row_groups):
        units.append(_Unit(number, source.size // about.num_row_groups, group, first_row))
        first_row += about.row_group(group).num_rows
    return units or [whole]


def _parts(units: Sequence[_Unit]) -> list[list[_Unit]]:
    """Units in order, joined to parts of similar size."""
    least = max(_PART_BYTES, sum(unit.bytes for unit in units) // _MOST_PARTS)
    parts: list[list[_Unit]] = []
    held = least
    for unit in units:
        if held >= least:
            parts.append([])
            held = 0
        parts[-1].append(unit)
        held += unit.bytes
    return parts


def _build_part(index: Path, sources: Sequence[_Source], number: int, part: Sequence[_Unit]) -> _Built:
    built = _Built()
    texts = _TextWriter(index / _text_file(number))
    columns = {name: _column_file(index, name, number).open("wb") for name in COLUMNS}
    try:
        for unit in part:
            rows = 0
            hashes = _Hashes()
            for batch in read_batches(Path(sources[unit.source].path), unit.row_group, unit.first_row):
                for name, kind in COLUMNS.items():
                    values = batch[name].to_numpy().astype(kind)
                    hashes.add(name, values)
                    columns[name].write(values)
                for name in _TEXT_SCHEMA.names:
                    if name in batch.column_names:  # a table without a column is what it was before it could have one
                        hashes.add_text(name, batch[name])
                texts.write(_with_camera(batch).select(_TEXT_SCHEMA.names))
                rows += batch.num_rows
            built.rows.append(rows)
            built.digests.append(hashes.digest())
    finally:
        texts.close()
        for file in columns.values():
            file.close()
    built.ends = texts.ends
    return built


def _with_camera(batch: pa.Table) -> pa.Table:
    if "camera_motion" in batch.column_names:
        return batch
    return batch.append_column("camera_motion", pa.repeat(pa.scalar("", pa.large_string()), batch.num_rows))


class _TextWriter:
    """An Arrow file of batches of BATCH_ROWS rows, all but the last, so that a row is found by division."""

    def __init__(self, path: Path) -> None:
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, _TEXT_SCHEMA)
        self.ends: list[int] = []  # of every batch, and of the file
        self._held: list[pa.Table] = []
        self._rows = 0

    def write(self, table: pa.Table) -> None:
        self._held.append(table)
        self._rows += table.num_rows
        if self._rows >= BATCH_ROWS:
            whole = pa.concat_tables(self._held)
            full = self._rows // BATCH_ROWS * BATCH_ROWS
            for start in range(0, full, BATCH_ROWS):
                self._write(whole.slice(start, BATCH_ROWS))
            self._held, self._rows = [whole.slice(full)], self._rows - full

    def close(self) -> None:
        if self._rows:
            self._write(pa.concat_tables(self._held))
        self._writer.close()
        self.ends.append(self._file.tell())
        self._file.close()

    def _write(self, table: pa.Table) -> None:
        self._writer.write(table.cast(_TEXT_SCHEMA).combine_chunks().to_batches()[0])
        self.ends.append(self._file.tell())


class _Hashes:
    """The values of a unit, column by column: the same however they were cut into batches."""

    def __init__(self) -> None:
        self._columns: dict[str, hashlib.blake2b] = {}

    def add(self, name: str, values: np.ndarray) -> None:
        self._columns.setdefault(name, hashlib.blake2b(digest_size=16)).update(np.ascontiguousarray(values).data)

    def add_text(self, name: str, column: pa.ChunkedArray) -> None:
        for chunk in column.chunks:
            _, offsets, data = chunk.buffers()
            ends = np.frombuffer(offsets, dtype=np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            self.add(f"{name} lengths", np.diff(ends))
            self.add(f"{name} bytes", np.frombuffer(data, dtype=np.uint8)[ends[0] : ends[-1]])

    def digest(self) -> bytes:
        return b"".join(self._columns[name].digest() for name in sorted(self._columns))


def _column_file(index: Path, name: str, part: int) -> Path:
    return index / f"{name}-{part:05}.part"


def _join(parts: Sequence[Path], target: Path) -> None:
    with target.open("wb") as whole:
        for path in parts:
            with path.open("rb") as file:
                shutil.copyfileobj(file, whole, 1 << 22)
            path.unlink()
