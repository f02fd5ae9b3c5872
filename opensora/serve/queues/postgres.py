"""The queue in PostgreSQL, for the processes of many hosts. The only home of psycopg."""

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from opensora.serve.jobs import QueueUnavailable
from opensora.serve.queues.statements import TABLES, VERSION
from opensora.serve.queues.table_queue import Rows, Say
from opensora.utils.errors import UserError

SCHEMA = "opensora_serve"  # of its own, so that the database may hold other things
LOCK = 0x4F534A51  # of who claims or adds
SETTINGS = {
    "search_path": SCHEMA,
    "synchronous_commit": "on",
    "idle_in_transaction_session_timeout": "30s",  # a host that dies within a change does not stop the others
    "statement_timeout": "30s",
}
# A connection whose other end is gone without a word is found dead after half a minute.
ARGUMENTS = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
    "application_name": "opensora serve",
}


class PostgresDatabase:
    """One connection, made again where it was lost. Threads share it, one after the other."""

    skip_locked = "FOR UPDATE OF jobs SKIP LOCKED"  # what another one is changing now is not waited for

    def __init__(self, url: str) -> None:
        """
        Raises:
            UserError: psycopg is not installed, the server does not take us, or its tables are a later version's.
        """
        self._psycopg = _psycopg()
        self._url, self._name = url, _without_secrets(url)
        self._process, self._lock = os.getpid(), threading.Lock()
        try:
            self._connection = self._connect()
            with self.change(alone=True) as say:
                version = _create(say)
        except (self._psycopg.Error, QueueUnavailable) as error:
            raise UserError(f"queue={self._name}: {error}") from None
        if version > VERSION:
            self.close()
            raise UserError(
                f"queue={self._name}: its tables are of version {version}, which a later release has made; this one "
                f"knows {VERSION}: update it, or name another database"
            )

    def read(self, statement: str, **values: Any) -> Rows:
        with self._lock, self._answering():
            return self._again(lambda: self._say(statement, **values))

    @contextmanager
    def change(self, *, alone: bool = False) -> Iterator[Say]:
        with self._lock, self._answering():
            self._again(lambda: self._connection.execute("BEGIN"))
            try:
                if alone:
                    self._say("SELECT pg_advisory_xact_lock(:lock)", lock=LOCK)
                yield self._say
                self._connection.execute("COMMIT")
            except BaseException:
                with suppress(self._psycopg.Error):
                    self._connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _connect(self) -> Any:
        connection = self._psycopg.connect(self._url, autocommit=True, **ARGUMENTS)
        for name, value in SETTINGS.items():
            connection.execute(f"SET {name} = '{value}'")
        return connection

    def _again(self, first: Callable[[], Any]) -> Any:
        """What begins a call; once more on a new connection, where a restart of the server has ended the old one."""
        try:
            return first()
        except self._psycopg.OperationalError:
            if not self._connection.broken:
                raise
            self._connection = self._connect()
            return first()

    def _say(self, statement: str, **values: Any) -> Rows:
        cursor = self._connection.execute(_translated(statement), values)
        return cursor.fetchall() if cursor.description else []

    @contextmanager
    def _answering(self) -> Iterator[None]:
        assert os.getpid() == self._process, "a connection does not outlive a fork: each process opens its own queue"
        try:
            yield
        except (self._psycopg.OperationalError, self._psycopg.InterfaceError) as error:
            raise QueueUnavailable(f"{self._name}: {error}") from error


def _psycopg() -> Any:
    try:
        import psycopg
    except ImportError as error:  # psycopg without its binary part looks for libpq of the system
        raise UserError(f"queue=postgresql: {error}; pip install 'psycopg[binary]', or queue= for SQLite") from None
    return psycopg


@cache
def _translated(statement: str) -> str:
    return re.sub(r":(\w+)", r"%(\1)s", statement)


def _create(say: Say) -> int:
    """Makes the tables where there are none; the version of those that there are."""
    say(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
    if not say("SELECT 1 FROM pg_tables WHERE schemaname = :schema AND tablename = 'about'", schema=SCHEMA):
        for statement in (*TABLES, "CREATE TABLE about (version BIGINT NOT NULL)"):
            say(statement)
        say("INSERT INTO about (version) VALUES (:version)", version=VERSION)
    ((version,),) = say("SELECT version FROM about")
    return int(version)


def _without_secrets(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return "postgresql://..."
    return f"postgresql://{parts.netloc.rpartition('@')[2]}{parts.path}"
