"""A PostgreSQL of a test's own, of the system's packages: its files in a temporary folder, its socket there too."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.patience import patience

START_S = 60.0
INITDB = ("-U", "tests", "-A", "trust", "--no-sync", "-E", "UTF8")


class Missing(Exception):
    """Why there can be no server here."""


class Server:
    """One that runs, and can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._as = folder, _somebody_else(folder)
        self._programs = _programs()
        self._process: subprocess.Popen[bytes] | None = None
        made = subprocess.run(
            [
                *self._as,
                self._programs / "initdb",
                "-D",
                folder / "data",
                "-U",
                "tests",
                "-A",
                "trust",
                "--no-sync",
                "-E",
                "UTF8",
            ],
            capture_output=True,
            text=True,
            cwd=folder,
            check=False,
        )
        if made.returncode:
            raise Missing(f"initdb: {made.stderr.strip() or made.stdout.strip()}")
        self.start()

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://tests@/{database}?host={self._folder}"

    def database(self, name: str) -> str:
        """A new one; its URL."""
        import psycopg

        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type, unused-ignore]
        return self.url(name)

    def start(self) -> None:
        options = ["-k", self._folder, "-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=40"]
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [*self._as, self._programs / "postgres", "-D", self._folder / "data", *options],
                stdout=log,
                stderr=log,
                cwd=self._folder,
            )
        until = time.monotonic() + patience(START_S)
        while not self._answers():
            if time.monotonic() > until or self._process.poll() is not None:
                self.stop()
                raise Missing(f"postgres does not start: {(self._folder / 'log').read_text()[-500:]}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url(), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)  # ends the sessions too
        try:
            self._process.wait(START_S)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(START_S)


@contextmanager
def server() -> Iterator[Server]:
    """
    Raises:
        Missing: see there.
    """
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        raise Missing(f"psycopg cannot be imported: {error}") from None
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path has at most 107 characters
    running = None
    try:
        running = Server(folder)
        yield running
    finally:
        if running is not None:
            running.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path:
    """The folder of initdb and postgres: Debian's is not on the path."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name.split(".")[0]))[
        ::-1
    ]
    for place in places:
        if (place / "initdb").exists() and (place / "postgres").exists():
            return place
    raise Missing("no PostgreSQL: neither initdb on the path nor /usr/lib/postgresql/*/bin (Debian: postgresql)")


def _somebody_else(folder: Path) -> list[str]:
    """What makes a command another user's, where this is root, whom PostgreSQL refuses; the server ends with us."""
    if os.getuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        raise Missing("root may not run PostgreSQL, and there is no setpriv to become another user (util-linux)")
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        os.chown(folder, user.pw_uid, user.pw_gid)
        return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--pdeathsig=INT"]
    raise Missing("root may not run PostgreSQL, and there is no user postgres or nobody")
