"""Saving every so often, finding the newest checkpoint that verifies, keeping the last few.

No pointer file decides: the newest step directory whose bytes are those that were written is the latest. Rank 0 looks,
all read their share of the bytes, and all load the same one. A save that fails (a full disk) leaves what was there
before, and training goes on, a few times.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.checkpoint import async_writer, atomic_dir, shard_file, writer_process
from acceleration.checkpoint.async_writer import BackgroundWriter
from acceleration.checkpoint.listing import candidates, leads_nowhere, misnamed, none_is_good
from acceleration.checkpoint.tensor_shards import Slices, TensorShards, slices_of
from acceleration.distributed.comm_timer import WAITING
from acceleration.files.sealed_json import NUMBER

MAX_FAILURES = 3  # saves in a row that may fail before the run stops
Report = Callable[[str], None]


class SaveError(Exception):
    """A checkpoint could not be written; those before it are as they were."""


@dataclass
class _Pending:
    """A save between its start and its commit."""

    staged: Path
    final: Path
    info: dict[str, Any]
    failed: str | None = None  # why this process could not even begin
    started: float = field(default_factory=time.monotonic)


class CheckpointManager:
    """The checkpoints of one run. Every method is collective, but ``close``."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        *,
        in_background: bool = False,
        report: Report = lambda text: None,
        wrong: Callable[[Mapping[str, Any]], str | None] = lambda manifest: None,
    ) -> None:
        """
        Args:
            keep: how many checkpoints stay (0: all), counted among those that verify; older ones go after a newer
                one is committed.
            in_background: another process writes while training goes on; ``poll`` commits.
            report: told what a person should read; on rank 0 only.
            wrong: what is wrong with the ``info`` that a manifest holds, if anything: then it is damaged.
        """
        self.folder = folder
        self.keep = keep
        self.failures = 0  # in a row
        self._report = report
        self._wrong = wrong
        self._writer = BackgroundWriter() if in_background and async_writer.available() else None
        self._pending: _Pending | None = None
        self._verified: dict[Path, bool] = {}  # what this run has written or read, so that it is read once
        # File names and plans travel over gloo also where tensors travel over nccl.
        self.group = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None

    @property
    def _is_main(self) -> bool:
        return dist.get_rank() == 0

    def latest(self) -> Path | None:
        """The newest checkpoint whose bytes are what was written, None if there is none; damaged ones are reported.

        Raises:
            ValueError: there are step directories but none is good: starting from zero would lose the run.
        """
        return self._newest_good(self.folder)

    def _newest_good(self, folder: Path) -> Path | None:
        steps: list[Path] = self.from_main(candidates(folder) if self._is_main else None)
        odd: list[Path] = self.from_main(misnamed(folder) if self._is_main else None)
        for path in odd if self._is_main else []:
            unlike = f"not the name of a checkpoint, which is as {atomic_dir.step_name(8)}"
            self._report(f"{path}: {'a link that leads nowhere' if leads_nowhere(path) else unlike}: passed over")
        for path in reversed(steps):
            bad = self._damaged(path)
            if bad is None:
                return path
            if self._is_main:
                self._report(f"{path} is damaged ({bad}): looking for an older one")
        if steps or odd:
            raise ValueError(none_is_good(folder))
        return None

    def named(self, path: Path) -> Path:
        """``path``, or the newest checkpoint in it if it is a folder of checkpoints or of a run.

        Raises:
            ValueError: no good checkpoint there.
        """
        if self.from_main((path / atomic_dir.MANIFEST).is_file()):
            bad = self._damaged(path)
            if bad is not None:
                raise ValueError(f"{path} is damaged ({bad})")
            return path
        found = self._newest_good(path / "checkpoints") or self._newest_good(path)
        if found is None:
            raise ValueError(f"{path}: no complete checkpoint there")
        return found

    def _damaged(self, path: Path) -> str | None:
        """What is damaged in a checkpoint, if anything; every process reads its share of the bytes. Collective."""
        manifest, bad = self.from_main(self._read(path) if self._is_main else None)
        if bad is None:
            bad = self._differs(path, manifest) or self._incomplete(path, manifest)
        self._verified[path] = bad is None
        return bad

    def _read(self, path: Path) -> tuple[dict[str, Any], str | None]:
        """(manifest, what is wrong with it)."""
        try:
            manifest = atomic_dir.manifest_of(path)
        except ValueError as error:
            return {}, str(error)
        lacking = [f"{part} is missing" for part in ("tensors", "values") if part not in manifest]
        wrong = next(iter(lacking), None) or self._wrong(manifest)
        return manifest, f"{atomic_dir.MANIFEST}: {wrong}" if wrong else None

    def _mine(self, manifest: dict[str, Any]) -> list[str]:
        return sorted(manifest["files"])[dist.get_rank() :: dist.get_world_size()]

    def _differs(self, path: Path, manifest: dict[str, Any]) -> str | None:
        names = self._mine(manifest)
        return self._first(atomic_dir.damaged(path, {name: manifest["files"][name] for name in names}))

    def _incomplete(self, path: Path, manifest: dict[str, Any]) -> str | None:
        """Whether the files hold other tensors than the manifest says, or parts of them. Collective."""
        tensors, problem = manifest["tensors"], None
        counts: dict[str, int] = {}
        for name in self._mine(manifest):
            try:
                for key, count in shard_file.counted(path / name, tensors).items():
                    counts[key] = counts.get(key, 0) + count
            except ValueError as error:
                problem = problem or str(error)
        problem = self._first(problem)
        if problem is None:
            held = torch.tensor([counts.get(key, 0) for key in tensors], dtype=torch.int64)
            dist.all_reduce(held, group=self.group)
            for (key, (_, sizes)), count in zip(tensors.items(), held.tolist(), strict=True):
                if count != prod(sizes):
                    return f"{atomic_dir.MANIFEST}: tensors.{key[:99]!r}: {sizes}, and the files hold {count} elements"
        return problem

    def _first(self, mine: str | None) -> str | None:
        """What the first process with something to say says. Collective."""
        everyone: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine, group=self.group)
        return next((one for one in everyone if one is not None), None)

    def save(self, step: int, state: Mapping[str, Mapping[str, Any]], info: Mapping[str, Any]) -> None:
        """Write ``state`` as the checkpoint after ``step`` updates; ``info`` (JSON) goes into the manifest.

        In the background the state is copied when this returns; otherwise it is committed.

        Raises:
            SaveError: ``MAX_FAILURES`` saves in a row failed.
        """
        self.wait()  # for one that is still being written
        held, values = self._described(state)
        tensors = shard_file.to_write(held)
        described = {key: [shard_file.DTYPES[one.dtype], list(one.shape)] for key, one in held.items()}
        final = self.folder / atomic_dir.step_name(step)
        size = self._total_bytes(tensors)
        staged, problem = self.from_main(self._prepare(final, size) if self._is_main else None)
        pending = _Pending(staged, final, {"step": step, **info, "tensors": described, "values": values}, problem)
        self._pending = pending
        if problem is None:
            try:
                self._write(staged / shard_file.file_name(dist.get_rank()), tensors)
            except OSError as error:
                pending.failed = _explain(error)
        if self._writer is None:
            self.wait()

    def poll(self) -> None:
        """Commit a save that every process has finished writing. Cheap when there is none.

        Raises:
            SaveError: see ``save``.
        """
        if self._pending is None or self._writer is None:
            return
        ready = torch.tensor(int(self._pending.failed is not None or self._writer.ready()))
        with WAITING.on("agreement on a checkpoint"):
            dist.all_reduce(ready, op=dist.ReduceOp.MIN, group=self.group)
        if ready:
            self.wait()

    def wait(self) -> None:
        """Commit the save that is under way, if any.

        Raises:
            SaveError: see ``save``.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        written: dict[str, Any] = {}
        if pending.failed is None:
            try:
                written = self._finish(pending)
            except OSError as error:
                pending.failed = _explain(error)
        everyone: list[Any] = [None] * dist.get_world_size()
        with WAITING.on("agreement on a checkpoint"):
            dist.all_gather_object(everyone, (pending.failed, written), group=self.group)
        problem = next((failed for failed, _ in everyone if failed), None)
        if self._is_main:
            problem = self._commit(pending, problem, {n: about for _, files in everyone for n, about in files.items()})
        problem = self.from_main(problem)
        self._verified[pending.final] = problem is None  # each file was read back by its writer
        if problem is None:
            self._retire()
        self.failures = self.failures + 1 if problem else 0
        if problem and self.failures >= MAX_FAILURES:
            raise SaveError(f"{self.failures} checkpoints in a row could not be saved: {problem}")

    def from_main(self, value: Any) -> Any:
        """The main process's ``value``, on all."""
        box = [value]
        with WAITING.on("agreement on a checkpoint"):
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def close(self) -> None:
        """End the process that writes."""
        if self._writer is not None:
            self._writer.close()

    def has(self, path: Path, section: str) -> bool:
        """Whether the checkpoint holds ``section``, a top-level key of the state that was saved."""
        return any(key.startswith(f"{section}.") for key in self.manifest(path)["tensors"])

    def manifest(self, path: Path) -> dict[str, Any]:
        """What ``save`` was told of this checkpoint, with its step.

        Raises:
            ValueError: it is not complete (any more).
        """
        try:
            return atomic_dir.manifest_of(path)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error})") from None

    def load(self, path: Path, state: dict[str, dict[str, Any]]) -> None:
        """Fill ``state`` in place from ``path``: tensors as they stand, other values by assignment.

        Keys of the checkpoint that ``state`` does not name are left alone.

        Raises:
            ValueError: a key that the checkpoint lacks, or a tensor of another shape.
        """
        manifest = self.manifest(path)
        held, values = self._described(state)
        for key, one in held.items():
            found = manifest["tensors"].get(key)
            if found is None:
                raise ValueError(f"{path}: has no {key}")
            if tuple(found[1]) != one.shape:
                raise ValueError(f"{path}: {key} is {tuple(found[1])} there and {one.shape} here")
        for key, value in values.items():
            if key not in manifest["values"]:
                raise ValueError(f"{path}: has no {key}")
            if not _alike(manifest["values"][key], value):
                found = json.dumps(manifest["values"][key])[:60]
                raise ValueError(f"{path}: {key} is {found} there and {json.dumps(value)} here")
        shard_file.read([path / name for name in manifest["files"]], held)
        for section, entries in state.items():
            for name, old in entries.items():
                if not isinstance(old, Tensor | TensorShards):
                    value = manifest["values"][f"{section}.{name}"]
                    entries[name] = tuple(value) if isinstance(old, tuple) else value

    def _described(self, state: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Slices], dict[str, Any]]:
        """(tensors, other values) of a state, by ``section.name``."""
        held: dict[str, Slices] = {}
        values: dict[str, Any] = {}
        for section, entries in state.items():
            for name, value in entries.items():
                if isinstance(value, Tensor | TensorShards):
                    held[f"{section}.{name}"] = slices_of(value)
                else:
                    values[f"{section}.{name}"] = value
        return held, values

    def _total_bytes(self, tensors: Mapping[str, Tensor]) -> int:
        size = torch.tensor(sum(t.numel() * t.element_size() for t in tensors.values()))
        dist.all_reduce(size, group=self.group)
        return int(size)

    def _prepare(self, final: Path, size: int) -> tuple[Path, str | None]:
        """(staging directory, why there is none). Main process only."""
        try:
            atomic_dir.remove_stale(self.folder)
            staged = atomic_dir.stage(self.folder, final.name)
            free = shutil.disk_usage(self.folder).free
            if free < size:
                shutil.rmtree(staged, ignore_errors=True)
                return staged, f"disk full: {self.folder} has {free / 1e9:.3g} GB left, {size / 1e9:.3g} are needed"
        except OSError as error:
            return self.folder, _explain(error)
        return staged, None

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        if self._writer is not None:
            self._writer.start(path, tensors)
            return
        parts = (part for tensor in tensors.values() for part in [shard_file.raw(tensor)])
        self._written = writer_process.write(str(path), _chain(shard_file.header(tensors), parts))

    def _finish(self, pending: _Pending) -> atomic_dir.Files:
        written = self._writer.result() if self._writer is not None else self._written
        return {shard_file.file_name(dist.get_rank()): written}

    def _commit(self, pending: _Pending, problem: str | None, files: atomic_dir.Files) -> str | None:
        """Why there is no checkpoint, or None. Main process only."""
        if problem is None:
            try:
                atomic_dir.commit(pending.staged, pending.final, pending.info, files)
            except OSError as error:
                problem = _explain(error)
        if problem is None:
            self._report(f"step {pending.info['step']}: saved {pending.final}")
            return None
        if pending.staged.name.startswith(atomic_dir.STAGING):
            shutil.rmtree(pending.staged, ignore_errors=True)
        left = MAX_FAILURES - self.failures - 1
        self._report(f"step {pending.info['step']}: NOT SAVED, {problem}; the run goes on, {left} more may fail")
        return problem

    def _retire(self) -> None:
        """Remove what is older than the newest ``keep`` checkpoints that verify. Collective.

        What fails here fails no save: it is said, and tried again after the next one.
        """
        steps: list[Path] = self.from_main(self._said(candidates, self.folder) if self._is_main else None) or []
        if not self.keep or len(steps) <= self.keep:
            return
        good = 0
        for path in reversed(steps):
            if good < self.keep:
                good += self._verified[path] if path in self._verified else self._damaged(path) is None
            elif self._is_main:
                self._said(atomic_dir.remove, path)

    def _said(self, function: Callable[[Path], Any], path: Path) -> Any:
        """``function(path)``, or None after a line on why it failed."""
        try:
            return function(path)
        except OSError as error:
            self._report(f"{path}: older checkpoints could not be removed, {_explain(error)}")
            return None


def _alike(found: Any, held: Any) -> bool:
    """Whether a JSON value can take the place of one that the state holds: a number of a number, a list of a tuple."""
    if isinstance(held, (list, tuple)):
        return isinstance(found, list) and len(found) == len(held) and all(map(_alike, found, held))
    if held is None or isinstance(held, bool):  # null stands for a switch that nobody set
        return found is None or isinstance(found, bool)
    if isinstance(held, (int, float)):
        return NUMBER.test(found)
    return isinstance(found, type(held))


def _chain(first: bytes, rest: Any) -> Any:
    yield first
    yield from rest


def _explain(error: OSError) -> str:
    """In words that say what to look after."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"disk full ({os.strerror(error.errno)})"
    if error.errno in (errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV):
        return f"disk error ({os.strerror(error.errno)})"
    return str(error)
