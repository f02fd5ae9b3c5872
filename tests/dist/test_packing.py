"""Packs on any layout compute what their samples compute one bucket at a time on one process, in plain torch."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from acceleration.config import CompileConfig, MeshConfig, ParallelConfig
from acceleration.sequence import Segments
from opensora.datasets.loading.reader import PackedBatch
from tests.dist import test_engines
from tests.dist.harness import run_distributed
from tests.dist.layouts import FP64, RECOMPUTE
from tests.dist.parity import TOLERANCE, Outcome, relative, worst_error
from tests.dist.problem import batches
from tests.dist.test_parity import on_one_process, on_this_layout

slow = pytest.mark.slow
# processes, mesh, ZeRO, recomputation
LAYOUTS = [
    (2, {}, 3, "full"),
    (2, {"ulysses": 2}, 2, "selective"),
    (2, {"tensor": 2}, 2, "none"),
    pytest.param(1, {}, 3, "full", marks=slow),
    pytest.param(2, {"ulysses": 2}, 0, "none", marks=slow),
    pytest.param(4, {"ulysses": 2, "tensor": 2}, 1, "every", marks=slow),
    pytest.param(2, {"ulysses": 2}, 3, "offload", marks=slow),
    pytest.param(3, {"ulysses": 3}, 3, "first", marks=slow),  # 4 heads over 3 processes
    pytest.param(3, {}, 3, "none", marks=slow),  # more processes than packs
    pytest.param(4, {"ulysses": 4}, 2, "full", marks=slow),
    pytest.param(4, {"ulysses": 2}, 3, "selective", marks=slow),
    pytest.param(4, {"replicate": 2, "ulysses": 2}, 3, "full", marks=slow),
    pytest.param(4, {"tensor": 4}, 3, "selective", marks=slow),
]


def packs(step: int, rank: int, degree: int) -> list[PackedBatch]:
    """This place's packs: two clips, a still and three samples of another shape in one, a short clip in the other."""
    every = batches(step)
    packed = [PackedBatch(tuple(every[:3])), PackedBatch(tuple(every[3:]))]  # type: ignore[arg-type]
    mine = packed[rank::degree]
    idle = PackedBatch(tuple(replace(part, weight=0.0) for part in every[3:]))  # type: ignore[type-var]
    return mine + [idle] * (-(-len(packed) // degree) - len(mine))


def on_packs(cfg: ParallelConfig) -> Outcome:
    return on_this_layout(cfg, lambda step, mesh: packs(step, mesh.data_rank, mesh.data_degree))


@pytest.fixture(scope="module")
def truth() -> Outcome:
    return on_one_process()


@pytest.mark.parametrize(("world", "mesh", "zero", "recompute"), LAYOUTS)
def test_packs_equal_one_bucket_at_a_time(
    truth: Outcome, world: int, mesh: dict[str, int], zero: Any, recompute: str
) -> None:
    cfg = ParallelConfig(zero=zero, mesh=MeshConfig(**mesh), recompute=RECOMPUTE[recompute], precision=FP64)
    for rank, found in enumerate(run_distributed(on_packs, world, cfg, timeout=100)):
        assert worst_error(found, truth) <= TOLERANCE, f"rank {rank}"
        for counted, formula in found.traffic:  # of tensor the formulas take a sequence to have one modulation
            assert counted | {"tensor": 0} == formula | {"tensor": 0}, f"rank {rank}"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_compiled_blocks(truth: Outcome) -> None:
    compiled = CompileConfig(enabled=True, backend="aot_eager")
    cfg = ParallelConfig(zero=3, mesh=MeshConfig(ulysses=2), compile=compiled, precision=FP64)
    for found in run_distributed(on_packs, 2, cfg, timeout=280):
        assert worst_error(found, truth) <= TOLERANCE


def on_engine(cfg: ParallelConfig) -> Any:
    with mock.patch.object(test_engines, "assign", packs):
        return test_engines.on_engine(cfg)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("engine", "zero"),
    [pytest.param("deepspeed", 3, marks=test_engines.needs_deepspeed), ("colossalai", 2)],
)
def test_other_engines(truth: Outcome, engine: str, zero: int) -> None:
    """As far from the truth as they are without packs: they compute in fp32."""
    _, near, gradient, weight = test_engines.EXACT[engine]
    for found in run_distributed(on_engine, 2, test_engines.layout(engine, zero, 2), timeout=280):
        for (loss, norm, gradients, _), right in zip(found, truth.steps, strict=True):
            assert max(relative(loss, right[0]), relative(norm, right[1])) <= near
            assert not gradients or test_engines.farthest(gradients, right[2]) <= (gradient, "~")
        assert test_engines.farthest(found[-1][3], truth.weights) <= (weight, "~")


def shifted_by_a_token() -> Any:
    """Every segment begins one token late."""
    right = Segments.of

    def wrong(samples: Tensor, device: Any) -> Segments:
        return right(samples.roll(1, dims=1), device)

    return mock.patch.object(Segments, "of", staticmethod(wrong))


def no_segments() -> Any:
    return mock.patch.object(Segments, "apply", lambda self, attend, q, k, v, key_mask: attend(q, k, v, key_mask))


MISTAKES: dict[str, Callable[[], Any]] = {"shifted": shifted_by_a_token, "no mask": no_segments}


def with_mistake(name: str) -> Outcome:
    with ExitStack() as stack:
        stack.enter_context(MISTAKES[name]())
        return on_packs(ParallelConfig(zero=3, mesh=MeshConfig(ulysses=2), precision=FP64))


@pytest.mark.parametrize("name", [pytest.param("shifted", marks=slow), "no mask"])
def test_the_mistake_is_found(truth: Outcome, name: str) -> None:
    assert max(worst_error(found, truth) for found in run_distributed(with_mistake, 2, name, timeout=60)) > 1e-6
