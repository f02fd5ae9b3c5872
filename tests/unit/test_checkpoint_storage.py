"""What must be on the disk before a checkpoint may be called one."""

import errno
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from acceleration.checkpoint import atomic_dir, listing, writer_process
from acceleration.checkpoint.async_writer import BackgroundWriter


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(what, name) of every flush and rename, in order."""
    seen: list[tuple[str, str]] = []
    flush, rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        seen.append(("flush", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        flush(handle)

    def renamed(source: Path, target: Path) -> None:
        seen.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", renamed)
    return seen


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files are read from /proc")
def test_everything_is_flushed_before_the_rename_and_the_rename_after(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    staged = atomic_dir.stage(tmp_path / "checkpoints", "step-00000001")
    written = writer_process.write(str(staged / "shard"), [b"abc", memoryview(b"defg")])
    assert written["size"] == 7 and (staged / "shard").read_bytes() == b"abcdefg"
    atomic_dir.commit(staged, tmp_path / "checkpoints/step-00000001", {"step": 1}, {"shard": written})
    assert calls == [
        ("flush", "shard"),
        ("flush", atomic_dir.MANIFEST),
        ("flush", staged.name),
        ("rename", "step-00000001"),
        ("flush", "checkpoints"),
    ]


def test_what_is_read_back_must_be_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_process, "digest_of", lambda path: "0" * 64)
    with pytest.raises(OSError, match="not what was written"):
        writer_process.write(str(tmp_path / "shard"), [b"abc"])


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest"])
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    staged = atomic_dir.stage(tmp_path, "step-00000001")
    written = writer_process.write(str(staged / "shard"), [bytes(1000)])
    final = tmp_path / "step-00000001"
    atomic_dir.commit(staged, final, {"step": 1}, {"shard": written})
    manifest = atomic_dir.read_manifest(final)
    assert manifest is not None and atomic_dir.damaged(final, manifest["files"]) is None
    shard, about = final / "shard", final / atomic_dir.MANIFEST
    if damage == "flip":
        shard.write_bytes(bytes(500) + b"\1" + bytes(499))
        assert atomic_dir.damaged(final, manifest["files"]) == "shard"
        return
    if damage == "cut":
        shard.write_bytes(bytes(999))
    elif damage == "missing":
        shard.unlink()
    else:
        about.write_text(about.read_text().replace('"step": 1', '"step": 2'))
    assert atomic_dir.read_manifest(final) is None


# What asks a run to stop.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())


def test_the_process_that_writes_is_out_of_reach_of_signals(tmp_path: Path) -> None:
    """SLURM sends a signal to every process of a step, whatever group it is in."""
    writing, others = BackgroundWriter(), children()
    try:
        writing.start(tmp_path / "first", {"x": torch.zeros(10)})
        writing.result()
        (pid,) = children() - others
        for number in SIGNALS:
            os.kill(int(pid), number)
        writing.start(tmp_path / "second", {"x": torch.ones(10)})
        assert writing.result()["size"] == (tmp_path / "second").stat().st_size
        assert children() - others == {pid}  # one that died would have been replaced
    finally:
        writing.close()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_folder_that_cannot_be_listed_is_no_folder_without_checkpoints(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run would begin anew, and export over what it had."""

    def forbidden(path: Any = ".") -> list[str]:
        raise OSError(number, os.strerror(number), str(path))

    assert listing.candidates(tmp_path) == [] and listing.newest(tmp_path / "nowhere") is None
    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, forbidden)
    for look in (listing.candidates, listing.misnamed, listing.newest, listing.steps_in):
        with pytest.raises(OSError, match=re.escape(str(tmp_path))) as caught:
            look(tmp_path)
        assert caught.value.errno == number
