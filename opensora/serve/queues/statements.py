"""Tables of the queue, and what is said to them: the same in SQLite and PostgreSQL.

Values are written ``:name``. ``{skip_locked}`` is what PostgreSQL needs beside a row that another one is changing.
"""

VERSION = 1  # of the tables; a later one is refused, with its tables as they are

# Of a job: what is asked for is in ``spec`` (JSON), and again in a column where tables are searched by it.
_NAMES = (
    "id owner model batch_key priority idempotency spec state created_at started_at completed_at expires_at progress "
    "step batch attempt tries worker lease_until cancel_requested error result"
)
COLUMNS = _NAMES.split()
_ALL = ", ".join(COLUMNS)

TABLES = (
    """CREATE TABLE jobs (
        id TEXT PRIMARY KEY NOT NULL,
        owner TEXT NOT NULL,
        model TEXT NOT NULL,
        batch_key TEXT NOT NULL,
        priority BIGINT NOT NULL,
        idempotency TEXT,
        spec TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'completed', 'failed', 'cancelled')),
        created_at DOUBLE PRECISION NOT NULL,
        started_at DOUBLE PRECISION,
        completed_at DOUBLE PRECISION,
        expires_at DOUBLE PRECISION,
        progress BIGINT NOT NULL DEFAULT 0,
        step BIGINT NOT NULL DEFAULT 0,
        batch BIGINT NOT NULL DEFAULT 1,
        attempt BIGINT NOT NULL DEFAULT 0,
        tries BIGINT NOT NULL DEFAULT 0,
        worker TEXT,
        lease_until DOUBLE PRECISION,
        cancel_requested BIGINT NOT NULL DEFAULT 0,
        error TEXT,
        result TEXT
    )""",
    "CREATE INDEX jobs_by_state ON jobs (state, model)",
    "CREATE INDEX jobs_by_owner ON jobs (owner, created_at, id)",
    "CREATE INDEX jobs_by_end ON jobs (completed_at, id)",
    "CREATE UNIQUE INDEX jobs_once ON jobs (owner, idempotency) WHERE idempotency IS NOT NULL",
    # turn: number of the owner's last claim among all
    "CREATE TABLE owners (owner TEXT PRIMARY KEY NOT NULL, turn BIGINT NOT NULL)",
    "CREATE TABLE models (name TEXT PRIMARY KEY NOT NULL, info TEXT NOT NULL, told_at DOUBLE PRECISION NOT NULL)",
    "CREATE TABLE workers (name TEXT PRIMARY KEY NOT NULL, info TEXT NOT NULL, told_at DOUBLE PRECISION NOT NULL)",
)

_ENDED = "state IN ('completed', 'failed', 'cancelled')"
_MINE = "id = :id AND worker = :worker AND attempt = :attempt AND state = 'running'"  # the lease is not lost
_OWNED = "(CAST(:owner AS TEXT) IS NULL OR owner = :owner)"

# Of the web process
ADD = f"""INSERT INTO jobs (id, owner, model, batch_key, priority, idempotency, spec, state, created_at, expires_at)
    VALUES (:id, :owner, :model, :batch_key, :priority, :idempotency, :spec, 'queued', :now, :expires_at)
    RETURNING {_ALL}"""
OF_BEFORE = f"SELECT {_ALL} FROM jobs WHERE owner = :owner AND idempotency = :idempotency"
WAITING = """SELECT COUNT(*), COALESCE(SUM(CASE WHEN owner = :owner THEN 1 ELSE 0 END), 0)
    FROM jobs WHERE state = 'queued'"""
LAST_ENDS = "SELECT completed_at FROM jobs WHERE completed_at IS NOT NULL ORDER BY completed_at DESC LIMIT 9"
GET = f"SELECT {_ALL} FROM jobs WHERE id = :id AND {_OWNED}"
PAGE = {
    "asc": f"""SELECT {_ALL} FROM jobs WHERE owner = :owner AND (created_at, id) > (:created_at, :id)
        ORDER BY created_at, id LIMIT :most""",
    "desc": f"""SELECT {_ALL} FROM jobs WHERE owner = :owner AND (created_at, id) < (:created_at, :id)
        ORDER BY created_at DESC, id DESC LIMIT :most""",
}
HEADS = """SELECT priority, owner, COALESCE(turn, 0), created_at, id, waiting, place FROM (
        SELECT jobs.priority, jobs.owner, owners.turn, jobs.created_at, jobs.id,
            COUNT(*) OVER (PARTITION BY jobs.priority, jobs.owner) AS waiting,
            ROW_NUMBER() OVER (PARTITION BY jobs.priority, jobs.owner ORDER BY jobs.created_at, jobs.id) AS place
        FROM jobs LEFT JOIN owners ON owners.owner = jobs.owner WHERE jobs.state = 'queued'
    ) AS places WHERE place = 1 OR id = :id"""
_NOBODYS = "state = 'queued' OR lease_until < :now"
CANCEL = f"""UPDATE jobs SET cancel_requested = 1,
        error = CASE WHEN {_NOBODYS} THEN :error ELSE error END,
        completed_at = CASE WHEN {_NOBODYS} THEN :now ELSE completed_at END,
        lease_until = CASE WHEN {_NOBODYS} THEN NULL ELSE lease_until END,
        state = CASE WHEN {_NOBODYS} THEN 'cancelled' ELSE state END
    WHERE id = :id AND owner = :owner AND state IN ('queued', 'running') RETURNING {_ALL}"""
REMOVE = f"DELETE FROM jobs WHERE id = :id AND {_OWNED} AND {_ENDED} RETURNING {_ALL}"
EXPIRED = f"SELECT {_ALL} FROM jobs WHERE {_ENDED} AND expires_at <= :now ORDER BY expires_at, id"
OLDEST = f"SELECT {_ALL} FROM jobs WHERE completed_at IS NOT NULL ORDER BY completed_at, id LIMIT :most"
COUNTS = "SELECT model, state, COUNT(*) FROM jobs GROUP BY model, state"

# Of workers. A job may be claimed where it is queued, or running and its lease is over.
_OPEN = "state IN ('queued', 'running') AND (state = 'queued' OR lease_until < :now) AND model IN ({models})"
END_CANCELLED = f"""UPDATE jobs SET state = 'cancelled', completed_at = :now, lease_until = NULL, error = :error
    WHERE cancel_requested = 1 AND {_OPEN}"""
END_LOST = f"""UPDATE jobs SET state = 'failed', completed_at = :now, lease_until = NULL, error = :error
    WHERE tries >= :attempts AND {_OPEN}"""
_TAKEN = """UPDATE jobs SET state = 'running', worker = :worker, lease_until = :until, attempt = attempt + 1,
        tries = tries + 1, started_at = NULL, progress = 0, step = 0, batch = 1
    WHERE id = (
        SELECT jobs.id FROM jobs LEFT JOIN owners ON owners.owner = jobs.owner WHERE """
_IN_TURN = f""" ORDER BY jobs.priority DESC, COALESCE(owners.turn, 0), jobs.created_at, jobs.id
        LIMIT 1 {{skip_locked}}
    ) RETURNING {_ALL}"""
CLAIM = _TAKEN + _OPEN + _IN_TURN
CLAIM_LIKE = _TAKEN + "state = 'queued' AND model = :model AND batch_key = :batch_key" + _IN_TURN
TURN = """INSERT INTO owners (owner, turn) SELECT CAST(:owner AS TEXT), COALESCE(MAX(turn), 0) + 1 FROM owners
    WHERE true ON CONFLICT (owner) DO UPDATE SET turn = excluded.turn"""
RENEW = f"UPDATE jobs SET lease_until = :until WHERE {_MINE} RETURNING id"
STANDING = "SELECT id, worker, attempt FROM jobs WHERE state = 'running' AND cancel_requested = 0 AND id IN ({ids})"
REPORT = f"""UPDATE jobs SET step = :step, batch = :batch, started_at = COALESCE(started_at, :now),
        progress = CASE WHEN :progress > progress THEN :progress ELSE progress END
    WHERE {_MINE} RETURNING id"""
FINISH = f"""UPDATE jobs SET state = :state, completed_at = :now, lease_until = NULL, error = :error, result = :result,
        progress = CASE WHEN CAST(:state AS TEXT) = 'completed' THEN 100 ELSE progress END
    WHERE {_MINE} RETURNING id"""
# Back into the queue, or where it was asked for, cancelled
PUT_BACK = f"""UPDATE jobs SET worker = NULL, lease_until = NULL, started_at = NULL, progress = 0, step = 0, batch = 1,
        tries = tries - :uncounted,
        error = CASE WHEN cancel_requested = 1 THEN :error ELSE NULL END,
        completed_at = CASE WHEN cancel_requested = 1 THEN :now ELSE NULL END,
        state = CASE WHEN cancel_requested = 1 THEN 'cancelled' ELSE 'queued' END
    WHERE {_MINE} RETURNING id"""
END_MINE = f"""UPDATE jobs SET state = 'failed', completed_at = :now, lease_until = NULL, error = :error
    WHERE tries >= :attempts AND cancel_requested = 0 AND {_MINE} RETURNING id"""
RUNNING = f"""SELECT {_ALL} FROM jobs WHERE state = 'running' AND (CAST(:worker AS TEXT) IS NULL OR worker = :worker)
    ORDER BY created_at, id"""

# What workers tell the web process
TELL = {
    table: f"""INSERT INTO {table} (name, info, told_at) VALUES (:name, :info, :now)
    ON CONFLICT (name) DO UPDATE SET info = excluded.info, told_at = excluded.told_at"""
    for table in ("models", "workers")
}
TOLD = {
    table: f"SELECT name, info FROM {table} WHERE told_at >= :since ORDER BY name" for table in ("models", "workers")
}
FORGET = "DELETE FROM workers WHERE told_at < :before"
