"""Saved by one layout, loaded by another: the state is the same bit for bit, and the run goes on as if unbroken."""

import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.checkpoint import CheckpointManager, SaveError, newest, steps_in, tensor_shards
from acceleration.checkpoint.atomic_dir import MANIFEST
from acceleration.config import MeshConfig, OptimConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.engines import Engine, build_engine
from acceleration.optim.optimizers import lr_at
from acceleration.parallelize import parallelize
from opensora.models.families import build_model
from opensora.train.preparation import loss_share
from tests.dist.harness import run_distributed
from tests.dist.layouts import FP64
from tests.dist.parity import fill, relative
from tests.dist.problem import MODEL, elements
from tests.dist.test_parity import assign, preparation

OPTIM = OptimConfig(lr=1e-3, clip_norm=0.3, ema_decay=0.9, warmup_steps=2, schedule="cosine")
STEPS = 5
LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "1": (1, ParallelConfig(zero=0, precision=FP64)),
    "2-zero3": (2, ParallelConfig(zero=3, precision=FP64)),
    "2-ulysses": (2, ParallelConfig(zero=2, mesh=MeshConfig(ulysses=2), precision=FP64)),
    "2-zero0": (2, ParallelConfig(zero=0, precision=FP64)),
    "3-zero1": (3, ParallelConfig(zero=1, precision=FP64)),
    "2-tensor": (2, ParallelConfig(zero=3, mesh=MeshConfig(tensor=2), precision=FP64)),
    "4-ring-tensor": (4, ParallelConfig(zero=2, mesh=MeshConfig(ring=2, tensor=2), precision=FP64)),
    "4-hybrid": (4, ParallelConfig(zero=3, mesh=MeshConfig(replicate=2, ulysses=2), precision=FP64)),
}


def build(cfg: ParallelConfig, optim: OptimConfig = OPTIM) -> tuple[meshes.Mesh, Engine]:
    device = torch.device("cpu")
    mesh = meshes.build(cfg.mesh, dist.get_world_size(), device)
    with torch.device("meta"):
        model = build_model(MODEL)
    parallelize(model, cfg, mesh, device, fill)
    return mesh, build_engine(model, cfg, optim, mesh)


def run_steps(engine: Engine, mesh: meshes.Mesh, start: int, stop: int) -> None:
    prepare = preparation(mesh)
    for step in range(start, stop):
        engine.set_lr(lr_at(step, OPTIM, STEPS))
        mine = assign(step, mesh.data_rank, mesh.data_degree)
        for index, batch in enumerate(mine):
            share = loss_share(engine.model, prepare(batch, step), elements(step))  # type: ignore[arg-type]
            engine.backward(share, last_microbatch=index == len(mine) - 1)
        engine.step(step)


def everything(engine: Engine, tensor: meshes.Axis) -> dict[str, Tensor]:
    """All state as whole tensors: weights, moments, step counts, average."""
    state = engine.state_dict()
    flat = {f"{part}.{name}": value for part, values in state.items() for name, value in values.items()}
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor | tensor_shards.TensorShards)}
    return {name: tensor_shards.whole(value, tensor).clone() for name, value in tensors.items()}


def train_and_save(cfg: ParallelConfig, folder: Path, start: int, stop: int) -> dict[str, Tensor]:
    """Resume at ``start`` if it is not zero, run to ``stop``, save."""
    mesh, engine = build(cfg)
    manager = CheckpointManager(folder, keep=0)
    if start:
        state = engine.state_dict()
        manager.load(folder / f"step-{start:08d}", state)
        assert manager.manifest(folder / f"step-{start:08d}")["step"] == start
        engine.load_state_dict(state)
    run_steps(engine, mesh, start, stop)
    manager.save(stop, engine.state_dict(), {})
    return everything(engine, mesh["tensor"])


def load_only(cfg: ParallelConfig, path: Path) -> dict[str, Tensor]:
    mesh, engine = build(cfg)
    state = engine.state_dict()
    CheckpointManager(path.parent, keep=0).load(path, state)
    engine.load_state_dict(state)
    return everything(engine, mesh["tensor"])


def settings_after_loading(cfg: ParallelConfig, path: Path, optim: OptimConfig) -> dict[str, Any]:
    _, engine = build(cfg, optim)
    state = engine.state_dict()
    CheckpointManager(path.parent, keep=0).load(path, state)
    engine.load_state_dict(state)
    (group,) = engine.optimizer.param_groups  # type: ignore[attr-defined]
    return {name: group[name] for name in ("betas", "eps", "weight_decay")}


def run_on(layout: str, function: Any, *args: Any) -> dict[str, Tensor]:
    world, cfg = LAYOUTS[layout]
    return run_distributed(function, world, cfg, *args, timeout=100)[0]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Final state of an unbroken run, for the layouts that the tests resume on."""
    folder = tmp_path_factory.mktemp("whole")
    return {name: run_on(name, train_and_save, folder / name, 0, STEPS) for name in ("2-ulysses", "4-hybrid")}


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint after two steps on two processes with Ulysses, and the state it was made from."""
    folder = tmp_path_factory.mktemp("halfway")
    return folder, run_on("2-ulysses", train_and_save, folder, 0, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_is_bitwise_on_any_layout(halfway: tuple[Path, dict[str, Tensor]], layout: str) -> None:
    folder, saved = halfway
    loaded = run_on(layout, load_only, folder / "step-00000002")
    assert loaded.keys() == saved.keys()
    for name in saved:
        assert torch.equal(loaded[name], saved[name]), name
    assert {name.split(".")[0] for name in saved} == {"model", "optimizer", "ema"}


def test_a_resumed_run_takes_the_settings_of_its_configuration(halfway: tuple[Path, dict[str, Tensor]]) -> None:
    changed = replace(OPTIM, weight_decay=0.25, betas=(0.5, 0.75), eps=1e-4)
    found = run_on("2-zero3", settings_after_loading, halfway[0] / "step-00000002", changed)
    assert found == {"betas": (0.5, 0.75), "eps": 1e-4, "weight_decay": 0.25}


def test_resumed_equals_uninterrupted_bitwise_on_the_same_layout(
    halfway: tuple[Path, dict[str, Tensor]], uninterrupted: dict[str, dict[str, Tensor]]
) -> None:
    final = run_on("2-ulysses", train_and_save, halfway[0], 2, STEPS)
    for name, value in uninterrupted["2-ulysses"].items():
        assert torch.equal(final[name], value), name


def test_resumed_on_another_layout_equals_uninterrupted(
    halfway: tuple[Path, dict[str, Tensor]], uninterrupted: dict[str, dict[str, Tensor]]
) -> None:
    final = run_on("4-hybrid", train_and_save, halfway[0], 2, STEPS)
    for truth in uninterrupted.values():  # the layout it started on, and the one it ended on
        assert max(relative(final[name], truth[name]) for name in truth) <= 1e-10


def test_a_damaged_checkpoint_is_not_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        run_on("1", load_nothing_and_save, tmp_path, step)
    (tmp_path / "step-00000003" / MANIFEST).unlink()
    payload = next((tmp_path / "step-00000002").glob("shard-*"))
    payload.write_bytes(payload.read_bytes()[:-1])
    assert newest(tmp_path) == tmp_path / "step-00000001"
    (tmp_path / "step-00000001" / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="no checkpoint is complete"):
        newest(tmp_path)


def load_nothing_and_save(cfg: ParallelConfig, folder: Path, step: int) -> dict[str, Tensor]:
    _, engine = build(cfg)
    CheckpointManager(folder, keep=0).save(step, engine.state_dict(), {})
    return {}


def save_four_keep_two(cfg: ParallelConfig, folder: Path) -> list[str]:
    _, engine = build(cfg)
    manager = CheckpointManager(folder, keep=2)
    (folder / ".tmp-step-00000001-deadbeef").mkdir(parents=True)
    for step in (1, 2, 3, 4):
        manager.save(step, engine.state_dict(), {})
    return [path.name for path in sorted(folder.iterdir())]


def test_the_last_few_are_kept_and_leftovers_removed(tmp_path: Path) -> None:
    assert run_distributed(save_four_keep_two, 1, LAYOUTS["1"][1], tmp_path)[0] == ["step-00000003", "step-00000004"]
    assert [path.name for path in steps_in(tmp_path)] == ["step-00000003", "step-00000004"]


def saved_in_background(cfg: ParallelConfig, folder: Path) -> list[bool]:
    """Save, step, save, step while the first are written; then whether each holds the state it was asked to save."""
    mesh, engine = build(cfg)
    manager = CheckpointManager(folder, keep=0, in_background=True)
    expected = {}
    for step in (1, 2, 3):
        run_steps(engine, mesh, step - 1, step)
        expected[step] = everything(engine, mesh["tensor"])
        manager.save(step, engine.state_dict(), {})
        manager.poll()
    manager.wait()
    manager.close()
    same = []
    for step, truth in expected.items():
        state = engine.state_dict()
        CheckpointManager(folder, keep=0).load(folder / f"step-{step:08d}", state)
        engine.load_state_dict(state)
        found = everything(engine, mesh["tensor"])
        same.append(all(torch.equal(found[name], truth[name]) for name in truth))
    return same


@pytest.mark.parametrize("layout", ["2-zero3", "2-tensor"])
def test_what_is_saved_in_the_background_is_the_state_at_the_call(layout: str, tmp_path: Path) -> None:
    world, cfg = LAYOUTS[layout]
    assert run_distributed(saved_in_background, world, cfg, tmp_path, timeout=100) == [[True] * 3] * world
    files = [next((tmp_path / f"step-{step:08d}").glob("shard-*")).read_bytes() for step in (1, 2, 3)]
    assert len(set(files)) == 3  # consecutive checkpoints differ


def latest_of(cfg: ParallelConfig, folder: Path) -> tuple[str | None, list[str]]:
    """The newest good checkpoint, or what is said when there is none; and what is reported."""
    said: list[str] = []
    manager = CheckpointManager(folder, keep=0, report=said.append)
    try:
        found = manager.latest()
    except ValueError as error:
        return str(error), said
    return (found.name if found else None), said


def test_one_altered_byte_is_noticed_and_an_older_checkpoint_taken(tmp_path: Path) -> None:
    world, cfg = LAYOUTS["2-zero3"]
    for step in (1, 2):
        run_on("2-zero3", load_nothing_and_save, tmp_path, step)
    shard = sorted((tmp_path / "step-00000002").glob("shard-*"))[1]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 0x10
    shard.write_bytes(content)
    results = run_distributed(latest_of, world, cfg, tmp_path)
    assert [name for name, _ in results] == ["step-00000001"] * 2
    assert results[0][1] == [f"{tmp_path}/step-00000002 is damaged ({shard.name}): looking for an older one"]
    (tmp_path / "step-00000001" / shard.name).unlink()
    assert all("no checkpoint is complete" in str(name) for name, _ in run_distributed(latest_of, world, cfg, tmp_path))


def failing_saves(cfg: ParallelConfig, folder: Path, in_background: bool) -> tuple[list[str], str, list[str]]:
    """A good save, then saves on a disk that is full for one process, until the run gives up."""
    said: list[str] = []
    _, engine = build(cfg)
    manager = CheckpointManager(folder, keep=1, in_background=in_background, report=said.append)
    manager.save(1, engine.state_dict(), {})
    manager.wait()
    if dist.get_rank() == 1:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        manager.close()  # the process that writes inherits the limit
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    ended = ""
    try:
        for step in range(2, 9):
            manager.save(step, engine.state_dict(), {})
            manager.wait()
    except SaveError as error:
        ended = str(error)
    manager.close()
    return said, ended, sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_is_said_and_survived_a_few_times(tmp_path: Path, in_background: bool) -> None:
    world, cfg = LAYOUTS["2-zero3"]
    said, ended, left = run_distributed(failing_saves, world, cfg, tmp_path, in_background)[0]
    assert [("NOT SAVED, disk full" in line) for line in said] == [False, True, True, True]
    assert ended.startswith("3 checkpoints in a row could not be saved: disk full")
    assert left == ["step-00000001"]


def test_nothing_that_is_loaded_can_run_code() -> None:
    """No pickle: the only readers are JSON and safetensors."""
    folder = Path(__file__).parents[2] / "acceleration" / "checkpoint"
    source = "".join(path.read_text() for path in folder.glob("*.py"))
    assert "pickle" not in source and "torch.load" not in source and "distributed.checkpoint" not in source
