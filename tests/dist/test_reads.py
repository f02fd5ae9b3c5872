"""What is counted over processes, and that peers which did not read the same are found on every one of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from acceleration.config import MeshConfig
from acceleration.distributed import mesh as meshes
from opensora.train.health.data_health import DataHealth
from opensora.utils.errors import UserError
from tests.dist.harness import run_distributed
from tests.unit.test_reads import batch, table


def on_groups(folder: Path, bad: dict[int, tuple[int, int]]) -> Any:
    """Micro-batches that 1, 2 and 4 of a rank's processes cut; ``bad``: process -> (degree, slot) it could not read."""
    mesh = meshes.build(MeshConfig(shard=1, ulysses=4, dynamic=True), 4, torch.device("cpu"))
    rank = torch.distributed.get_rank()
    watch = DataHealth(folder, table(), mesh, 0.01)
    for degree in (1, 2, 4):
        size, slot = bad.get(rank, (0, 0))
        mine = batch(100 * degree + 10 * (rank // degree), 2, (slot,) if size == degree else ())
        watch.note(replace(mine, degree=degree), 0)
    try:
        return watch.due()
    except UserError as error:
        return str(error)


def test_processes_with_samples_of_their_own(tmp_path: Path) -> None:
    """Each sample counts once, whoever has it; only those that cut the same samples must have read the same."""
    bad = {1: (1, 0), 2: (2, 1), 3: (2, 1)}
    for values in run_distributed(on_groups, 4, tmp_path, bad):
        assert values == {"data/decode_ms": 1e3 * 7 * 0.5 / 14, "data/replaced": 2}
    lines = {path.name: len(path.read_text().splitlines()) for path in tmp_path.iterdir()}
    assert lines == {"rank-00000-1.jsonl": 1, "rank-00000-2.jsonl": 1}
    results = run_distributed(on_groups, 4, tmp_path, {3: (2, 1)})
    assert all("processes that share samples could not read the same" in str(result) for result in results)


def on_a_process(folder: Path, bad_on: tuple[int, ...], degrees: dict[str, int]) -> Any:
    mesh = meshes.build(MeshConfig(**degrees), 4, torch.device("cpu"))
    rank = torch.distributed.get_rank()
    watch = DataHealth(folder, table(), mesh, 0.01)
    watch.note(batch(100 * mesh.data_rank, 4, (1,) if rank in bad_on else ()), 0)
    try:
        return watch.due(), watch.due()
    except UserError as error:
        return str(error)


def test_over_processes(tmp_path: Path) -> None:
    """Values are of all processes, each sample once; peers that read different samples are found on every one."""
    degrees = {"shard": 2, "ring": 1, "ulysses": 2}
    for values, later in run_distributed(on_a_process, 4, tmp_path, (0, 1), degrees):
        assert values == {"data/decode_ms": 1e3 * 1.0 / 8, "data/replaced": 1}
        assert later == {"data/decode_ms": 0.0, "data/replaced": 1}
    results = run_distributed(on_a_process, 4, tmp_path, (2,), {"shard": 1, "ring": 2, "ulysses": 2})
    assert all("processes that share samples could not read the same" in str(result) for result in results)
