"""Files that a user gives and takes: texts in any Unicode encoding that names itself, tables written whole or not."""

import codecs
import contextlib
import csv
import io
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from acceleration.files.atomic_write import replacing as replacing
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import short, short_reason

MAX_TEXT_BYTES = 1 << 30  # a text beyond this is not what it is taken for
MAX_FIELD = 1 << 20  # characters of one field of a table, as for captions in a clip table
# Longest first: the mark of UTF-32 LE begins with that of UTF-16 LE.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def absence(path: str | Path, wanted: str = "file or folder") -> str | None:
    """Why nothing is found at a path, in words for a message; None: something is there.

    A loop of links, a name that is too long, a file where a folder should be, and a folder that may not be entered are
    told as what they are.
    """
    try:
        os.stat(path)
    except FileNotFoundError:
        return f"a link to nothing (no such {wanted})" if os.path.islink(path) else f"no such {wanted}"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        return short_reason(error)
    return None


def read_text(path: Path, name: str = "") -> str:
    """The text of a file: in the encoding that its byte-order mark names, else UTF-8. Nothing is replaced silently.

    Args:
        name: how messages call it; empty: the path.

    Raises:
        UserError: it cannot be read, is a folder or a pipe, is in another encoding, or is not text (NUL characters);
            with the line and the remedy.
    """
    name = name or str(path)
    raw = _read_bytes(path, name)
    encoding = next((encoding for mark, encoding in _BYTE_ORDER_MARKS if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{raw[error.start]:02x}" if encoding.startswith("utf-8") else error.reason
        raise UserError(
            f"{name} line {line}: not {encoding.removesuffix('-sig').upper()} text ({found}); save it again as UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{name} line {line}: holds a NUL character, so it is not UTF-8 text; save it again as UTF-8")
    return text


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{name}: not a regular file; give the path of a text file")
        size = path.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise UserError(f"{name}: {size} bytes, a text file must have at most {MAX_TEXT_BYTES}")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path; UserError is one too
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def read_csv(
    path: Path, required: Sequence[str], name: str = "", *, optional: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV file with a header: (line the row ends at, value of every column of the header).

    Empty lines are passed over; a row that is too short is filled with empty text.

    Args:
        required: columns that must be in the header.
        name: how messages call the file; empty: the path.
        optional: columns that may be in the header, once.

    Raises:
        UserError: as ``read_text``; no header, a column missing or there twice, a field beyond ``MAX_FIELD``, a quote
            that is not closed or has text behind it, a row with more fields than the header has; with the line.
    """
    name = name or str(path)
    text = read_text(path, name)
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)  # else an open quote swallows the rows behind it
    header = [column.strip() for column in _next_row(reader, name) or []]
    for column in (*required, *optional):
        if header.count(column) != 1 and not (column in optional and column not in header):
            problem = "is there twice" if column in header else "is missing"
            raise UserError(f"{name}: column {column!r} {problem}; it has {', '.join(header) or 'none'}")
    while (row := _next_row(reader, name)) is not None:
        if len(row) > len(header):
            raise UserError(
                f"{name} line {reader.line_num}: {len(row)} fields, the header has {len(header)}; "
                "put text that holds a comma in quotes"
            )
        if any(field.strip() for field in row):
            yield reader.line_num, dict(zip(header, row + [""] * (len(header) - len(row)), strict=True))


def check_quotes(path: Path) -> None:
    """That every quote of a CSV file in UTF-8 is closed at the end of its field; a row is held at a time.

    Readers that are less strict take all up to the next quote for one field, and the rows in it are gone.

    Raises:
        UserError: one is not, with its line.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD))
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        while _next_row(reader, str(path)) is not None:
            pass


_CSV_PROBLEMS = (  # words of the csv module, and what is told
    ("field limit", f"a field of more than {MAX_FIELD} characters"),
    ("unexpected end", "a quote is opened and not closed; close it"),
    ("expected after", "text behind a closing quote; write a quote that belongs to the text twice"),
)


def _next_row(reader: Any, name: str) -> list[str] | None:
    first = reader.line_num + 1
    try:
        return next(reader, None)
    except csv.Error as error:
        problem = next((told for words, told in _CSV_PROBLEMS if words in str(error)), str(error))
        line = first if "not closed" in problem else reader.line_num
        raise UserError(f"{name} line {line}: {problem}") from error


def write_whole(path: Path, write: Callable[[IO[str]], object]) -> None:
    """A text file that is there whole or, after an error, as it was before: written aside, flushed, renamed.

    Raises:
        UserError: it cannot be written, or holds what UTF-8 cannot say (a file name of undecodable bytes).
    """
    try:
        with replacing(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            write(text)
            text.detach()  # flushes; the file is closed when it is in its place
    except (OSError, UnicodeEncodeError) as error:
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error


@contextlib.contextmanager
def written_whole(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """``with written_whole(path) as aside``: what the block writes to ``aside`` is at ``path`` at its end, or nothing.

    For files that a library writes by name; ``aside`` has the suffix of ``path`` and is empty at first. Folders are
    made. After an error ``path`` is as it was.

    Args:
        replace: whether a file at ``path`` may be replaced.

    Raises:
        FileExistsError: there is one and it may not; also if another process put it there in the meantime.
        UserError: it cannot be written.
    """
    aside, is_there = None, False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{uuid.uuid4().hex[:12]}.tmp{path.suffix}")
        aside.touch(exist_ok=False)
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        is_there = not replace
        (os.replace if replace else _rename_new)(aside, path)
    except BaseException as error:
        if aside is not None:
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and not (is_there and isinstance(error, FileExistsError)):
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
        raise


def _rename_new(source: Path, target: Path) -> None:
    """Rename a file unless there is one at ``target``, whoever puts it there at the same time.

    Raises:
        FileExistsError: there is.
    """
    try:
        os.link(source, target)
        source.unlink()
    except FileExistsError:
        raise
    except OSError:  # file systems without hard links
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        os.replace(source, target)


def try_output(path: Path, key: str, *, folder: bool = False) -> None:
    """Make sure, before the work, that a file can be written at ``path`` (or files in it, if it is a ``folder``).

    Creates missing parents (and the folder); leaves nothing else behind.

    Args:
        key: the option that names the place, for the message.

    Raises:
        UserError: it cannot, with the reason.
    """
    try:
        if not str(path) or (path.name == "" and not folder):
            raise UserError(f"{key}={str(path)!r}: must name a {'folder' if folder else 'file'} to write")
        if folder and path.exists() and not path.is_dir():
            raise UserError(f"{key}={path}: is a file; name a folder to write to")
        if not folder and path.is_dir():
            raise UserError(f"{key}={path}: is a folder; name a file to write")
        if not folder and path.exists() and not path.is_file():  # to open a pipe would take for ever
            raise UserError(f"{key}={path}: is not a regular file; name another one to write")
        place = path if folder else path.parent
        place.mkdir(parents=True, exist_ok=True)
        descriptor, probe = tempfile.mkstemp(prefix=".writable.", dir=place)
        os.close(descriptor)
        os.unlink(probe)
        if not folder and path.exists():
            with path.open("ab"):
                pass
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{key}={short(path, 200)}: cannot be written ({reason}); name another place") from error
