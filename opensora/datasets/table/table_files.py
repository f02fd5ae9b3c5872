"""The files of a clip table: which they are, and their rows, checked, a part at a time."""

import codecs
import contextlib
import difflib
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as papq

from opensora.datasets.decode.common import MAX_FPS, MAX_PIXELS, MAX_SIDE
from opensora.utils.errors import UserError
from opensora.utils.files.user_files import absence, check_quotes

_TEXT = ("path", "text")
_COUNTS = ("num_frames", "height", "width")
_REQUIRED = (*_TEXT, *_COUNTS, "fps")
_OPTIONAL = ("motion_score", "camera_motion", "keep")
_TRUE, _FALSE = ("true", "1"), ("false", "0")  # of ``keep`` in a csv, in any case
_MISSING = ("", "nan", "NaN")  # how pandas and others write "no value" in a csv
_ALIASES = {
    "path": ("video", "video_path", "file", "filename", "file_path"),
    "text": ("caption", "prompt", "captions"),
    "num_frames": ("frames", "length", "n_frames"),
    "fps": ("frame_rate", "framerate"),
    "height": ("h",),
    "width": ("w",),
}
_BLOCK_BYTES = 1 << 24  # a csv row, caption included, must fit in one block
_HEAD_BYTES = 4096  # of a csv: UTF-16 shows there
_OTHER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # those of UTF-32 have a NUL
_MOST_TEXT = 2**20  # bytes of a path or caption
_NO_TABLE = ".left_out.csv"  # beside a table: what data_pipeline.index put into it no row of; a glob passes it over
BATCH_ROWS = 1 << 16  # rows that are in memory at a time while a table is read


def no_rows(files: Sequence[Path]) -> UserError:
    """The error for tables without a row that is kept."""
    return UserError(
        f"{', '.join(map(str, files))}: the table has no rows, put at least one clip in it (with keep=true where it "
        "has a column keep)"
    )


def table_files(path: str | Sequence[str]) -> list[Path]:
    """The files behind ``data.table``, in the order of their rows.

    Raises:
        UserError: none, or one that does not exist.
    """
    return _files([path] if isinstance(path, str) else path)


def _files(patterns: Sequence[str]) -> list[Path]:
    if not any(patterns):
        raise UserError("data.table is empty: give a csv or parquet file, a glob, or a list of these")
    found: list[Path] = []
    for pattern in patterns:
        if os.path.isfile(pattern):
            found.append(Path(pattern))
            continue
        names = [name for name in glob.glob(pattern, recursive=True) if not name.endswith(_NO_TABLE)]
        matches = sorted(Path(name) for name in names if os.path.isfile(name))
        if not matches:
            raise UserError(f"data.table={pattern}: {_why_no_table(Path(pattern))}")
        found += matches
    return found


def _why_no_table(path: Path) -> str:
    if os.path.isdir(path):
        return f"is a folder; give a csv or parquet file in it, or make one by python -m data_pipeline.index {path}"
    if os.path.exists(path):
        return "is a pipe or device; give a csv or parquet file"
    reason = absence(path, "file")
    return reason if reason and not reason.startswith("no such") else f"no such file{_tables_nearby(path)}"


def _tables_nearby(path: Path) -> str:
    folder = path.parent
    if not os.path.isdir(folder):
        return f", and no folder {folder}"
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".csv", ".parquet"))
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f", did you mean {folder / near[0]}?"
    return f"; tables in {folder}: {', '.join(names[:8]) or 'none'}"


def read_batches(file: Path, row_group: int | None = None, first_row: int = 0) -> Iterator[pa.Table]:
    """The known columns of a file in order, checked, a part at a time: large_string texts and float64 numbers.

    Rows with ``keep=false`` are passed over, whatever is in them. ``camera_motion`` is there where the file has it,
    with empty text for no value.

    Args:
        row_group: of a parquet file, only this one; ``first_row``: the row of the file it starts at, for errors.

    Raises:
        UserError: as ``manifest.read_table``.
    """
    try:
        for raw in _csv_batches(file) if file.suffix == ".csv" else _parquet_batches(file, row_group):
            kept, numbers = _kept(file, raw, first_row)
            if kept.num_rows:
                yield _checked(file, kept, numbers)
            first_row += raw.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        if file.suffix == ".csv":
            _check_utf8(file)
        reason = " ".join(str(error).split())[:200]
        remedy = ", save it again as UTF-8" if "utf" in reason.lower() else ""
        if "columns" in reason:
            remedy = ", put text that holds a comma or a quote in quotes, and close them"
        raise UserError(f"{file}: cannot be read as {file.suffix[1:]} ({reason}){remedy}") from error


def _check_utf8(file: Path) -> None:
    """Raises: UserError: the first line that is not UTF-8 text, whatever the reader of csv made of it."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with contextlib.suppress(OSError), file.open("rb") as opened:
        while True:
            block = opened.read(1 << 20)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise _not_utf8(file, line, f"byte 0x{error.object[error.start]:02x}") from error
            if "\0" in text:
                raise _not_utf8(file, line + text.count("\n", 0, text.index("\0")), "a NUL character")
            line += text.count("\n")
            if not block:
                return


def _not_utf8(file: Path, line: int, found: str) -> UserError:
    return UserError(f"{file} line {line}: cannot be read as csv ({found} is not UTF-8 text), save it again as UTF-8")


def _kept(file: Path, raw: pa.Table, first_row: int) -> tuple[pa.Table, np.ndarray]:
    """(the rows to train with, (n,) their numbers in the file, 1 the first)."""
    numbers = np.arange(first_row + 1, first_row + raw.num_rows + 1)
    if "keep" not in raw.column_names:
        return raw, numbers
    keep = _truth_column(file, raw, numbers, "keep")
    return raw.filter(pa.array(keep)), numbers[keep]


def _checked(file: Path, raw: pa.Table, numbers: np.ndarray) -> pa.Table:
    columns: dict[str, pa.ChunkedArray] = {name: _text_column(file, raw, numbers, name) for name in _TEXT}
    columns |= {name: _count_column(file, raw, numbers, name) for name in _COUNTS}
    areas = columns["height"].to_numpy() * columns["width"].to_numpy()
    remedy = f"with its width that is more than {MAX_PIXELS} pixels, the most that are read; scale it down"
    _refuse(file, numbers, "height", areas > MAX_PIXELS, raw["height"], remedy)
    columns["fps"] = _fps_column(file, raw, numbers, columns["num_frames"])
    columns["motion_score"] = _float_column(file, raw, numbers, "motion_score")
    if "camera_motion" in raw.column_names:
        columns["camera_motion"] = _words_column(file, raw, numbers, "camera_motion")
    return pa.table(columns)


def _csv_batches(file: Path) -> Iterator[pa.Table]:
    if file.stat().st_size == 0:
        raise UserError(f"{file}: the file is empty, write the columns {', '.join(_REQUIRED)} and one row per clip")
    with file.open("rb") as opened:
        head = opened.read(_HEAD_BYTES)
    if any(head.startswith(mark) for mark in _OTHER_MARKS) or b"\0" in head:
        _check_utf8(file)
    parse = pacsv.ParseOptions(newlines_in_values=True)
    read = pacsv.ReadOptions(block_size=_BLOCK_BYTES)
    with pacsv.open_csv(file, read_options=read, parse_options=parse) as reader:
        names = reader.schema.names
    _check_columns(file, names)
    wanted = [name for name in (*_REQUIRED, *_OPTIONAL) if name in names]
    convert = pacsv.ConvertOptions(
        column_types={name: pa.large_string() for name in wanted},
        include_columns=wanted,
        null_values=list(_MISSING),
        strings_can_be_null=True,
    )
    rows = 0
    with pacsv.open_csv(file, read_options=read, parse_options=parse, convert_options=convert) as reader:
        for batch in reader:
            rows += batch.num_rows
            yield pa.Table.from_batches([batch])
    if rows + 1 != _lines(file):  # a field goes over several: meant so, or as its quote is not closed
        check_quotes(file)


def _lines(file: Path) -> int:
    """Lines of a file, the last one with or without its end."""
    count, last = 0, b"\n"
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


def _parquet_batches(file: Path, row_group: int | None) -> Iterator[pa.Table]:
    if file.suffix != ".parquet":
        raise UserError(f"{file}: not a clip table, must be .csv and .parquet")
    with papq.ParquetFile(file) as reader:
        names = reader.schema_arrow.names
        _check_columns(file, names)
        columns = [name for name in (*_REQUIRED, *_OPTIONAL) if name in names]
        groups = None if row_group is None else [row_group]
        for batch in reader.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns, use_threads=False):
            for name in _TEXT:  # that they are UTF-8, parquet promises and its reader does not check
                batch.column(name).validate(full=True)
            yield pa.Table.from_batches([batch])


def _check_columns(file: Path, names: list[str]) -> None:
    for name in _REQUIRED:
        if names.count(name) > 1:
            raise UserError(f"{file}: column {name!r} is there {names.count(name)} times, keep one")
        if name not in names:
            alias = next((other for other in _ALIASES[name] if other in names), None)
            near = [alias] if alias else difflib.get_close_matches(name, names, n=1)
            hint = f", rename {near[0]!r} to {name!r}?" if near else f", add {name!r}"
            raise UserError(f"{file}: column {name!r} is missing; it has {', '.join(names)}{hint}")


def _text_column(file: Path, raw: pa.Table, numbers: np.ndarray, name: str) -> pa.ChunkedArray:
    column = _as_text(file, raw, name)
    unwritten = pc.is_in(pc.utf8_trim_whitespace(column), value_set=pa.array(_MISSING, pa.large_string()))
    empty = pc.or_(pc.is_null(column), unwritten)
    remedy = "write a caption, or take the row out" if name == "text" else "write the file's path, or take the row out"
    _refuse(file, numbers, name, empty, column, remedy)
    _refuse(file, numbers, name, pc.match_substring(column, "\0"), column, "it holds a NUL character, take it out")
    beyond = pc.greater(pc.binary_length(column), _MOST_TEXT)
    _refuse(file, numbers, name, beyond, column, f"it must have at most {_MOST_TEXT} bytes")
    return column


def _words_column(file: Path, raw: pa.Table, numbers: np.ndarray, name: str) -> pa.ChunkedArray:
    """Text that may be missing: then it is empty."""
    column = pc.fill_null(pc.utf8_trim_whitespace(_as_text(file, raw, name)), "")
    _refuse(file, numbers, name, pc.match_substring(column, "\0"), column, "it holds a NUL character, take it out")
    beyond = pc.greater(pc.binary_length(column), _MOST_TEXT)
    _refuse(file, numbers, name, beyond, column, f"it must have at most {_MOST_TEXT} bytes")
    return column


def _as_text(file: Path, raw: pa.Table, name: str) -> pa.ChunkedArray:
    column = raw[name]
    allowed = (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
    if not any(is_allowed(column.type) for is_allowed in allowed):
        raise UserError(f"{file}: column {name!r} holds {column.type}, it must hold text")
    return column.cast(pa.large_string())


def _truth_column(file: Path, raw: pa.Table, numbers: np.ndarray, name: str) -> np.ndarray:
    """(n,) bool; every row has to say."""
    column = raw[name]
    if pa.types.is_boolean(column.type) or pa.types.is_integer(column.type):
        words = pc.cast(column.cast(pa.int64()), pa.large_string())
    else:
        words = pc.utf8_lower(pc.utf8_trim_whitespace(_as_text(file, raw, name)))
    true, false = (pc.is_in(words, value_set=pa.array(told, pa.large_string())) for told in (_TRUE, _FALSE))
    _refuse(file, numbers, name, pc.invert(pc.or_(true, false)), column, "it must be true or false")
    return true.to_numpy()


def _count_column(file: Path, raw: pa.Table, numbers: np.ndarray, name: str) -> pa.ChunkedArray:
    column = _float_column(file, raw, numbers, name)
    values = column.to_numpy()
    bad = ~((values >= 1) & (values < 2**31) & (values == np.floor(values)))
    _refuse(file, numbers, name, bad, raw[name], "it must be an integer >= 1")
    if name != "num_frames":
        _refuse(file, numbers, name, values > MAX_SIDE, raw[name], f"it must be at most {MAX_SIDE}; scale it down")
    return column


def _fps_column(file: Path, raw: pa.Table, numbers: np.ndarray, num_frames: pa.ChunkedArray) -> pa.ChunkedArray:
    column = _float_column(file, raw, numbers, "fps")
    values = column.to_numpy()
    known = (values > 0) & (values < MAX_FPS)
    bad = ~known & ~(np.isnan(values) & (num_frames.to_numpy() == 1))
    _refuse(file, numbers, "fps", bad, raw["fps"], "it must be a number > 0 (empty only for images)")
    return column


def _float_column(file: Path, raw: pa.Table, numbers: np.ndarray, name: str) -> pa.ChunkedArray:
    """float64 with NaN for null; a column that is not there is all NaN."""
    if name not in raw.column_names:
        return pa.chunked_array([np.full(raw.num_rows, np.nan)])
    column = raw[name]
    if pa.types.is_large_string(column.type) or pa.types.is_string(column.type):
        column = _parse_floats(file, numbers, name, pc.utf8_trim_whitespace(column))
    elif not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
        raise UserError(f"{file}: column {name!r} holds {column.type}, it must hold numbers")
    return pc.fill_null(column.cast(pa.float64()), float("nan"))


def _parse_floats(file: Path, numbers: np.ndarray, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        return column.cast(pa.float64())
    except pa.ArrowInvalid:
        looks_right = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
        bad = pc.invert(pc.fill_null(pc.match_substring_regex(column, looks_right), True))
        _refuse(file, numbers, name, bad, column, "it must be a number")
        raise


def _refuse(
    file: Path, numbers: np.ndarray, name: str, bad: np.ndarray | pa.ChunkedArray, shown: pa.ChunkedArray, remedy: str
) -> None:
    flags = bad if isinstance(bad, np.ndarray) else bad.to_numpy()
    rows = np.flatnonzero(flags)
    if len(rows):
        more = f" and {len(rows) - 1} more rows" if len(rows) > 1 else ""
        value = shown[int(rows[0])].as_py()
        text = "empty" if value is None else repr(value if not isinstance(value, str) else value[:60])[:60]
        raise UserError(f"{file}: row {numbers[rows[0]]}{more}: {name} is {text}, {remedy}")
