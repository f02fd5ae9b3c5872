"""Compiled blocks compute what plain ones do under every layout, and another bucket compiles nothing."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters

from acceleration.config import CompileConfig, MeshConfig, OptimConfig, ParallelConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from acceleration.engines import build_engine
from acceleration.parallelize import parallelize
from acceleration.sequence import SequenceParallel
from acceleration.sharding import fsdp, tensor_parallel
from opensora.utils.rng import torch_generator
from tests.dist import problem, test_parity
from tests.dist.harness import run_distributed
from tests.dist.layouts import FP64
from tests.dist.parity import TOLERANCE, fill, relative, worst_error
from tests.dist.toy import Block, Toy

STEPS, LR = 2, 0.05
SHAPES = ((3, 9), (2, 14), (3, 23), (2, 7))  # (samples, tokens) of the micro-batches of a step, uneven over 2 processes
LATER = ((4, 11), (5, 31), (2, 17))  # buckets that turn up when all is compiled
INDUCTOR = CompileConfig(enabled=True)
EAGER = CompileConfig(enabled=True, backend="aot_eager")

Found = tuple[list[dict[str, Tensor]], dict[str, Tensor]]  # gradients of every step, weights in the end


def toy_batch(shape: tuple[int, int], step: int) -> dict[str, Tensor]:
    batch, tokens = shape
    generator = torch_generator("toy", step, batch, tokens)
    x, vec = torch.randn(batch, tokens, 5, generator=generator), torch.randn(batch, 3, generator=generator)
    lengths = torch.randint(1, tokens + 1, (batch, 1), generator=generator)
    return {"x": x, "vec": vec, "key_mask": torch.arange(tokens) < lengths}


def squares(out: Tensor) -> Tensor:
    """A share of a mean: sums over tokens and samples, and over processes."""
    return out.square().sum() / 100


def toy_on_one_process() -> Found:
    """The truth, in plain torch."""
    model = Toy().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill(name, parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    steps = []
    for step in range(STEPS):
        for shape in SHAPES:
            squares(model(**toy_batch(shape, step))).backward()
        steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return steps, {name: p.detach().clone() for name, p in model.named_parameters()}


def toy_on_this_layout(cfg: ParallelConfig, whole: Sequence[tuple[int, int]] = ()) -> tuple[Found, list[int]]:
    """What training found, and how many graphs there were after every step and after later shapes.

    ``whole``: micro-batches whose samples ulysses does not cut, but divides.
    """
    counters.clear()
    device = torch.device("cpu")
    mesh = meshes.build(cfg.mesh, dist.get_world_size(), device)
    with torch.device("meta"):
        model: nn.Module = Toy()
    parallelize(model, cfg, mesh, device, fill)
    engine = build_engine(model, cfg, OptimConfig(kind="sgd", lr=LR, clip_norm=0), mesh)

    def share(shape: tuple[int, int], step: int) -> Tensor:
        is_cut, ulysses = shape not in whole, mesh["ulysses"]
        sequence = SequenceParallel(mesh if is_cut else mesh.submesh(1))
        samples = slice(None) if is_cut else slice(ulysses.rank, None, ulysses.degree)
        mine = {name: values[samples] for name, values in toy_batch(shape, step).items()}
        x, key_mask = (sequence.shard(mine[name]) for name in ("x", "key_mask"))
        return squares(model(x, mine["vec"], key_mask=key_mask, context=sequence.context(0, shape[1])))

    steps, graphs = [], []
    for step in range(STEPS):
        mine = SHAPES[mesh.data_rank :: mesh.data_degree]
        for index, shape in enumerate(mine):
            engine.backward(share(shape, step), last_microbatch=index == len(mine) - 1)
        named = model.named_parameters()
        steps.append(
            {
                name: tensor_parallel.full(name, fsdp.full(p.grad), model, mesh["tensor"]).clone()
                for name, p in named
                if p.grad is not None
            }
        )
        engine.step(step)
        graphs.append(compiled_graphs())
    weights = dict(engine.full_weights())
    for shape in LATER:
        engine.backward(share(shape, 0), last_microbatch=True)
        graphs.append(compiled_graphs())
    return (steps, weights), graphs


def compiled_graphs() -> int:
    assert not counters["unimplemented"], counters["unimplemented"]
    return counters["stats"]["unique_graphs"]


def worst_toy_error(found: Found, truth: Found) -> float:
    pairs = list(zip([*found[0], found[1]], [*truth[0], truth[1]], strict=True))
    assert all(a.keys() == b.keys() for a, b in pairs)
    return max(relative(a[name], b[name]) for a, b in pairs for name in b)


MESHES: dict[str, tuple[int, dict[str, int]]] = {
    "one": (1, {}),
    "shard2": (2, {}),
    "ulysses2": (2, {"ulysses": 2}),
    "ring2": (2, {"ring": 2}),
    "tensor2": (2, {"tensor": 2}),
}
RECOMPUTES = {
    "none": RecomputeConfig(),
    "full": RecomputeConfig(kind="full"),
    "every": RecomputeConfig(kind="every", offload=True),
    "selective": RecomputeConfig(kind="selective"),
}
# One graph, two where the slot stands between them, pieces between exchanges; some twice, as the first block's inputs
# are views and the others' are not.
AT_MOST = {"one": 2, "shard2": 2, "ulysses2": 4, "ring2": 4, "tensor2": 10}
QUICK = {("one", "full"), ("ulysses2", "selective")}


def cases(quick: set[tuple[str, str]]) -> list[Any]:
    return [
        pytest.param(mesh, kind, id=f"{mesh}-{kind}", marks=[] if (mesh, kind) in quick else [pytest.mark.slow])
        for mesh in MESHES
        for kind in RECOMPUTES
    ]


@pytest.fixture(scope="module")
def toy_truth() -> Found:
    return toy_on_one_process()


@pytest.mark.parametrize(("mesh", "kind"), cases(QUICK))
def test_compiled_blocks_equal_plain_ones_and_buckets_share_their_graphs(
    toy_truth: Found, mesh: str, kind: str
) -> None:
    world, axes = MESHES[mesh]
    cfg = ParallelConfig(zero=3, mesh=MeshConfig(**axes), recompute=RECOMPUTES[kind], compile=EAGER, precision=FP64)
    for found, graphs in run_distributed(toy_on_this_layout, world, cfg):
        assert worst_toy_error(found, toy_truth) <= TOLERANCE
        assert 0 < graphs[0] <= AT_MOST[mesh], graphs
        assert graphs[0] == graphs[-1], f"later steps or buckets compiled again: {graphs}"


@pytest.mark.slow
def test_samples_that_are_cut_and_others_have_two_sets_of_graphs(toy_truth: Found) -> None:
    """As an exchange returns other strides than attention does, and a batch of one has its own; then no more."""
    cfg = ParallelConfig(zero=3, mesh=MeshConfig(ulysses=2, dynamic=True), compile=EAGER, precision=FP64)
    for found, graphs in run_distributed(toy_on_this_layout, 2, cfg, (SHAPES[1], SHAPES[2], LATER[2])):
        assert worst_toy_error(found, toy_truth) <= TOLERANCE
        assert 0 < graphs[0] <= 2 * AT_MOST["ulysses2"] and graphs[0] == graphs[-1], graphs


@pytest.mark.slow
def test_without_dynamic_every_bucket_compiles_again(toy_truth: Found) -> None:
    """That the count above counts."""
    cfg = ParallelConfig(compile=replace(EAGER, dynamic=False), precision=FP64)
    ((found, graphs),) = run_distributed(toy_on_this_layout, 1, cfg)
    assert worst_toy_error(found, toy_truth) <= TOLERANCE
    assert graphs[0] >= len(SHAPES) and graphs[-1] > graphs[0]


def runs_as_written(cfg: ParallelConfig) -> int:
    """How often a block's own Python ran, forward and backward."""
    device = torch.device("cpu")
    model: nn.Module = Toy()
    times = 0
    plain = Block.forward

    def forward(self: Block, *args: Any) -> Tensor:
        nonlocal times
        if not torch.compiler.is_compiling():
            times += 1
        return plain(self, *args)

    Block.forward = forward  # type: ignore[method-assign, assignment]
    parallelize(model.to("meta"), cfg, meshes.build(cfg.mesh, 1, device), device, fill)
    squares(model(**toy_batch(SHAPES[0], 0))).backward()
    return times


def test_what_runs_again_is_compiled_too() -> None:
    recompute = RECOMPUTES["full"]
    assert run_distributed(runs_as_written, 1, ParallelConfig(recompute=recompute, precision=FP64)) == [6]
    assert run_distributed(runs_as_written, 1, ParallelConfig(recompute=recompute, compile=EAGER, precision=FP64)) == [
        0
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_inductor(toy_truth: Found) -> None:
    cfg = ParallelConfig(
        zero=3, mesh=MeshConfig(ulysses=2), recompute=RECOMPUTES["selective"], compile=INDUCTOR, precision=FP64
    )
    for found, graphs in run_distributed(toy_on_this_layout, 2, cfg, timeout=500):
        assert worst_toy_error(found, toy_truth) <= TOLERANCE
        assert graphs[0] == graphs[-1]


def one_step_of_the_mmdit(cfg: ParallelConfig | None) -> Any:
    """The problem of test_parity cut short, as compiling takes its time: plain torch, or on a layout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_parity, "STEPS", 1)
        patch.setattr(problem, "BUCKETS", ((2, 3, 3, 5), (3, 2, 3, 3)))
        return test_parity.on_this_layout(cfg) if cfg else test_parity.on_one_process()


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("kind", ["none", "full"])
@pytest.mark.parametrize("mesh", MESHES)
def test_the_mmdit_compiled_equals_one_process(mesh: str, kind: str) -> None:
    world, axes = MESHES[mesh]
    cfg = ParallelConfig(zero=3, mesh=MeshConfig(**axes), recompute=RECOMPUTES[kind], compile=EAGER, precision=FP64)
    truth = one_step_of_the_mmdit(None)
    for found in run_distributed(one_step_of_the_mmdit, world, cfg, timeout=900):
        assert worst_error(found, truth) <= TOLERANCE
