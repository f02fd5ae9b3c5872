"""The queue in one file, for the processes of one host: SQLite, every change on the disk before a call returns."""

import fcntl
import os
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from acceleration.files.atomic_write import flush
from opensora.serve.jobs import QueueUnavailable
from opensora.serve.queues.damage import damage_of, is_damage, restore
from opensora.serve.queues.statements import TABLES, VERSION
from opensora.serve.queues.table_queue import Rows, Say
from opensora.utils.console import announce
from opensora.utils.errors import UserError, one_line
from opensora.utils.files.file_system import NETWORK, file_system

BUSY_S = 30.0  # longest wait for a change of another process
OLDEST = (3, 35, 0)  # the first with RETURNING
APPLICATION = 0x4F534A51  # "OSJQ", in the header of the file
PRAGMAS = ("synchronous = FULL", "trusted_schema = OFF", "cell_size_check = ON", f"busy_timeout = {BUSY_S * 1000:.0f}")


class SqliteDatabase:
    """A file and two connections to it: who only reads does not wait for the disk.

    Every process that has it open holds ``.lock`` beside it, shared; the one that finds itself alone looks whether the
    file is damaged, before it opens it.
    """

    skip_locked = ""  # who changes has the whole file

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UserError: it cannot be opened, is on a network file system, or is of a later version or another program.
        """
        self._path = path
        _check_place(path)
        self._process = os.getpid()
        try:
            self._held = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"{path}: cannot be opened: {error.strerror}; out=FOLDER must be one to write in") from None
        try:
            self._open()
        except (sqlite3.Error, OSError) as error:
            os.close(self._held)
            raise UserError(f"{path}: cannot be opened: {error}; out=FOLDER must be one to write in") from None
        except BaseException:
            os.close(self._held)
            raise

    def _open(self) -> None:
        with suppress(BlockingIOError):
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _mend(self._path)
            _create(self._path)
        fcntl.flock(self._held, fcntl.LOCK_SH)  # waits for one that mends
        _create(self._path)
        self._writing, self._reading = _connect(self._path), _connect(self._path)
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()

    def read(self, statement: str, **values: Any) -> Rows:
        with self._read_lock, self._answering():
            return self._reading.execute(statement, values).fetchall()

    @contextmanager
    def change(self, *, alone: bool = False) -> Iterator[Say]:
        with self._write_lock, self._answering():
            self._writing.execute("BEGIN IMMEDIATE")
            try:
                yield self._say
                self._writing.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._writing.execute("ROLLBACK")
                raise

    def _say(self, statement: str, **values: Any) -> Rows:
        return self._writing.execute(statement, values).fetchall()

    @contextmanager
    def _answering(self) -> Iterator[None]:
        assert os.getpid() == self._process, "a connection does not outlive a fork: each process opens its own queue"
        try:
            yield
        except sqlite3.IntegrityError:  # a mistake of the caller
            raise
        except sqlite3.DatabaseError as error:
            raise QueueUnavailable(f"{self._path}: {error}") from error

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            self._reading.close()
            self._writing.close()
            if self._held >= 0:
                os.close(self._held)
            self._held = -1


def _check_place(path: Path) -> None:
    kind = file_system(path.parent)
    if kind in NETWORK:
        raise UserError(
            f"out={path.parent}: is on {kind}, where SQLite can lose jobs; must be on a disk of this host, or have "
            "queue=postgresql://USER@HOST/DATABASE"
        )
    if sqlite3.sqlite_version_info < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(f"queue: this Python has SQLite {sqlite3.sqlite_version}, must be {oldest} or later")


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        for pragma in PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            kind = file_system(path) or "this file system"
            raise UserError(f"out={path.parent}: {kind} has no shared memory, which SQLite needs; give another folder")
    except BaseException:
        connection.close()
        raise
    return connection


def _create(path: Path) -> None:
    """The tables, where there are none."""
    with closing(_connect(path)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        _check_version(path, connection)
        if not connection.execute("PRAGMA user_version").fetchone()[0]:
            for statement in TABLES:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
    flush(path.parent)


def _check_version(path: Path, connection: sqlite3.Connection) -> None:
    """
    Raises:
        UserError: another program's, or a later one's.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (program,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if program != APPLICATION and (program or version or tables):
        raise UserError(f"{path}: is a database of another program; give another out=FOLDER")
    if version > VERSION:
        raise UserError(
            f"{path}: is of version {version}, which a later release has written; this one knows {VERSION}: "
            "update it, or give another out=FOLDER"
        )


def _mend(path: Path) -> None:
    """A damaged file is put aside, and what can be read of it is in a new one. Nobody else has it open."""
    problem = _problem(path) if path.exists() else None
    if not problem:
        return
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}")
    for source, target in ((path, aside), (_beside(path, "-wal"), _beside(aside, "-wal"))):
        if source.exists():
            shutil.copyfile(source, target)
            flush(target)
    kept = _rebuild(path, aside)
    announce(one_line(f"{path}: damaged ({problem}): put aside as {aside.name}; of its jobs {kept} could be read"))


def _problem(path: Path) -> str | None:
    """What is damaged; None: nothing is.

    Raises:
        UserError: see ``_check_version``.
        sqlite3.DatabaseError: it cannot be read for another reason than damage.
    """
    try:
        with closing(_connect(path)) as connection:
            _check_version(path, connection)
            return damage_of(connection)
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        return str(error)


def _rebuild(path: Path, aside: Path) -> int:
    """The number of jobs in the new file, which takes its place at once and whole."""
    fresh = _beside(path, ".new")
    for end in ("", "-wal", "-shm"):
        _beside(fresh, end).unlink(missing_ok=True)
    _create(fresh)
    with closing(_connect(fresh)) as connection:
        kept = restore(aside, connection)
    for old in (_beside(aside, "-shm"), _beside(path, "-wal"), _beside(path, "-shm")):
        old.unlink(missing_ok=True)
    os.replace(fresh, path)
    flush(path.parent)
    return kept


def _beside(path: Path, end: str) -> Path:
    return path.with_name(path.name + end)
