"""Saved on 4 processes, resumed on another number: the state is the same bit for bit, the run to rounding.

That every sample is read exactly once across such a change is shown on the real command, in
tests/integration/test_train_and_sample.py.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from acceleration.checkpoint import CheckpointManager
from acceleration.config import MeshConfig, ParallelConfig
from tests.dist.harness import run_distributed
from tests.dist.layouts import FP64
from tests.dist.parity import relative
from tests.dist.test_checkpoint import STEPS, build, everything, run_steps, train_and_save
from tests.faults.conftest import Tally

HALF = 2
FROM = ParallelConfig(zero=3, mesh=MeshConfig(ulysses=2), precision=FP64)
WORLDS = {  # processes -> (ZeRO stage, mesh)
    1: (0, MeshConfig()),
    2: (1, MeshConfig()),
    3: (2, MeshConfig()),
    5: (3, MeshConfig()),
    8: (3, MeshConfig(ring=2, ulysses=2)),
}
State = dict[str, Tensor]


def resume(cfg: ParallelConfig, path: Path) -> tuple[State, State]:
    """What was read, and how the run ends."""
    mesh, engine = build(cfg)
    state = engine.state_dict()
    CheckpointManager(path.parent, keep=0).load(path, state)
    engine.load_state_dict(state)
    read = everything(engine, mesh["tensor"])
    run_steps(engine, mesh, HALF, STEPS)
    return read, everything(engine, mesh["tensor"])


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State, State]:
    """A checkpoint half-way, what was saved in it, and how the run ends on 4 processes."""
    folder = tmp_path_factory.mktemp("four")
    half = run_distributed(train_and_save, 4, FROM, folder, 0, HALF, timeout=110)[0]
    path = folder / f"step-{HALF:08d}"
    return path, half, run_distributed(resume, 4, FROM, path, timeout=110)[0][1]


@pytest.mark.parametrize("world", [1, 3, *(pytest.param(world, marks=pytest.mark.slow) for world in (2, 5, 8))])
def test_four_processes_become_another_number(on_four: tuple[Path, State, State], world: int, tally: Tally) -> None:
    path, half, end = on_four
    zero, mesh = WORLDS[world]
    cfg = ParallelConfig(zero=zero, mesh=mesh, precision=FP64)  # type: ignore[arg-type]
    for read, ended in run_distributed(resume, world, cfg, path, timeout=110):
        assert read.keys() == half.keys() and all(torch.equal(read[name], half[name]) for name in half)
        assert max(relative(ended[name], end[name]) for name in end) <= 1e-10
    tally("saved on 4 processes, resumed on 1, 2, 3, 5, 8", 1, 1)
