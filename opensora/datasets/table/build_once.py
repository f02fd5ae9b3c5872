"""Folders that are built by one process of many and shared by all, and built anew where they are damaged."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from opensora.datasets.table.checksums import Damaged
from opensora.utils.console import announce
from opensora.utils.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows, where every process builds and the first one to finish wins
    fcntl = None  # type: ignore[assignment]


def build_once(target: Path, build: Callable[[Path], None], check: Callable[[Path], object] | None = None) -> Path:
    """``target``, complete: there already, or built now by whoever comes first while the others wait.

    Args:
        build: fills an empty folder beside ``target``, which is renamed when it returns.
        check: raises ``Damaged`` for a folder that must be built anew. Who does that says so; whoever has the old one
            mapped keeps it.

    Raises:
        UserError: the folder cannot be written.
    """
    if _fault(target, check) is None:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f".{target.name}.lock")):
            fault = _fault(target, check)
            if fault:
                announce(f"{target} is damaged ({fault}): building it anew", every_rank=True)
            if fault is not None:
                _build(target, build)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"data.index: {target.parent} cannot be written ({reason}), set data.index") from error
    return target


def _fault(target: Path, check: Callable[[Path], object] | None) -> str | None:
    """None: there and good; "": not there; else what is wrong with it."""
    if not os.path.lexists(target):
        return ""
    try:
        if check is not None:
            check(target)
    except Damaged as error:
        return error.problem
    return None


def _build(target: Path, build: Callable[[Path], None]) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        build(aside)
        aside.chmod(0o755)  # mkdtemp makes it readable by this user only
        if os.path.lexists(target):
            _remove(target)
        os.rename(aside, target)
    except OSError:
        if not target.exists():  # else another host built it meanwhile, where locks do not reach
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _remove(target: Path) -> None:
    """By one rename, so that nobody sees half of it."""
    grave = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        os.rename(target, grave / "damaged")
    finally:
        shutil.rmtree(grave, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Until the block ends no other process is in one with this path; freed by the system when a process dies."""
    with path.open("w") as file:
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks: as on Windows
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
