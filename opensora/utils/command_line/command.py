"""How a command ends: what of an exception its user reads, and the exit code."""

import contextlib
import csv
import errno
import io
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from opensora.utils.errors import UserError, one_line

REFUSED, FAILED = 2, 1
STDOUT = "standard output"
# What a disk or a mount says, whoever asks; other errors without a file name are mistakes in a program.
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ESTALE)
_OF_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)


def ending_of(error: BaseException) -> tuple[str, int] | None:
    """(line for stderr, empty for none, and exit code) of a command that ends with ``error``.

    * ``UserError``: its line and 2; an error with an ``exit_code``: its line and that.
    * ``OSError`` that names a file or that disks raise: file and reason, and 1, as it may go well the next time; 2 for
      a path that can be none.
    * Text that cannot be decoded or a table that cannot be parsed: the reason, where it was read, and 2.
    * The reader of the output is gone (``| head``): nothing, 141. A signal: its name, 128 plus its number.

    Returns:
        None for a mistake in the program, which keeps its traceback.
    """
    if isinstance(error, UserError):
        return f"error: {error}", REFUSED
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return f"error: {one_line(str(error))}", code
    if isinstance(error, KeyboardInterrupt):
        number = getattr(error, "number", signal.SIGINT)  # as signal_handler.stopped_in_one_line says it
        return f"stopped by {signal.Signals(number).name}", 128 + number
    if isinstance(error, BrokenPipeError) and _reader_is_gone():
        return "", 128 + 13  # SIGPIPE
    if isinstance(error, OSError) and not isinstance(error, (ConnectionError, io.UnsupportedOperation)):
        return _of_disk(error)
    if isinstance(error, (UnicodeError, csv.Error)):
        return f"error: {one_line(str(error))} ({_place(error)})", REFUSED
    return None


def _of_disk(error: OSError) -> tuple[str, int] | None:
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    if error.errno is None:  # raised with a message, by us or by a reader of files
        return f"error: {one_line(str(error) or _place(error))}", FAILED
    if not names and error.errno not in _OF_DISKS:
        return None
    what = " -> ".join(names) or (STDOUT if _was_printing(error) or _flush_fails() else _place(error))
    code = REFUSED if error.errno in _OF_PATHS else FAILED
    return f"error: {one_line(f'{what}: {error.strerror or error}')}", code


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the disk that the block meets while it writes ``path`` name it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def call(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """``main(argv)`` of a command that is one process; returns its exit code, after the one line of an error.

    ``argv``: None: the words of the command line.
    """
    be_printable()
    try:
        code = main(list(sys.argv[1:] if argv is None else argv)) or 0
        finish_output()
    except BaseException as error:
        ending = ending_of(error)
        if ending is None:
            raise
        line, code = ending
        abandon_output()
        if line:
            print(line, file=sys.stderr, flush=True)
    return code


def be_printable() -> None:
    """Escape what the terminal's encoding lacks, as of file names that are not UTF-8, instead of failing at it.

    Standard streams that were closed (``>&-``) lead nowhere, instead of to the next file that is opened.
    """
    for number in range(3):
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
        os.set_inheritable(number, True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (closed with the process)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def finish_output() -> None:
    """Write out what was printed, while an error can still be told.

    Raises:
        OSError: it cannot be written.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise OSError(error.errno, error.strerror, STDOUT) from error


def abandon_output() -> None:
    """Write out what can be; what cannot is dropped, so that the interpreter does not stumble over it at its end."""
    if _flush_fails():
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flush_fails() -> bool:
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        return True
    return False


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more; a broken pipe elsewhere is no such thing."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):  # no file behind it
        return False


def _was_printing(error: BaseException) -> bool:
    """Whether it was a ``print`` that failed; what it wrote is then forgotten, and a later flush succeeds."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and (frames[-1].line or "").startswith("print(")


def _place(error: BaseException) -> str:
    """Where an exception arose, for one that names no file."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else type(error).__name__
