"""Folders that are built by one process of many and shared by all."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from opensora.utils.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows, where every process builds and the first one to finish wins
    fcntl = None  # type: ignore[assignment]


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """``target``, complete: there already, or built now by whoever comes first while the others wait.

    Args:
        build: fills an empty folder beside ``target``, which is renamed when it returns.

    Raises:
        UserError: the folder cannot be written.
    """
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f".{target.name}.lock")):
            if not target.exists():
                _build(target, build)
    except PermissionError as error:
        raise UserError(f"data.index: {target.parent} cannot be written ({error.strerror}), set data.index") from error
    return target


def _build(target: Path, build: Callable[[Path], None]) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        build(aside)
        aside.chmod(0o755)  # mkdtemp makes it readable by this user only
        os.rename(aside, target)
    except OSError:
        if not target.exists():  # else another host built it meanwhile, where locks do not reach
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Until the block ends no other process is in one with this path; freed by the system when a process dies."""
    with path.open("w") as file:
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks: as on Windows
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
