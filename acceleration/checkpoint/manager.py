"""Saving every so often, finding the newest complete checkpoint, keeping the last few.

No pointer file decides: the newest complete step directory is the latest. Rank 0 looks and tells the others, so that
all processes load the same one. Tensors are sharded by torch.distributed.checkpoint and can be loaded by any layout.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from acceleration.checkpoint import storage

PREFIX = "step-"


def steps_in(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder``, oldest first."""
    return [p for p in sorted(folder.glob(f"{PREFIX}*")) if storage.read_manifest(p) is not None]


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``.

    Raises:
        ValueError: there are step directories but none is complete: starting from zero would lose the run.
    """
    complete = steps_in(folder)
    if not complete and any(folder.glob(f"{PREFIX}*")):
        raise ValueError(f"{folder}: no checkpoint is complete; move the damaged {PREFIX}* folders away to start anew")
    return complete[-1] if complete else None


def _complete(path: Path) -> Path:
    if storage.read_manifest(path) is not None:
        return path
    found = newest(path / "checkpoints") or newest(path)
    if found is None:
        raise ValueError(f"{path}: no complete checkpoint there")
    return found


class CheckpointManager:
    """The checkpoints of one run. Every method is collective."""

    def __init__(self, folder: Path, keep: int) -> None:
        """``keep``: how many complete checkpoints stay (0: all); the oldest go after a newer one is complete."""
        self.folder = folder
        self.keep = keep
        # File names and plans travel over gloo also where tensors travel over nccl.
        self.group = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None

    @property
    def _is_main(self) -> bool:
        return dist.get_rank() == 0

    def latest(self) -> Path | None:
        """The newest complete checkpoint, None if there is none; the same answer on every process.

        Raises:
            ValueError: see ``newest``.
        """
        return self._asked_of_main(newest, self.folder)

    def named(self, path: Path) -> Path:
        """``path``, or the newest checkpoint in it if it is a folder of checkpoints or of a run.

        Raises:
            ValueError: no complete checkpoint there.
        """
        return self._asked_of_main(_complete, path)

    def save(self, step: int, state: dict[str, Any], info: dict[str, Any]) -> Path:
        """Write ``state`` as the checkpoint after ``step`` updates; ``info`` (JSON) goes into the manifest."""
        final = self.folder / f"{PREFIX}{step:08d}"
        if self._is_main:
            storage.remove_stale(self.folder)
        staged = self._from_main(storage.stage(self.folder, final.name) if self._is_main else None)
        dcp.save(state, storage_writer=dcp.FileSystemWriter(staged, sync_files=True), process_group=self.group)
        dist.barrier(group=self.group)
        if self._is_main:
            storage.commit(staged, final, {"step": step, **info})
            for old in steps_in(self.folder)[: -self.keep] if self.keep else []:
                shutil.rmtree(old)
        dist.barrier(group=self.group)
        return final

    def has(self, path: Path, section: str) -> bool:
        """Whether the checkpoint holds ``section``, a top-level key of the state that was saved."""
        keys = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        return any(key.startswith(f"{section}.") for key in keys)

    def manifest(self, path: Path) -> dict[str, Any]:
        """What ``save`` was told of this checkpoint, with its step."""
        manifest = storage.read_manifest(path)
        assert manifest is not None, path
        return manifest

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Fill the tensors of ``state`` in place from ``path``.

        Keys of the checkpoint that ``state`` does not name are left alone; a key that the checkpoint lacks raises.
        """
        dcp.load(state, storage_reader=dcp.FileSystemReader(path), process_group=self.group)

    def _asked_of_main(self, question: Callable[[Path], Any], path: Path) -> Any:
        answer: Any = None
        if self._is_main:
            try:
                answer = question(path)
            except ValueError as error:
                answer = error
        answer = self._from_main(answer)
        if isinstance(answer, ValueError):
            raise answer
        return answer

    def _from_main(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]
