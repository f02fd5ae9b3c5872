"""Tensor parallelism of a norm over the channels of all heads: each process has the channels of its heads, and the sum
of squares is everybody's. Loss, every gradient, the clipping norm and weights after steps, in fp64, and bytes."""

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from acceleration.accounting.activation_memory import spread
from acceleration.accounting.comm_volume import forward_bytes, step_bytes
from acceleration.accounting.exchange_count import step_exchanges
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.blocks import fused_norms
from acceleration.config import MeshConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.sharding import tensor_parallel
from tests import fake_apex
from tests.dist.harness import run_distributed
from tests.dist.norm_toy import (
    ADAMW,
    CHANNELS,
    DEPTH,
    HEADS,
    SGD,
    WIDTH,
    NormToy,
    Run,
    on_one_process,
    on_these_layouts,
    structure,
)
from tests.dist.parity import TOLERANCE, Outcome, worst_error

TENSOR = (("tensor", 2),)
RUNS = [
    Run(1, (), 0),
    Run(2, TENSOR, 0),
    Run(2, TENSOR, 3, "full"),
    Run(2, TENSOR, 2, "selective", ADAMW),
    Run(2, TENSOR, 1, adapters=True),
    Run(2, TENSOR, 2, "full", adapters=True),
    Run(3, (("tensor", 3),), 2, "every"),
    Run(4, TENSOR, 3, "full", ADAMW),
    Run(4, (("ulysses", 2), *TENSOR), 2, "full"),
    Run(4, (("ring", 2), *TENSOR), 1),
    Run(6, (("ulysses", 2), ("tensor", 3)), 3, "first", ADAMW),
]
COMPILED = Run(2, TENSOR, 3, compiled=True)  # takes most of a minute


@cache
def truth(kind: str, adapters: bool) -> Outcome:
    return on_one_process(ADAMW if kind == "adamw" else SGD, adapters=adapters)


@pytest.mark.parametrize("world", [1, 2, 4, *(pytest.param(world, marks=pytest.mark.slow) for world in (3, 6))])
def test_layouts_equal_one_process(world: int) -> None:
    check([run for run in RUNS if run.world == world])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_blocks() -> None:
    check([COMPILED], 500)


def check(runs: list[Run], timeout: float = 110) -> None:
    for rank, found in enumerate(run_distributed(on_these_layouts, runs[0].world, runs, timeout=timeout)):
        for run, outcome in zip(runs, found, strict=True):
            assert worst_error(outcome, truth(run.optim.kind, run.adapters)) <= TOLERANCE, (str(run), rank)
            for counted, formula in outcome.traffic:
                assert counted == formula, (str(run), rank)
                assert not any(axis == "tensor" for axis, _ in run.mesh) or counted["tensor"], (str(run), rank)


def test_the_truth_is_of_a_model_in_which_norms_learn() -> None:
    """A parity test of gradients that are zero would prove nothing."""
    for name, gradient in truth("sgd", False).steps[0][2].items():
        assert gradient.abs().max() > 0, name


def test_a_number_per_token_is_sent_for_a_norm() -> None:
    """In forward each of two processes sends as many bytes as the squares have, beside what layers send."""
    batch = MicroBatch(samples=2, txt=7, img=50)
    place = RankLayout(meshes.view({"tensor": 2}), ParallelConfig(zero=0, mesh=MeshConfig(tensor=2)))
    layers = DEPTH * 2 * 50 * 2 * WIDTH * 2  # of each block the two rows, in bf16
    squares = DEPTH * 2 * (3 * 50 + 7) * 4  # queries, keys, queries of the text in fp32, and its keys
    assert forward_bytes(structure(adapters=False), place, batch) == {"tensor": layers + squares}


def test_exchanges_of_norms_count() -> None:
    """Four norms of a block, in either direction; beside them two rows in forward, and three sums in
    backward for six columns: of what q, k and v read, of what text_q does, and of the text."""
    batch = MicroBatch(samples=2, txt=7, img=50)
    place = RankLayout(meshes.view({"tensor": 2}), ParallelConfig(zero=0, mesh=MeshConfig(tensor=2)))
    assert step_exchanges(structure(adapters=False), place, [batch]) == {"tensor": DEPTH * (2 + 3 + 2 * 4)}


def test_bytes_on_the_meta_device() -> None:
    cfg = ParallelConfig(zero=3, mesh=MeshConfig(shard=1, tensor=3))
    with torch.device("meta"):
        model = NormToy()
    mesh = meshes.view({"tensor": 3}, 1)
    spread(model, cfg, mesh, "cpu")
    model(torch.empty(2, 9, CHANNELS, device="meta"), torch.empty(2, 4, CHANNELS, device="meta")).sum().backward()
    place, batch = RankLayout(meshes.view({"tensor": 3}, 1), cfg), MicroBatch(samples=2, txt=4, img=9)
    profile = structure(adapters=False)
    once = step_bytes(profile, place, [])
    assert mesh["tensor"].bytes_sent == step_bytes(profile, place, [batch])["tensor"] - once["tensor"]


def test_heads_must_divide() -> None:
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"^tensor=4: does not divide the 6 heads of blocks.0.q$"),
    ):
        tensor_parallel.check(NormToy(), 4)
    assert HEADS == 6


def of_a_cut_norm(dtype: torch.dtype, by_apex: bool) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Output and gradients of this process's channels, and what was asked of apex."""
    mesh = meshes.build(MeshConfig(shard=1, tensor=2), 2, torch.device("cpu"))
    with torch.device("meta"):
        model = NormToy()
    tensor_parallel.apply(model, mesh["tensor"])
    with fake_apex.installed() as calls:
        fused_norms.apply(model, ParallelConfig(norm_kernel="apex" if by_apex else "torch"), "cpu")
        norm = model.blocks[0].norm_q
        x, gain, grad = given(dtype)
        here = slice(mesh["tensor"].rank * WIDTH // 2, (mesh["tensor"].rank + 1) * WIDTH // 2)
        norm.weight = torch.nn.Parameter(gain[here])
        mine = x[..., here].clone().requires_grad_()
        out = norm(mine)
        out.backward(grad[..., here])
        assert mine.grad is not None
        return out.detach(), mine.grad, norm.weight.grad, [name for name, times in calls.of.items() if times]


def given(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 2, 9, WIDTH, generator=generator)
    return 30 * x.to(dtype), torch.randn(WIDTH, generator=generator).to(dtype), grad.to(dtype)


@pytest.mark.parametrize("by_apex", [False, True], ids=["torch", "apex"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_in_the_types_that_models_compute_in(dtype: torch.dtype, by_apex: bool) -> None:
    """Torch's own norm of all channels; and a kernel for norms, which knows the channels here alone, stays out."""
    x, gain, grad = given(dtype)
    x, gain = x.requires_grad_(), gain.requires_grad_()
    whole = rms_norm(x, (WIDTH,), gain, NormToy().blocks[0].norm_q.eps)
    whole.backward(grad)
    assert x.grad is not None and gain.grad is not None
    near = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    found = run_distributed(of_a_cut_norm, 2, dtype, by_apex)
    for index, expected in enumerate((whole.detach(), x.grad, gain.grad)):
        joined = torch.cat([part[index] for part in found], dim=-1)
        assert joined.dtype == dtype
        assert torch.allclose(joined.double(), expected.double(), rtol=near, atol=near * expected.abs().max().item())
    assert [part[3] for part in found] == [[], []]
