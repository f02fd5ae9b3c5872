"""Whose a run's folder is, and whether anything is left to do in it.

Two live runs in one folder would remove each other's checkpoints. ``.lock`` is locked by ``flock``, which the kernel
gives up with the process however it dies, on one machine always and on most shared file systems between machines.
Where that cannot be relied on, ``owner.json`` decides: its owner counts in it every few seconds, and one whose count
stands still is dead. Waiting is measured on this process's monotonic clock only: machines need not agree on the time.
"""

import contextlib
import errno
import fcntl
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from acceleration.diagnostics import links
from acceleration.distributed.launcher_variables import restart_count
from acceleration.files.atomic_write import kind_of, read_small, replacing
from acceleration.files.sealed_json import COUNT, FLAG, NULL, TEXT, Shape, seal, unseal
from opensora.config.load import save
from opensora.config.run import SAVED_NAME, RunConfig
from opensora.config.strict_yaml import read_yaml
from opensora.models.weights.adapter_names import CONFIG, WEIGHTS
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files import digests
from opensora.utils.files.safetensors_files import INDEX, SINGLE
from opensora.utils.files.untrusted import short
from opensora.utils.metrics_log import METRICS_NAME, WANDB_ID_NAME

DONE = "DONE"  # in the folder of a run that is finished
LOCK, OWNER = ".lock", "owner.json"
OWNER_BYTES = 1024  # overwritten in place, so that a full disk does not look like a dead owner
BEAT_S = 5.0
REREAD_S = 0.05  # between two looks at a file that may be in the middle of a write
STALE_S = 30.0  # an owner that did not count for so long is dead
FILES = (LOCK, OWNER, DONE, SAVED_NAME, METRICS_NAME, WANDB_ID_NAME, links.NAME)  # what a run writes in its folder
# What an export is renamed over, at the very end of a run; numbered files of large models are looked up.
EXPORTED = (SINGLE, INDEX, WEIGHTS, CONFIG, SAVED_NAME, digests.NAME)
FOLDERS = ("checkpoints", "exported", "hangs", "jobs", "samples", "tensorboard", "unreadable")
_DONE: Shape = {"steps": COUNT, "exported": FLAG}
_OWNER: Shape = {
    **dict.fromkeys(("token", "host", "machine", "since"), TEXT),
    **dict.fromkeys(("beat", "pid", "attempt"), COUNT),
    **dict.fromkeys(("started", "job"), (TEXT, NULL)),
}
LOST = 1  # exit code of a process whose run another one has taken over


class RunLock:
    """The right to write in a run's folder, from ``__init__`` to ``release``. One process of a run holds it."""

    def __init__(
        self,
        folder: Path,
        *,
        env: Mapping[str, str] = os.environ,
        beat_s: float = BEAT_S,
        stale_s: float = STALE_S,
        lock: Callable[[int, int], None] = fcntl.flock,
        lost: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            lock: ``flock``, or what stands for it in a test.
            lost: told that another process took the folder over; by default this one then ends at once.

        Raises:
            UserError: a live run holds the folder; says which.
        """
        self.path, self._stale_s, self._beat_s = folder / OWNER, stale_s, beat_s
        self._lost = lost or _leave
        self.owner: dict[str, Any] = identity(env)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
        except OSError as error:
            where = f"output: {short(folder / LOCK, 200)} cannot be written ({error.strerror})"
            raise UserError(f"{where}; move away what is there, or choose another output") from None
        try:
            self._take(folder, lock)
        except BaseException as error:
            os.close(self._file)
            if isinstance(error, OSError):
                raise UserError(f"{self.path}: cannot be written ({error.strerror}); move it away") from None
            raise
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def _take(self, folder: Path, lock: Callable[[int, int], None]) -> None:
        deadline = time.monotonic() + self._stale_s
        while (locked := _try(lock, self._file)) is False:
            holder = read_owner(self.path)
            # An earlier attempt of the same job is on its way out.
            if holder is None or not _follows(self.owner, holder) or time.monotonic() > deadline:
                raise UserError(_refusal(folder, holder))
            time.sleep(0.2)
        holder = read_owner(self.path)
        if holder is None and os.path.lexists(self.path) and self._lives_on():
            raise UserError(_refusal(folder, read_owner(self.path)))
        if holder is not None and not self._is_over(holder, locked):
            raise UserError(_refusal(folder, holder))
        _write(self.path, self.owner)
        if locked is None:
            # Without a kernel's help two may have written: the last one has it, and all wait long enough to see that.
            time.sleep(min(1.0, self._beat_s))
            holder = read_owner(self.path)
            if holder is not None and holder["token"] != self.owner["token"]:
                raise UserError(_refusal(folder, holder))

    def _is_over(self, holder: dict[str, Any], locked: bool | None) -> bool:
        """Whether the process that wrote ``holder`` is gone; waits for a sign of life where nothing else tells."""
        if _follows(self.owner, holder):
            return True  # SLURM ended that attempt, or its node is lost
        if holder["machine"] == self.owner["machine"]:
            if locked:
                return True
            if _started(holder["pid"]) == holder["started"]:
                return False  # where it differs the process may still live, unseen, in another container
        announce(
            f"{self.path}: {describe(holder)} was here last; waiting up to {self._stale_s:.0f} s for a sign of life"
        )
        deadline = time.monotonic() + self._stale_s
        while time.monotonic() < deadline:
            time.sleep(min(0.5, self._beat_s))
            now = read_owner(self.path)
            if now is None and not os.path.lexists(self.path):
                return True
            if now is not None and (now["token"], now["beat"]) != (holder["token"], holder["beat"]):
                return False
        return True

    def _lives_on(self) -> bool:
        """Whether somebody writes a file that cannot be read, as a live owner does every few seconds."""
        announce(
            f"{self.path}: damaged, so nobody knows whose the folder is; waiting {self._stale_s:.0f} s for a sign of "
            "life, then it is written anew"
        )
        before, deadline = _content(self.path), time.monotonic() + self._stale_s
        while time.monotonic() < deadline:
            time.sleep(min(0.5, self._beat_s))
            if _content(self.path) != before:
                return True
        return False

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            holder = read_owner(self.path)
            if holder is not None and holder["token"] != self.owner["token"]:
                self._lost(f"{self.path}: taken over by {describe(holder)}; this process ends without saving")
                return
            self.owner["beat"] += 1
            try:
                _write(self.path, self.owner)
            except OSError as error:
                announce(f"{self.path}: cannot be written ({error.strerror})", level=logging.WARNING)

    def release(self) -> None:
        """Give the folder up; safe to call twice."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        holder = read_owner(self.path)
        if holder is not None and holder["token"] == self.owner["token"]:
            self.path.unlink(missing_ok=True)
        os.close(self._file)


def identity(env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What an owner says of itself."""
    return {
        "token": uuid.uuid4().hex,
        "beat": 0,
        "host": platform.node(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "job": env.get("SLURM_JOB_ID"),
        "attempt": restart_count(env),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def describe(owner: Mapping[str, Any]) -> str:
    """An owner in a few words."""
    job = f", SLURM job {owner['job']} attempt {owner['attempt']}" if owner["job"] else ""
    return f"process {owner['pid']} on {owner['host']}{job}, since {owner['since']}"


def read_owner(path: Path) -> dict[str, Any] | None:
    """Who wrote ``owner.json`` last; None if nobody, or it is damaged."""
    for _ in range(3):  # a reader may come in the middle of a write
        try:
            return unseal(read_small(path).rstrip(b" "), ValueError, _OWNER)
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            time.sleep(REREAD_S)
    return None


def _content(path: Path) -> bytes | None:
    try:
        return read_small(path)
    except OSError:
        return None


def check_places(folder: Path) -> None:
    """That nothing of another kind is where a run writes a file or a folder: a folder, a pipe, a file.

    Raises:
        UserError: there is, with its name.
    """
    exported = {f"exported/{name}" for name in EXPORTED}
    with contextlib.suppress(OSError):  # said below
        exported |= {f"exported/{path.name}" for path in (folder / "exported").glob("*.safetensors")}
    for wanted, names in (("a folder", FOLDERS), ("a file", (*FILES, *sorted(exported)))):
        for name in names:
            try:
                found = kind_of((folder / name).stat().st_mode)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                where = f"output: {short(folder / name, 200)}: {error.strerror}"
                raise UserError(f"{where}; choose another output, or move it away: the run makes its own") from None
            if found != wanted:
                raise UserError(f"{folder / name}: {found}, must be {wanted}; move it away, the run makes its own")


def write_config(cfg: RunConfig) -> None:
    """Keep the configuration in the run's folder, for sampling and for people; what was there before is replaced, and
    is said to be damaged if it is. One process calls this."""
    path = cfg.folder / SAVED_NAME
    try:
        if path.is_file():  # anything else is refused by ``check_places``
            read_yaml(path)
    except UserError as error:
        announce(f"{error}: damaged, and written anew")
    save(cfg, path)


def write_done(cfg: RunConfig) -> None:
    """Say in the run's folder that it is finished. One process calls this, after all else is written."""
    with replacing(cfg.folder / DONE) as file:
        file.write(seal({"steps": cfg.train.steps, "exported": cfg.train.export}).encode())


def finished(cfg: RunConfig) -> bool:
    """Whether the run already did all that ``cfg`` asks for. More steps than then, or an export, are still to do."""
    path = cfg.folder / DONE
    if cfg.train.resume != "auto" or not os.path.lexists(path):
        return False
    try:
        done = unseal(read_small(path), ValueError, _DONE)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        if path.is_file() or isinstance(error, FileNotFoundError):  # else ``check_places`` refuses to start
            announce(f"{path}: damaged ({reason}); the run goes on from its newest checkpoint, and writes it anew")
        return False
    return bool(done["steps"] >= cfg.train.steps and (done["exported"] or not cfg.train.export))


def _follows(mine: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether I am a later attempt of the same SLURM job."""
    return mine["job"] is not None and mine["job"] == other["job"] and mine["attempt"] > other["attempt"]


def _refusal(folder: Path, holder: Mapping[str, Any] | None) -> str:
    who = describe(holder) if holder else "a process that is just starting"
    return f"{folder}: in use by {who}; end that run first, or give this one another name"


def _try(lock: Callable[[int, int], None], file: int) -> bool | None:
    """True: locked; False: another process has it; None: this file system has no such locks."""
    try:
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _write(path: Path, owner: Mapping[str, Any]) -> None:
    """In place and closed at once: what shared file systems show to others is what was written before a close."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o666)
    try:
        os.pwrite(handle, seal(owner).encode().ljust(OWNER_BYTES), 0)
        os.ftruncate(handle, OWNER_BYTES)  # what damage had made longer
        os.fsync(handle)
    finally:
        os.close(handle)


def _machine() -> str:
    """The running kernel, which containers of one machine share; two boots differ."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _started(pid: int) -> str | None:
    """When a process of this machine began, so that a number given out again is not taken for the old one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _leave(message: str) -> None:
    announce(f"error: {message}", level=logging.ERROR)
    os._exit(LOST)
