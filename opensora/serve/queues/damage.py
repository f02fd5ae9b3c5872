"""A file of the queue that a disk has damaged: how it shows, and what can still be read of it."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from opensora.serve.queues.rows import Damaged, job_of
from opensora.serve.queues.statements import COLUMNS, TABLES

MAX_GAP = 100_000  # rows between two readable ones that are looked for one by one
SIGNS = ("no such table", "no such column", "malformed", "unsupported file format")  # of damage, in OperationalErrors
_ROWS = f"SELECT rowid, {', '.join(COLUMNS)} FROM jobs NOT INDEXED"


def is_damage(error: sqlite3.DatabaseError) -> bool:
    """Or else a disk that is full, may not be written, or does not answer."""
    return not isinstance(error, sqlite3.OperationalError) or any(sign in str(error) for sign in SIGNS)


def damage_of(connection: sqlite3.Connection) -> str | None:
    """The first thing in it that we cannot have written; None: it is sound.

    Raises:
        sqlite3.DatabaseError: it cannot be read; ``is_damage`` says whether for that reason.
    """
    (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if found != "ok":
        return str(found)
    made = {text for (text,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
    if made != set(TABLES):
        return "its tables are others"
    try:
        for row in connection.execute(f"SELECT {', '.join(COLUMNS)} FROM jobs"):
            job_of(row)
        for table in ("models", "workers"):
            for (info,) in connection.execute(f"SELECT info FROM {table}"):
                json.loads(info)
    except (Damaged, ValueError, TypeError, RecursionError) as error:
        return str(error)
    return None


def restore(damaged: Path, into: sqlite3.Connection) -> int:
    """Copies the jobs that can be read; how many these are."""
    places = ", ".join("?" * len(COLUMNS))
    into.execute("BEGIN IMMEDIATE")
    kept = 0
    with closing(sqlite3.connect(f"{damaged.absolute().as_uri()}?mode=ro", uri=True)) as source:
        for row in _readable(source):
            kept += into.execute(f"INSERT OR IGNORE INTO jobs ({', '.join(COLUMNS)}) VALUES ({places})", row).rowcount
    into.execute("COMMIT")
    return kept


def _readable(source: sqlite3.Connection) -> Iterator[tuple[Any, ...]]:
    """Rows of jobs from the first one on, from the last one back, and one by one between where these two stop."""
    low, high = 0, 0
    for order in ("ASC", "DESC"):
        for rowid, *row in _until_damage(source, f"{_ROWS} ORDER BY rowid {order}"):
            low, high = (rowid, high) if order == "ASC" else (low, rowid)
            yield tuple(row)
    for rowid in range(low + 1, min(high, low + MAX_GAP)):
        for _, *row in _until_damage(source, f"{_ROWS} WHERE rowid = {rowid}"):
            yield tuple(row)


def _until_damage(source: sqlite3.Connection, statement: str) -> Iterator[tuple[Any, ...]]:
    """Rows that are jobs, until the file cannot be read."""
    try:
        for row in source.execute(statement):
            if _is_job(row[1:]):
                yield row
    except (sqlite3.Error, OverflowError, UnicodeDecodeError):
        return


def _is_job(row: tuple[Any, ...]) -> bool:
    try:
        job_of(row)
    except Damaged:
        return False
    return True
