"""Every engine computes what one process computes, and any engine loads what another has saved.

Native runs in fp64. DeepSpeed knows fp32 and bf16 only, so it is compared twice: with the truth, to what fp32 leaves of
it (the native engine in fp32 is as far away), and with the native engine on the same layout, which rounds alike.
ColossalAI itself runs ZeRO 0 here, in fp64. Its other plugins need a GPU (tests/gpu/test_colossalai.py); for those the
adapter runs against a stand-in.
"""

import itertools
from functools import partial
from importlib.util import find_spec
from inspect import getsource, signature
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from acceleration import checkpoint
from acceleration.checkpoint import CheckpointManager
from acceleration.config import MeshConfig, OptimConfig, ParallelConfig, PrecisionConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from acceleration.engines import ENGINES, Engine, build_engine
from acceleration.engines.colossalai_engine import ColossalAIEngine
from acceleration.optim.optimizers import lr_at
from acceleration.parallelize import parallelize
from acceleration.sharding import fsdp
from opensora.models.families import build_model
from opensora.train.preparation import loss_share
from tests.dist import fake_colossalai
from tests.dist.harness import run_distributed
from tests.dist.layouts import FP64
from tests.dist.parity import fill, relative
from tests.dist.problem import MODEL, elements
from tests.dist.test_parity import CLIP, LR, STEPS, assign, on_one_process, preparation

FP32 = PrecisionConfig(compute="fp32")
BF16 = PrecisionConfig(compute="bf16")
SGD = OptimConfig(kind="sgd", lr=LR, clip_norm=CLIP)
ADAM = OptimConfig(lr=1e-3, eps=1e-8, clip_norm=0.3, weight_decay=0.1, ema_decay=0.9, warmup_steps=2)
# engine -> (precision, how far from the truth: loss and norm, every gradient, weights)
EXACT = {
    "native": (FP64, 1e-10, 1e-10, 1e-10),
    "deepspeed": (FP32, 2e-5, 3e-4, 1e-6),
    "colossalai": (FP32, 2e-5, 3e-4, 1e-6),
}
DDP = (FP64, 1e-10, 1e-10, 1e-10)  # ColossalAI's ZeRO 0

Step = tuple[float, float, dict[str, Tensor], dict[str, Tensor]]  # loss, norm, gradients, weights afterwards

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed>=0.19")
needs_colossalai = pytest.mark.skipif(find_spec("colossalai") is None, reason="needs requirements-colossalai.txt")


def exactness(engine: str, zero: int) -> tuple[PrecisionConfig, float, float, float]:
    return DDP if engine == "colossalai" and zero == 0 else EXACT[engine]


def gradients(engine: Engine) -> dict[str, Tensor]:
    """Of the whole step, summed over all processes."""
    if isinstance(engine, ENGINES["native"]):  # type: ignore[arg-type]
        named = engine.model.named_parameters()
        return {name: fsdp.full(p.grad).clone() for name, p in named if p.grad is not None}
    if isinstance(engine, ColossalAIEngine):
        whole = engine.parameters if engine.zero == 0 else []
        return {name: p.grad.clone() for name, p in whole if p.grad is not None}
    from deepspeed.utils import safe_get_full_grad

    return {name: safe_get_full_grad(p).clone() for name, p in engine.model.module.named_parameters()}  # type: ignore


def build(cfg: ParallelConfig, optim: OptimConfig) -> tuple[meshes.Mesh, Engine]:
    if cfg.engine == "colossalai" and cfg.zero:
        fake_colossalai.install()
    device = torch.device("cpu")
    mesh = meshes.build(cfg.mesh, dist.get_world_size(), device)
    with torch.device("meta"):
        model = build_model(MODEL)
    parallelize(model, cfg, mesh, device, fill)
    return mesh, build_engine(model, cfg, optim, mesh)


def take_steps(
    engine: Engine, mesh: meshes.Mesh, optim: OptimConfig, start: int, stop: int, *, look: bool = False
) -> list[Step]:
    prepare = preparation(mesh)
    steps: list[Step] = []
    for step in range(start, stop):
        engine.set_lr(lr_at(step, optim, 10))
        total = torch.zeros((), dtype=torch.float64)
        mine = assign(step, mesh.data_rank, mesh.data_degree)
        for index, batch in enumerate(mine):
            share = loss_share(engine.model, prepare(batch, step), elements(step))  # type: ignore[arg-type]
            engine.backward(share, last_microbatch=index == len(mine) - 1)
            total += share.detach()
        dist.all_reduce(total)
        found = gradients(engine) if look else {}
        norm = engine.step(step)
        weights = {name: w.clone() for name, w in engine.full_weights()} if look else {}
        steps.append((total.item(), norm.item(), found, weights))
    return steps


def on_engine(cfg: ParallelConfig) -> list[Step]:
    mesh, engine = build(cfg, SGD)
    return take_steps(engine, mesh, SGD, 0, STEPS, look=True)


@pytest.fixture(scope="module")
def truth() -> Any:
    return on_one_process()


def farthest(found: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of any tensor, and whose it is."""
    assert found.keys() == truth.keys()
    return max((relative(found[name], truth[name]), name) for name in truth)


def cases() -> list[Any]:
    """On 2 processes; with 2 of a sample's tokens shared, or with 2 samples at a time."""
    quick = {("deepspeed", 2, 2), ("colossalai", 0, 2), ("colossalai", 1, 2), ("colossalai", 2, 1)}
    # test_parity has the native engine's
    return [
        pytest.param(
            engine,
            zero,
            ulysses,
            marks=[needs_deepspeed] * (engine == "deepspeed")
            + [needs_colossalai] * (engine == "colossalai" and zero == 0)
            + [pytest.mark.slow] * ((engine, zero, ulysses) not in quick),
            id=f"{engine}-zero{zero}-ulysses{ulysses}",
        )
        for engine, zero, ulysses in itertools.product(EXACT, (0, 1, 2, 3), (1, 2))
        if engine != "colossalai" or zero < 3  # which computes in bf16 only
    ]


def layout(engine: Any, zero: Any, ulysses: int) -> ParallelConfig:
    return ParallelConfig(
        engine=engine,
        zero=zero,
        mesh=MeshConfig(ulysses=ulysses),
        recompute=RecomputeConfig(kind="full" if zero == 3 else "none"),
        precision=exactness(engine, zero)[0],
    )


@pytest.mark.parametrize(("engine", "zero", "ulysses"), cases())
def test_engine_equals_one_process(truth: Any, engine: Any, zero: Any, ulysses: int) -> None:
    """Loss, every gradient, the norm, and the weights; buckets mixed, micro-batches of different weight."""
    _, near, gradient, weight = exactness(engine, zero)
    for found in run_distributed(on_engine, 2, layout(engine, zero, ulysses), timeout=110):
        for (loss, norm, grads, _), (true_loss, true_norm, true_grads) in zip(found, truth.steps, strict=True):
            assert relative(loss, true_loss) <= near and relative(norm, true_norm) <= near
            if grads or engine != "colossalai" or zero == 0:  # its other stages show none
                assert farthest(grads, true_grads) <= (gradient, "~")
        assert farthest(found[-1][3], truth.weights) <= (weight, "~")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("other", "zero"),
    [pytest.param("colossalai", 0, marks=needs_colossalai)]
    + [pytest.param("deepspeed", zero, marks=needs_deepspeed) for zero in (0, 1, 2, 3)],
)
def test_it_rounds_as_native_does(other: Any, zero: Any) -> None:
    """Fp32 on the same layout, three processes: what is left is the order of a sum."""
    native, found = (
        run_distributed(on_engine, 3, ParallelConfig(engine=engine, zero=zero, precision=FP32), timeout=110)[0]
        for engine in ("native", other)
    )
    for (loss, norm, grads, weights), (true_loss, true_norm, true_grads, true_weights) in zip(
        found, native, strict=True
    ):
        assert relative(loss, true_loss) <= 1e-6 and relative(norm, true_norm) <= 1e-6
        assert farthest(grads, true_grads) <= (2e-5, "~")
        assert farthest(weights, true_weights) <= (1e-6, "~")


def train_save(cfg: ParallelConfig, folder: Path, start: int, stop: int) -> dict[str, Tensor]:
    """Resume at ``start`` if it is not zero, train to ``stop``, save; weights and average."""
    mesh, engine = build(cfg, ADAM)
    manager = CheckpointManager(folder, keep=0)
    if start:
        load(engine, manager, folder / f"step-{start:08d}")
    take_steps(engine, mesh, ADAM, start, stop)
    manager.save(stop, engine.state_dict(), {})
    return everything(engine)


def load(engine: Engine, manager: CheckpointManager, path: Path) -> None:
    state = engine.state_dict()
    manager.load(path, state)
    engine.load_state_dict(state)


def everything(engine: Engine) -> dict[str, Tensor]:
    return {f"{which}.{name}": w for which in ("live", "ema") for name, w in engine.full_weights(which)}  # type: ignore


def load_and_save(cfg: ParallelConfig, folder: Path, target: Path) -> dict[str, Tensor]:
    """Through an engine and out again."""
    _, engine = build(cfg, ADAM)
    load(engine, CheckpointManager(folder, keep=0), folder / "step-00000002")
    CheckpointManager(target, keep=0).save(2, engine.state_dict(), {})
    return everything(engine)


def contents(folder: Path) -> dict[str, Any]:
    """Every value of a checkpoint, whole."""
    return checkpoint.contents(folder / "step-00000002")


NATIVE = ParallelConfig(zero=3, precision=FP32)
SLOW = [pytest.mark.slow, pytest.mark.timeout(400)]  # three groups of processes


@pytest.mark.parametrize(
    ("engine", "world", "zero"),
    [
        pytest.param("deepspeed", 2, 0, marks=[needs_deepspeed, *SLOW]),
        pytest.param("deepspeed", 3, 1, marks=[needs_deepspeed, *SLOW]),
        pytest.param("deepspeed", 3, 2, marks=needs_deepspeed),
        pytest.param("deepspeed", 2, 3, marks=[needs_deepspeed, *SLOW]),
        pytest.param("colossalai", 2, 0, marks=needs_colossalai),
    ],
)
def test_a_checkpoint_goes_through_it_bit_for_bit(tmp_path: Path, engine: Any, world: int, zero: Any) -> None:
    """Written by native on 2 processes, loaded by another engine, written again: weights, moments, counts, settings."""
    saved = run_distributed(train_save, 2, NATIVE, tmp_path / "native", 0, 2, timeout=110)[0]
    cfg = ParallelConfig(engine=engine, zero=zero, precision=FP32)
    loaded = run_distributed(load_and_save, world, cfg, tmp_path / "native", tmp_path / "other", timeout=110)[0]
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    before, after = contents(tmp_path / "native"), contents(tmp_path / "other")
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(after[name], value) if isinstance(value, Tensor) else after[name] == value
        assert same, name


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(
    ("first", "then"), [("native", "deepspeed"), ("deepspeed", "native"), ("deepspeed", "deepspeed")]
)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_run_goes_on_with_another_engine(tmp_path: Path, zero: Any, first: Any, then: Any) -> None:
    """AdamW with decay, warm-up and average, stopped after 2 of 4 steps: equal to the native run that was not."""
    whole = run_distributed(train_save, 2, NATIVE, tmp_path / "whole", 0, 4, timeout=110)[0]
    before, after = (ParallelConfig(engine=engine, zero=zero, precision=FP32) for engine in (first, then))
    run_distributed(train_save, 2, before, tmp_path / "parts", 0, 2, timeout=110)
    found = run_distributed(train_save, 3, after, tmp_path / "parts", 2, 4, timeout=110)[0]
    assert farthest(found, whole) <= (2e-5, "~")


@pytest.mark.slow
@pytest.mark.timeout(600)  # three groups of processes
@needs_colossalai
@pytest.mark.parametrize(
    ("first", "then"), [("native", "colossalai"), ("colossalai", "native"), ("colossalai", "colossalai")]
)
def test_a_run_goes_on_with_colossalai(tmp_path: Path, first: Any, then: Any) -> None:
    """The same in fp64, from ZeRO 3 to copies and back: sums over two and three processes differ by rounding."""
    native = ParallelConfig(zero=3, precision=FP64)
    colossalai = ParallelConfig(engine="colossalai", zero=0, precision=FP64)
    before, after = (native if engine == "native" else colossalai for engine in (first, then))
    whole = run_distributed(train_save, 2, native, tmp_path / "whole", 0, 4, timeout=180)[0]
    run_distributed(train_save, 2, before, tmp_path / "parts", 0, 2, timeout=180)
    found = run_distributed(train_save, 3, after, tmp_path / "parts", 2, 4, timeout=180)[0]
    assert farthest(found, whole) <= (1e-10, "~")


def refuse_the_second(cfg: ParallelConfig) -> tuple[bool, Step, Step]:
    """Whether an update that is refused left everything as it was; the third update after it, and without it."""
    mesh, engine = build(cfg, ADAM)
    take_steps(engine, mesh, ADAM, 0, 1)
    before = {name: value.clone() for name, value in engine.held()}
    asked: list[Tensor] = []
    engine.step = partial(engine.step, accept=asked.append)  # type: ignore[method-assign]  # None: no
    take_steps(engine, mesh, ADAM, 1, 2)
    del engine.step
    same = len(asked) == 1 and all(torch.equal(value, before[name]) for name, value in engine.held())
    third = take_steps(engine, mesh, ADAM, 2, 3, look=True)[0]
    mesh, engine = build(cfg, ADAM)
    take_steps(engine, mesh, ADAM, 0, 1)
    return same, third, take_steps(engine, mesh, ADAM, 2, 3, look=True)[0]


@needs_colossalai
def test_an_update_that_is_refused_leaves_nothing_behind() -> None:
    """ColossalAI's ZeRO 0 asks before it steps; what follows is as if the refused gradients had never been."""
    cfg = ParallelConfig(engine="colossalai", zero=0, precision=FP64)
    for same, found, wanted in run_distributed(refuse_the_second, 2, cfg, timeout=110):
        assert same and found[:2] == wanted[:2]
        assert all(torch.equal(found[3][name], weight) for name, weight in wanted[3].items())


@pytest.mark.slow
@pytest.mark.timeout(400)
@needs_deepspeed
@pytest.mark.parametrize(("zero", "offload"), [(1, False), (2, False), (3, False), (2, True), (3, True)])
def test_deepspeed_in_bf16_keeps_exact_masters(tmp_path: Path, zero: Any, offload: bool) -> None:
    """Masters start from unrounded weights, and stay near the native engine's in bf16."""
    layout: dict[str, Any] = {"zero": zero, "precision": BF16}
    native = run_distributed(train_save, 2, ParallelConfig(**layout), tmp_path / "native", 0, 2, timeout=110)[0]
    cfg = ParallelConfig(engine="deepspeed", offload="optimizer" if offload else "none", **layout)
    found = run_distributed(train_save, 2, cfg, tmp_path / "deepspeed", 0, 2, timeout=110)[0]
    assert farthest(found, native) <= (5e-3, "~")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_gemini_keeps_exact_masters_and_hands_over(tmp_path: Path) -> None:
    """Against the stand-in: its chunks, its counts that are no tensors, its casting of arguments."""
    layout: dict[str, Any] = {"zero": 3, "precision": BF16}
    native, gemini = ParallelConfig(**layout), ParallelConfig(engine="colossalai", **layout)
    whole = run_distributed(train_save, 2, native, tmp_path / "whole", 0, 4, timeout=110)[0]
    run_distributed(train_save, 2, gemini, tmp_path / "parts", 0, 2, timeout=110)
    found = run_distributed(train_save, 3, gemini, tmp_path / "parts", 2, 4, timeout=110)[0]
    assert farthest(found, whole) <= (1e-2, "~")
    before = run_distributed(load_and_save, 2, native, tmp_path / "parts", tmp_path / "native", timeout=110)[0]
    after = run_distributed(load_and_save, 3, gemini, tmp_path / "native", tmp_path / "gemini", timeout=110)[0]
    assert all(torch.equal(after[name], before[name]) for name in before)
    first, last = contents(tmp_path / "native"), contents(tmp_path / "gemini")
    assert first.keys() == last.keys()
    assert all(torch.equal(last[n], v) if isinstance(v, Tensor) else last[n] == v for n, v in first.items())


@needs_colossalai
def test_the_stand_in_is_like_the_release() -> None:
    """Arguments and their defaults, and the names that the adapter reads; and the release still refuses a CPU."""
    assert run_distributed(differences_from_the_release, 1, timeout=110) == [[]]


def differences_from_the_release() -> list[str]:
    from colossalai.booster.plugin import GeminiPlugin, LowLevelZeroPlugin
    from colossalai.nn.optimizer import HybridAdam
    from colossalai.zero.gemini import GeminiOptimizer
    from colossalai.zero.gemini.chunk import Chunk
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    found = []
    for real in (LowLevelZeroPlugin, GeminiPlugin, HybridAdam):
        ours = signature(getattr(fake_colossalai, real.__name__)).parameters
        theirs = signature(real).parameters
        found += [f"{real.__name__}({name})" for name, p in ours.items() if p.default != theirs[name].default]
    for real, names in {
        LowLevelZeroOptimizer: [
            "get_working_to_master_map",
            "get_grad_norm",
            "no_sync",
            "backward",
            "step",
            "zero_grad",
        ],
        GeminiOptimizer: ["get_offsets", "get_grad_norm", "id_to_fake_params", "param_to_chunk16", "chunk16_set"],
        Chunk: ["paired_chunk", "payload", "optim_update"],
    }.items():
        source = getsource(real)
        found += [
            f"{real.__name__}.{name}" for name in names if not hasattr(real, name) and f"self.{name}" not in source
        ]
    for plugin in (partial(LowLevelZeroPlugin, stage=1, precision="fp32"), partial(GeminiPlugin, precision="bf16")):
        model = torch.nn.Linear(2, 2)
        try:
            plugin().configure(model, HybridAdam(model.parameters()))
        except Exception:
            continue
        found.append(f"{plugin.func.__name__} runs on a CPU: test it in place of the stand-in")
    return found
