"""Whether a checkpoint is what was written: every process reads its share of the bytes, all come to the same answer."""

from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from acceleration.checkpoint import atomic_dir, shard_file
from acceleration.distributed.agreement import from_main

AGREEING = "agreement on a checkpoint"  # what all wait for, in the report of a hang
Wrong = Callable[[Mapping[str, Any]], str | None]


class Verifier:
    """Looks for damage in checkpoints. Its methods but ``note`` are collective."""

    def __init__(self, group: dist.ProcessGroup | None, wrong: Wrong) -> None:
        """
        Args:
            group: of CPU tensors; None where the default one is.
            wrong: what is wrong with the ``info`` that a manifest holds, if anything: then it is damaged.
        """
        self._group = group
        self._wrong = wrong
        self._found: dict[Path, bool] = {}  # good or not, of what this run has written or read

    def note(self, path: Path, good: bool) -> None:
        """This run has written ``path``, and each file was read back by its writer: it need not be read again."""
        self._found[path] = good

    def is_good(self, path: Path) -> bool:
        """Whether nothing is damaged; read once."""
        return self._found[path] if path in self._found else self.damage(path) is None

    def damage(self, path: Path) -> str | None:
        """What is damaged in a checkpoint, if anything."""
        manifest, bad = from_main(self._manifest(path) if dist.get_rank() == 0 else None, self._group, AGREEING)
        if bad is None:
            names = sorted(manifest["files"])[dist.get_rank() :: dist.get_world_size()]  # this process's share
            bad = self._first(atomic_dir.damaged(path, {name: manifest["files"][name] for name in names}))
            bad = bad or self._incomplete(path, names, manifest["tensors"])
        self._found[path] = bad is None
        return bad

    def _manifest(self, path: Path) -> tuple[dict[str, Any], str | None]:
        """(manifest, what is wrong with it)."""
        try:
            manifest = atomic_dir.manifest_of(path)
        except ValueError as error:
            return {}, str(error)
        lacking = [f"{part} is missing" for part in ("tensors", "values") if part not in manifest]
        wrong = next(iter(lacking), None) or self._wrong(manifest)
        return manifest, f"{atomic_dir.MANIFEST}: {wrong}" if wrong else None

    def _incomplete(self, path: Path, names: list[str], tensors: Mapping[str, Any]) -> str | None:
        """Whether the files hold other tensors than the manifest says, or parts of them."""
        counts, problem = Counter[str](), None
        for name in names:
            try:
                counts.update(shard_file.counted(path / name, tensors))
            except ValueError as error:
                problem = problem or str(error)
        problem = self._first(problem)
        if problem is None:
            held = torch.tensor([counts[key] for key in tensors], dtype=torch.int64)
            dist.all_reduce(held, group=self._group)
            for (key, (_, sizes)), count in zip(tensors.items(), held.tolist(), strict=True):
                if count != prod(sizes):
                    return f"{atomic_dir.MANIFEST}: tensors.{key[:99]!r}: {sizes}, and the files hold {count} elements"
        return problem

    def _first(self, problem: str | None) -> str | None:
        """The problem of the first process that has one."""
        everyone: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, problem, group=self._group)
        return next((one for one in everyone if one is not None), None)
