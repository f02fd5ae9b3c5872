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
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.checkpoint import async_writer, atomic_dir, shard_file, writer_process
from acceleration.checkpoint.async_writer import BackgroundWriter
from acceleration.checkpoint.listing import candidates, leads_nowhere, misnamed, none_is_good
from acceleration.checkpoint.tensor_shards import Slices, TensorShards, slices_of
from acceleration.checkpoint.verify import AGREEING, Verifier, Wrong
from acceleration.distributed.agreement import cpu_group, from_main
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
        wrong: Wrong = lambda manifest: None,
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
        self._writer = BackgroundWriter() if in_background and async_writer.available() else None
        self._pending: _Pending | None = None
        # File names and plans travel over gloo also where tensors travel over nccl.
        self.group = cpu_group()
        self._verifier = Verifier(self.group, wrong)

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
            bad = self._verifier.damage(path)
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
            bad = self._verifier.damage(path)
            if bad is not None:
                raise ValueError(f"{path} is damaged ({bad})")
            return path
        found = self._newest_good(path / "checkpoints") or self._newest_good(path)
        if found is None:
            raise ValueError(f"{path}: no complete checkpoint there")
        return found

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
        size = torch.tensor(sum(t.numel() * t.element_size() for t in tensors.values()))
        dist.all_reduce(size, group=self.group)
        staged, problem = self.from_main(self._prepare(final, int(size)) if self._is_main else None)
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
        with WAITING.on(AGREEING):
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
        written: atomic_dir.Files = {}
        if pending.failed is None:
            try:
                result = self._writer.result() if self._writer is not None else self._written
                written = {shard_file.file_name(dist.get_rank()): result}
            except OSError as error:
                pending.failed = _explain(error)
        everyone: list[Any] = [None] * dist.get_world_size()
        with WAITING.on(AGREEING):
            dist.all_gather_object(everyone, (pending.failed, written), group=self.group)
        problem = next((failed for failed, _ in everyone if failed), None)
        if self._is_main:
            problem = self._commit(pending, problem, {n: about for _, files in everyone for n, about in files.items()})
        problem = self.from_main(problem)
        self._verifier.note(pending.final, problem is None)
        if problem is None:
            self._retire()
        self.failures = self.failures + 1 if problem else 0
        if problem and self.failures >= MAX_FAILURES:
            raise SaveError(f"{self.failures} checkpoints in a row could not be saved: {problem}")

    def from_main(self, value: Any) -> Any:
        """The main process's ``value``, on all."""
        return from_main(value, self.group, AGREEING)

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
        parts = map(shard_file.raw, tensors.values())  # one at a time
        self._written = writer_process.write(str(path), chain([shard_file.header(tensors)], parts))

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
                good += self._verifier.is_good(path)
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


def _explain(error: OSError) -> str:
    """In words that say what to look after."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"disk full ({os.strerror(error.errno)})"
    if error.errno in (errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV):
        return f"disk error ({os.strerror(error.errno)})"
    return str(error)
