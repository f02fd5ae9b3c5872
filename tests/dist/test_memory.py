"""Memory falls with every process: what is held, loaded and gathered, in exact bytes of tensors."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from acceleration.config import MeshConfig, ParallelConfig, RecomputeConfig
from acceleration.diagnostics.memory_usage import Allocations, held
from benchmarks.memory import Usage, measure, model_of, pieces_of, sizes_of, worst, write_weights
from opensora.models.families import build_model
from tests.dist.harness import run_distributed

MODEL = replace(model_of(64), depth=2, depth_single_blocks=4)
SIZES = sizes_of(MODEL)
LAYOUTS: dict[int, tuple[tuple[int, dict[str, int]], ...]] = {
    1: ((3, {}),),
    2: ((0, {}), (1, {}), (2, {}), (3, {})),
    3: ((3, {}),),
    4: ((3, {}),),
}
MESHES = {4: ((2, {"ring": 2, "ulysses": 2}), (1, {"tensor": 2}), (3, {"replicate": 2}))}
Key = tuple[int, int, str]


SLOW = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the groups of processes have far less


@pytest.fixture(scope="module", params=[{}, pytest.param(MESHES, marks=SLOW)], ids=["stages", "meshes"])
def usages(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[Key, tuple[ParallelConfig, list[Usage]]]:
    """(processes, stage, mesh) -> layout, and what each of its processes used."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    write_weights(MODEL, path)
    found: dict[Key, Any] = {}
    for world, choices in LAYOUTS.items():
        choices += request.param.get(world, ())
        layouts = [
            ParallelConfig(zero=zero, mesh=MeshConfig(**mesh), recompute=RecomputeConfig(kind="full"))  # type: ignore[arg-type]
            for zero, mesh in choices
        ]
        by_rank = run_distributed(measure, world, MODEL, path, layouts, timeout=400 if request.param else 110)
        for (zero, mesh), layout, by_layout in zip(choices, layouts, zip(*by_rank, strict=True), strict=True):
            name = "".join(f"{axis}{degree}" for axis, degree in mesh.items())
            found[world, zero, name] = (layout, list(by_layout))
    return found


Usages = dict[Key, tuple[ParallelConfig, list[Usage]]]


def test_state_is_cut_over_all_processes_that_share_it(usages: Usages) -> None:
    for key, (layout, by_rank) in usages.items():
        share = SIZES.parameters / pieces_of(layout, key[0])
        for usage in by_rank:
            assert usage.state <= 1.05 * 4 * share + SIZES.largest_block, key
            assert usage.gradients <= 1.05 * share + SIZES.largest_block, key
        assert sum(usage.average for usage in by_rank) >= SIZES.parameters, key  # nothing is held by nobody


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_byte_of_the_pieces_is_predicted(usages: Usages, world: int) -> None:
    """Rows are dealt out by the largest piece; weights and gradients are padded to it, moments and average are not."""
    with torch.device("meta"):
        parameters = list(build_model(MODEL).parameters())
    _, by_rank = usages[world, 3, ""]
    for rank, usage in enumerate(by_rank):
        padded = mine = 0
        for parameter in parameters:
            rows, row = parameter.shape[0], 4 * parameter[0].numel()
            piece = -(-rows // world)
            padded += piece * row
            mine += max(0, min(piece, rows - rank * piece)) * row
        assert usage.parameters == usage.gradients == padded
        assert usage.average == mine and usage.optimizer == 2 * mine + 4 * len(parameters)  # a step count each


def test_loading_takes_one_part_more_than_it_keeps(usages: Usages) -> None:
    for key, (layout, by_rank) in usages.items():
        share = SIZES.parameters / pieces_of(layout, key[0])
        for usage in by_rank:
            assert usage.load_peak <= 1.05 * share + SIZES.largest_block, key
            assert usage.load_peak <= usage.parameters + SIZES.largest_parameter, key
            assert usage.sample_load_peak <= usage.sample_parameters + SIZES.largest_parameter, key  # kept in bf16


def test_the_stages_keep_what_their_table_says(usages: Usages) -> None:
    """Compute copy in bf16, P/2 bytes of P; gradients that wait for the last micro-batch in fp32, P."""
    whole = SIZES.parameters
    step = {zero: worst(usages[2, zero, ""][1]) for zero in range(4)}
    assert [step[zero].gathered for zero in range(4)] == [whole // 2, whole // 2, 0, 0]
    assert [step[zero].gradients for zero in range(4)] == [whole, whole // 2, whole // 2, whole // 2]
    few_blocks = 4 * SIZES.largest_block
    wanted = {0: 1.5 * whole, 1: 1.5 * whole, 2: whole / 2 + whole / 2, 3: whole / 2}
    for zero, least in wanted.items():
        assert least <= step[zero].step_peak <= least + few_blocks, zero
        assert step[zero].sample_peak <= (whole / 2 if zero < 3 else 0) + few_blocks, zero
        assert (step[zero].sample_peak >= whole / 2) == (zero < 3)
    for key, (_, by_rank) in usages.items():
        assert all(usage.left == 0 for usage in by_rank), key


def test_memory_falls_with_every_process(usages: Usages) -> None:
    one, two, three, four = (worst(usages[world, 3, ""][1]) for world in (1, 2, 3, 4))
    for more, fewer in ((one, two), (two, three), (three, four)):
        assert fewer.state < more.state and fewer.load_peak < more.load_peak
        assert fewer.state + fewer.step_peak < more.state + more.step_peak
        assert fewer.sample_parameters + fewer.sample_peak < more.sample_parameters + more.sample_peak


def test_allocations_count_every_byte_once() -> None:
    old = torch.zeros(100)
    with Allocations() as seen:
        kept = torch.zeros(1000)
        view = kept[:10].view(2, 5)
        old.add_(1)
        gone = kept.double()  # 8,000 bytes
        del gone
        kept.untyped_storage().resize_(400)
        leaf = torch.ones(50, requires_grad=True)
        (leaf * leaf).sum().backward()  # the product, one number, its gradient, and those of both factors
        assert leaf.grad is not None
    assert seen.now == 400 + 200 + 200 and seen.peak == 12_000
    assert held([kept, view, leaf]) == 400 + 200
