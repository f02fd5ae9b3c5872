"""Manifests that are not as they were written though their digest vouches for them, and directories by odd names."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from acceleration.checkpoint import CheckpointManager, atomic_dir, contents, newest, steps_in
from acceleration.checkpoint.atomic_dir import MANIFEST, step_of
from acceleration.checkpoint.listing import candidates, misnamed
from acceleration.files.sealed_json import seal
from launch.attempts import newest_step
from opensora.train.state.resume import wrong_info
from tests.dist.harness import DistributedFailure, run_distributed
from tests.faults.conftest import Tally
from tests.faults.damages import of_values, outcome
from tests.faults.saving import state, values

OLD, NEW = "step-00000001", "step-00000002"
GUARD = {"left_out": 1, "row": 0, "bad": [-1, -1], "returns": 0, "losses": [1.0, 0.5], "norms": [2.0, 1]}
INFO = {
    "table": "0123",
    "config": {"optim": {"lr": 0.1}},
    "config_hash": "4567",
    "world_size": 1,
    "model": {"kind": "mmdit", "depth": 2},
    "optimizer": "adamw",
    "average": True,
    "lora": None,
    "base": None,
    "guard": GUARD,
}


def save_two(folder: Path) -> None:
    manager = CheckpointManager(folder, keep=0)
    for step in (1, 2):
        manager.save(step, state(step, 0, 1), INFO)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_distributed(save_two, 1, folder)
    return folder


def resumed(folder: Path) -> tuple[str, str]:
    """(what became of it: step and what was said, what is wrong)."""
    said: list[str] = []
    manager = CheckpointManager(folder, keep=0, report=said.append, wrong=wrong_info)
    path = manager.latest()
    assert path is not None
    held = state(0, 0, 1)
    try:
        manager.load(path, held)
    except ValueError as error:
        return f"refused: {error}", "" if "\n" not in str(error) and path.name == NEW else f"WRONG: {error}"
    if path.name == OLD:
        named = len(said) == 1 and said[0].startswith(f"{folder / NEW} is damaged (") and "\n" not in said[0]
        return said[0], "" if named else f"WRONG: {said}"
    weight = held["model"]["weight"].held.view(7, 5)
    same = torch.equal(weight, values(2)["model.weight"])
    return "taken", "" if same and not said else f"WRONG: {said}"


def mutate(folder: Path, count: int) -> tuple[dict[str, int], list[str]]:
    """How often step 2 with an altered manifest was passed over, refused, and taken; and what went wrong."""
    path = folder / NEW / MANIFEST
    manifest = atomic_dir.read_manifest(folder / NEW)
    assert manifest is not None
    found: dict[str, int] = {}
    wrong = []
    for changed in of_values(manifest, random.Random(0), count):
        if not isinstance(changed, dict):
            changed = {"step": changed}
        path.write_text(seal(changed))
        told: list[Any] = []
        judged = outcome(lambda told=told: told.append(resumed(folder)))
        kind, problem = told[0] if told else ("", judged)
        kind = kind.partition(":")[0] if kind.startswith(("refused", "taken")) else "passed over"
        found[kind] = found.get(kind, 0) + 1
        for read in (lambda: contents(folder / NEW), lambda: steps_in(folder), lambda: newest(folder)):
            try:
                read()
            except ValueError as error:
                problem = problem or ("WRONG: lines" if "\n" in str(error) else "")
            except Exception as error:
                problem = f"WRONG: {error!r}"
        if problem:
            wrong.append(f"{problem}\n    {str(changed)[:600]}")
    path.write_text(seal(manifest))
    assert resumed(folder) == ("taken", "")
    return found, wrong


@pytest.mark.parametrize("count", [400, pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_altered_values(saved: Path, tmp_path: Path, count: int, tally: Tally) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    found, wrong = run_distributed(mutate, 1, folder, count, timeout=850)[0]
    tally(
        "manifests altered and sealed again: named and passed over, refused in one line, or the same",
        count - len(wrong),
        count,
    )
    assert not wrong, "\n".join(wrong[:9])
    assert found["passed over"] > count / 2 and found["refused"] > 0 and found["taken"] > 0, found


def passed_over(folder: Path, changes: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What is said of step 2 with each change."""
    path, said = folder / NEW / MANIFEST, {}
    manifest = atomic_dir.read_manifest(folder / NEW)
    assert manifest is not None
    for name, change in changes.items():
        path.write_text(seal({key: value for key, value in {**manifest, **change}.items() if value != "gone"}))
        said[name] = resumed(folder)[0]
    return said


def test_each_kind_is_named(saved: Path, tmp_path: Path, tally: Tally) -> None:
    manifest = atomic_dir.read_manifest(saved / NEW)
    assert manifest is not None
    tensors, files = manifest["tensors"], manifest["files"]
    (shard,) = files
    fewer = {key: one for key, one in tensors.items() if key != "model.bias"}

    def with_weight(dtype: Any, sizes: Any) -> dict[str, Any]:
        return {"tensors": {**fewer, "model.bias": tensors["model.bias"], "model.weight": [dtype, sizes]}}

    cases: dict[str, tuple[dict[str, Any], str]] = {
        "no tensors": ({"tensors": "gone"}, "tensors is missing"),
        "a tensor less": ({"tensors": fewer}, "model.bias@0 (BF16 [3]) belongs to no tensor"),
        "a tensor more": (
            {"tensors": {**tensors, "model.x": ["F32", [0, 3]], "model.y": ["U8", [1]]}},
            "tensors.'model.y': [1], and the files hold 0 elements",
        ),
        "another type": (with_weight("I64", [7, 5]), "model.weight@0,0 (F64 [7, 5]) belongs to no tensor"),
        "another shape": (with_weight("F64", [5, 7]), "belongs to no tensor"),
        "a smaller type": (with_weight("F32", [9, 5]), "belongs to no tensor"),
        "a larger tensor": (with_weight("F64", [8, 5]), "tensors.'model.weight'"),
        "a huge tensor": (with_weight("F64", [2**40, 2**40]), "is more than the files hold"),
        "a size below zero": (with_weight("F64", [-7, 5]), "tensors.model.weight.1 is a list, must be a list of"),
        "a type that is none": (with_weight("OBJ", [7, 5]), 'tensors.model.weight.0 is "OBJ", must be one of'),
        "tensors in a list": ({"tensors": list(tensors)}, "tensors is a list, must be an object"),
        "a step in words": ({"step": "2"}, 'step is "2", must be a whole number'),
        "a step of a half": ({"step": 2.5}, "step is 2.5, must be"),
        "another step": ({"step": 3}, "holds step 3 by its manifest.json, so should be called step-00000003"),
        "a file above": ({"files": {"../x": files[shard]}}, "is not a name in this directory"),
        "a file without a digest": ({"files": {shard: {"size": 1}}}, "sha256 is missing"),
        "a file of no bytes": ({"files": {shard: {**files[shard], "size": -1}}}, "size is -1, must be"),
        "another schema": ({"schema": 3}, "schema is 3, must be 2"),
        "no model": ({"model": "gone"}, "model is missing"),
        "a model in words": ({"model": "mmdit"}, 'model is "mmdit", must be an object'),
        "a guard in words": ({"guard": {**GUARD, "losses": [1, "x"]}}, 'guard.losses.1 is "x", must be a number'),
        "a guard of one": ({"guard": {**GUARD, "bad": [1]}}, "guard.bad is a list of 1, must be one of 2"),
    }
    copied = shutil.copytree(saved, tmp_path / "copy")
    said = run_distributed(passed_over, 1, copied, {name: change for name, (change, _) in cases.items()})[0]
    for name, (_, expected) in cases.items():
        assert "is damaged (" in said[name] and expected in said[name], (name, said[name])
    tally("manifests altered and sealed again: the cause is named", len(cases), len(cases))


def test_values_of_another_kind_are_not_loaded(saved: Path, tmp_path: Path) -> None:
    """A learning rate in words, in a list, not finite, gone."""
    manifest = atomic_dir.read_manifest(saved / NEW)
    assert manifest is not None
    key = "optimizer.param_groups.weight.lr"
    found = ("0.1", [0.1], {}, True, None, float("nan"))
    changes = {repr(value): {"values": {**manifest["values"], key: value}} for value in found}
    said = run_distributed(passed_over, 1, shutil.copytree(saved, tmp_path / "copy"), changes)[0]
    for value, line in said.items():
        assert line.startswith("refused: ") and f"{key} is " in line and "there and 0.0 here" in line, (value, line)


ODD = (
    *("step-١٣", "step-²", "step-1", "step-0000003", "step-000000003", "step--1", "step-1e3"),
    *("step-00000001.bak", "step- 0000003"),
)


def latest_of(folder: Path) -> tuple[str, list[str]]:
    said: list[str] = []
    path = CheckpointManager(folder, keep=0, report=said.append, wrong=wrong_info).latest()
    return str(path and path.name), said


def test_a_copy_by_another_name_is_no_checkpoint(saved: Path, tmp_path: Path, tally: Tally) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    shutil.copytree(folder / NEW, folder / "step-00000099")
    name, said = run_distributed(latest_of, 1, folder)[0]
    assert name == NEW and len(said) == 1
    assert "step-00000099 is damaged (holds step 2 by its manifest.json, so should be called step-00000002)" in said[0]
    assert newest(folder) == folder / NEW and newest_step(folder.parent) == 0
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run/checkpoints")
    assert newest_step(tmp_path / "run") == 2
    tally("directories by other names than their step's: passed over with a line", 1, 1)


@pytest.mark.parametrize("name", ["step-2", "old-00000002", "Step-00000002", "copy of step-00000002", "latest"])
def test_a_run_does_not_begin_anew_over_misnamed_checkpoints(name: str, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / NEW, tmp_path / name)
    with pytest.raises(DistributedFailure, match="no checkpoint is complete; move the damaged step-"):
        run_distributed(latest_of, 1, tmp_path)
    with pytest.raises(ValueError, match="no checkpoint is complete"):
        newest(tmp_path)


@pytest.mark.parametrize("target", ["gone", NEW])  # a disk that is not mounted, a link to itself
def test_a_run_does_not_begin_anew_over_links_that_lead_nowhere(target: str, saved: Path, tmp_path: Path) -> None:
    (tmp_path / NEW).symlink_to(tmp_path / target)
    with pytest.raises(DistributedFailure, match="no checkpoint is complete"):
        run_distributed(latest_of, 1, tmp_path)
    shutil.copytree(saved / OLD, tmp_path / OLD)
    name, said = run_distributed(latest_of, 1, tmp_path)[0]
    assert name == OLD and said == [f"{tmp_path / NEW}: a link that leads nowhere: passed over"]


def test_what_holds_no_manifest_is_no_trace_of_a_run(tmp_path: Path) -> None:
    """Folders of others, a save that was cut short, and what may not be looked into."""
    for name in ("lost+found", ".tmp-step-00000002", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / ".tmp-step-00000002" / "manifest.json").write_text("{}")
    (tmp_path / "manifest.json").write_text("{}")
    assert misnamed(tmp_path) == [] and newest(tmp_path) is None and misnamed(tmp_path / "none") == []


@pytest.mark.parametrize("odd", ODD)
def test_odd_names_are_no_checkpoints(odd: str, saved: Path, tmp_path: Path, tally: Tally) -> None:
    folder = shutil.copytree(saved, tmp_path / "run/checkpoints")
    shutil.copytree(folder / NEW, folder / odd)
    assert step_of(odd) is None and [path.name for path in candidates(folder)] == [OLD, NEW]
    name, said = run_distributed(latest_of, 1, folder)[0]
    assert name == NEW and len(said) == 1 and f"{folder / odd}: not the name of a checkpoint" in said[0]
    assert newest_step(tmp_path / "run") == 2
    tally("directories by other names than their step's: passed over with a line", 1, 1)
