"""The queue of jobs: one file for one host, PostgreSQL for many."""

from opensora.serve.config import ServeConfig
from opensora.serve.jobs import JobQueue
from opensora.serve.queues.sqlite import SqliteDatabase
from opensora.serve.queues.table_queue import TableQueue
from opensora.serve.store import Store
from opensora.utils.errors import UserError

SCHEMES = ("postgresql://", "postgres://")


def open_queue(cfg: ServeConfig, store: Store) -> JobQueue:
    """
    Raises:
        UserError: ``cfg.queue`` names none, or it cannot be opened.
    """
    if not cfg.queue:
        return TableQueue(SqliteDatabase(store.queue_file))
    if cfg.queue.startswith(SCHEMES):
        from opensora.serve.queues.postgres import PostgresDatabase

        return TableQueue(PostgresDatabase(cfg.queue))
    raise UserError(f"queue={cfg.queue}: must be empty (SQLite in out), or postgresql://USER@HOST/DATABASE")
