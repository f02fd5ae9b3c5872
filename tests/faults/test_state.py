"""A checkpoint holds all that a run is: whatever is left out of it is missed, by name or in the numbers."""

import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from acceleration.checkpoint import CheckpointManager, atomic_dir, shard_file
from acceleration.config import ParallelConfig
from tests.dist.harness import run_distributed
from tests.dist.layouts import FP64
from tests.dist.test_checkpoint import build, everything, run_steps
from tests.faults.conftest import Tally

ONE = ParallelConfig(zero=0, precision=FP64)
SAVED, END = 2, 3
NAME = f"step-{SAVED:08d}"
ITEMS = ("model.*", "optimizer.state.*.exp_avg", "optimizer.state.*.exp_avg_sq", "optimizer.state.*.step", "ema.*")


def train_and_save(folder: Path) -> None:
    mesh, engine = build(ONE)
    run_steps(engine, mesh, 0, SAVED)
    CheckpointManager(folder, keep=0).save(SAVED, engine.state_dict(), {})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_distributed(train_and_save, 1, folder)
    return folder


def resumed_without(folder: Path, left_out: Callable[[str], bool], step: int = SAVED) -> dict[str, torch.Tensor] | None:
    """The end of a run that resumes with its own beginning for some of the state; None if that is the same anyway."""
    mesh, engine = build(ONE)
    state = engine.state_dict()
    begun = {f"{section}.{name}": _copy(value) for section, held in state.items() for name, value in held.items()}
    CheckpointManager(folder, keep=0).load(folder / NAME, state)
    changed = False
    for section, held in state.items():
        for name, value in held.items():
            key = f"{section}.{name}"
            if left_out(key):
                changed |= not torch.equal(torch.as_tensor(value), torch.as_tensor(begun[key]))
                value.copy_(begun[key])
    engine.load_state_dict(state)
    if not changed and step == SAVED and left_out is not nothing:
        return None
    run_steps(engine, mesh, step, END)
    return everything(engine, mesh["tensor"])


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def nothing(key: str) -> bool:
    return False


def unnoticed(folder: Path, each: bool) -> tuple[int, list[str]]:
    """How many items were left out, one at a time, and those without which the end is the same."""
    mesh, engine = build(ONE)
    run_steps(engine, mesh, 0, END)
    truth = everything(engine, mesh["tensor"])
    same = resumed_without(folder, nothing)
    assert same is not None and all(torch.equal(same[key], truth[key]) for key in truth)

    manifest = atomic_dir.read_manifest(folder / NAME)
    assert manifest is not None and all(any(fnmatchcase(key, item) for item in ITEMS) for key in manifest["tensors"])
    items = list(manifest["tensors"] if each else ITEMS)
    missed = []
    for item in items:
        ended = resumed_without(folder, lambda key, item=item: fnmatchcase(key, item))
        if ended is None and fnmatchcase(item, "*cond_in.weight*"):
            continue  # nothing is conditioned here: it is what it was at the start, and so are its moments
        if ended is None or all(torch.equal(ended[key], truth[key]) for key in truth):
            missed.append(item)
    ended = resumed_without(folder, nothing, step=SAVED - 1)
    assert ended is not None
    if all(torch.equal(ended[key], truth[key]) for key in truth):
        missed.append("the step")
    return len(items) + 1, missed


@pytest.mark.parametrize("each", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_a_run_that_resumes_without_an_item_ends_elsewhere(saved: Path, each: bool, tally: Tally) -> None:
    done, missed = run_distributed(unnoticed, 1, saved, each, timeout=850)[0]
    tally(f"state left out and missed: {'each tensor' if each else 'each kind'}", done - len(missed), done)
    assert not missed


class Lacking(CheckpointManager):
    """Reads a checkpoint as if its manifest were ``told``."""

    told: dict[str, Any]

    def manifest(self, path: Path) -> dict[str, Any]:
        return self.told


def accepted(folder: Path, stride: int) -> tuple[int, list[str]]:
    """How many tensors and values were taken out of a checkpoint, and which were loaded all the same."""
    _, engine = build(ONE)
    state = engine.state_dict()
    manager = Lacking(folder, keep=0)
    path = folder / NAME
    manifest = atomic_dir.read_manifest(path)
    assert manifest is not None
    (name,) = manifest["files"]
    entries = load_file(path / name)
    missed, done = [], 0

    def expect_refusal(key: str, **changed: Any) -> None:
        nonlocal done
        done += 1
        manager.told = {**manifest, **changed}
        try:
            manager.load(path, state)
        except ValueError as error:
            if key in str(error):
                return
        missed.append(key)

    for kind in ("tensors", "values"):
        for key in list(manifest[kind])[::stride]:
            expect_refusal(key, **{kind: {other: value for other, value in manifest[kind].items() if other != key}})
    for key, (dtype, shape) in list(manifest["tensors"].items())[::stride]:
        expect_refusal(key, tensors={**manifest["tensors"], key: [dtype, [*shape, 1]]})
        kept = {entry: tensor for entry, tensor in entries.items() if not entry.startswith(f"{key}@")}
        (path / name).unlink()  # it is mapped: to cut it short would kill who reads it
        (path / name).write_bytes(shard_file.header(kept) + b"".join(map(bytes, map(shard_file.raw, kept.values()))))
        expect_refusal(key)
    return done, missed


@pytest.mark.parametrize("stride", [17, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(280)])])
def test_a_checkpoint_that_lacks_a_part_is_refused_by_name(
    saved: Path, tmp_path: Path, stride: int, tally: Tally
) -> None:
    done, missed = run_distributed(accepted, 1, shutil.copytree(saved, tmp_path / "copy"), stride, timeout=250)[0]
    tally("a tensor or value taken out of a checkpoint: refused by name", done - len(missed), done)
    assert not missed and done > 50
