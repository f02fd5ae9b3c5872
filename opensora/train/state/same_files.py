"""That all machines of a run see the same files: one run folder, and the same table, clips, features and weights.

What one machine saves the others must find when the run is resumed, so the run's folder has to be one folder. The main
process locks it and leaves a token there (``owner.json``), which every process looks for.
"""

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from acceleration.distributed.agreement import cpu_group, from_main
from acceleration.distributed.peers import ranges
from acceleration.distributed.runtime import Runtime
from opensora.config.run import RunConfig
from opensora.datasets.decode.common import DecodeError
from opensora.datasets.loading import feature_store
from opensora.datasets.table.clip_storage import locate
from opensora.datasets.table.index import IndexedTable
from opensora.train.state.run_lock import OWNER, RunLock, read_owner
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files.file_system import LOCAL, file_system
from opensora.utils.files.safetensors_files import fingerprint

CACHED_S = 40.0  # for so long a client of a network file system may believe that a new file is not there (NFS: 30 s)
LOCAL_S = 1.0  # a disk of the machine itself needs no time
TELL_S = 5.0  # of waiting before a line says for what
LOOK_S = 0.2
ROUND_S = 1.0  # between two exchanges, so that ``parallel.timeout_s`` may be shorter than a wait
CLIPS = 16  # that are looked for on every machine


def take_folder(folder: Path, runtime: Runtime) -> RunLock | None:
    """The right to write in the run's folder, on the main process, once every process sees that folder. Collective.

    Raises:
        UserError: another run has it, or it is not one folder for all machines; the same line on every process.
    """
    if runtime.world_size == 1:
        return RunLock(folder)
    group = cpu_group()
    lock, token = _lock(folder, runtime, group)
    try:
        _check_seen(folder, token, runtime, group)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return lock


def _lock(folder: Path, runtime: Runtime, group: dist.ProcessGroup | None) -> tuple[RunLock | None, str]:
    """The main process's lock, and on all its token; it may wait for a sign of life of an earlier owner.

    Raises:
        UserError: the lock is refused; on every process.
    """
    taken: Future[RunLock] | None = None
    if runtime.is_main:
        taken = Future()
        threading.Thread(target=_run, args=(taken, RunLock, folder), name="run folder", daemon=True).start()
    while True:
        lock, refusal = _outcome(taken) if taken is not None else (None, "")
        try:
            own = lock.owner["token"] if lock else ""
            token, refusal = from_main((own, refusal), group, "whose the run's folder is")
        except BaseException:  # as where another process is gone
            if lock is not None:
                lock.release()
            raise
        if refusal:
            raise UserError(refusal)
        if token:
            return lock, token


def _run(result: "Future[RunLock]", call: Callable[[Path], RunLock], folder: Path) -> None:
    try:
        result.set_result(call(folder))
    except BaseException as error:
        result.set_exception(error)


def _outcome(taken: "Future[RunLock]") -> tuple[RunLock | None, str]:
    """The lock, or why it is refused; neither as long as that is open."""
    try:
        return taken.result(ROUND_S), ""
    except NotYet:
        return None, ""
    except UserError as error:
        return None, str(error)


def _check_seen(folder: Path, token: str, runtime: Runtime, group: dist.ProcessGroup | None) -> None:
    """
    Raises:
        UserError: some process does not see the token, however long a cache may hide it.
    """
    found: list[Any] = [None] * runtime.world_size
    begun, told = time.monotonic(), False
    while True:
        problem, waited = _missing(folder, token), time.monotonic() - begun
        told = told or (waited > TELL_S and problem != "" and runtime.local_rank == 0 and _tell(folder))
        patience_s = LOCAL_S if file_system(folder) in LOCAL else CACHED_S
        dist.all_gather_object(found, (socket.gethostname(), problem, waited <= patience_s), group=group)
        blind = [rank for rank, (_, problem, _) in enumerate(found) if problem]
        if not any(found[rank][2] for rank in blind):
            break
    if blind:
        hosts = ", ".join(dict.fromkeys(found[rank][0] for rank in blind))
        raise UserError(
            f"{folder}: not one folder for all machines: {hosts} (rank {ranges(blind)}) does not see what "
            f"{found[0][0]} (rank 0) has written there: {found[blind[0]][1]}; give a folder on storage that all "
            "machines share (output=...)"
        )


def _tell(folder: Path) -> bool:
    announce(f"{socket.gethostname()}: waiting for {folder / OWNER} to be seen here", every_rank=True)
    return True


def _missing(folder: Path, token: str) -> str:
    """Why ``token`` is not seen in the folder, in words; empty if it is. Looks for a while, as a cache may hide it."""
    deadline = time.monotonic() + ROUND_S
    while True:
        owner = read_owner(folder / OWNER)
        if owner is not None and owner["token"] == token:
            return ""
        if time.monotonic() >= deadline:
            state = "is not there" if owner is None else f"is of process {owner['pid']} on {owner['host']}"
            kind = file_system(folder) or "an unknown file system"
            return f"{OWNER} {state} ({folder.absolute()} is on {kind})"
        for place in (*reversed(folder.absolute().parents), folder):
            with suppress(OSError):
                os.listdir(place)  # makes a client of a network file system look again
        time.sleep(LOOK_S)


def content(cfg: RunConfig, table: IndexedTable) -> dict[str, str]:
    """By the key that names it, what every machine must have alike: a digest, or what is missing."""
    found = {f"the content of data.table={cfg.data.table}": table.content, "the clips of the table": _clips(cfg, table)}
    if cfg.data.features:
        name = f"the content of data.features={cfg.data.features}"
        found[name] = _digest(str(feature_store.read_manifest(Path(cfg.data.features))))
    weights = {"train.init_from": cfg.train.init_from, **_paths("vae", cfg.vae), **_paths("text", cfg.text)}
    weights |= _paths("image_encoder", cfg.image_encoder)
    found |= {f"the content of {key}={path}": fingerprint(path) for key, path in weights.items() if path}
    return found


def _clips(cfg: RunConfig, table: IndexedTable) -> str:
    """Digest of the sizes of some clips; which one is missing, if one is. Features stand for all of them."""
    if cfg.data.features:
        return "not read"
    sizes = []
    for row in sorted({index * (len(table) - 1) // (CLIPS - 1) for index in range(CLIPS)}):
        path = table.path(row)
        try:
            source = locate(path)
        except DecodeError as error:
            return f"no {path} ({error.cause})"
        sizes.append(source.size if source.size is not None else os.stat(source.file).st_size)
    return _digest(str(sizes))


def _paths(section: str, cfg: Any) -> dict[str, str]:
    """Keys of a section that name weights, and their values."""
    assert is_dataclass(cfg)
    names = [field.name for field in fields(cfg) if field.name == "path" or field.name.endswith("_path")]
    return {f"{section}.{name}": getattr(cfg, name) for name in names}


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
