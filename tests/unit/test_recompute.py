"""Every kind of recomputation runs again what it says, keeps what it says, and changes no bit of a gradient."""

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from acceleration import sequence
from acceleration.attention.kernels import KERNELS, Kernel
from acceleration.blocks import activation_checkpoint
from acceleration.blocks.activation_offload import Offload
from acceleration.config import RecomputeConfig
from acceleration.distributed.mesh import view
from opensora.models.families import build_model
from tests.dist.parity import fill
from tests.dist.problem import MODEL, batches
from tests.dist.test_parity import preparation
from tests.dist.toy import Toy

DEPTH = 4
NONE = RecomputeConfig()
KINDS = {
    "full": RecomputeConfig(kind="full"),
    "first": RecomputeConfig(kind="first", blocks=3),
    "every": RecomputeConfig(kind="every", every=2),
    "selective": RecomputeConfig(kind="selective"),
}
ALL = KINDS | {
    f"{kind}-offload": RecomputeConfig(kind=cfg.kind, blocks=cfg.blocks, every=cfg.every, offload=True)
    for kind, cfg in KINDS.items()
}


def prepared(model: nn.Module, cfg: RecomputeConfig, dtype: torch.dtype, kernel: str = "auto") -> nn.Module:
    model = model.to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            full = torch.empty(parameter.shape, dtype=torch.float64)
            fill(name, full)
            parameter.copy_(full)
    sequence.fill_slots(model, view({}), kernel, keeps=cfg.kind == "selective")
    activation_checkpoint.apply(model, cfg)
    return model


def toy_loss(model: nn.Module, tokens: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, vec = torch.randn(3, tokens, 5, generator=generator), torch.randn(3, 3, generator=generator)
    mask = torch.arange(tokens) < torch.tensor([tokens, 1, tokens // 2])[:, None]
    return model(x, vec, key_mask=mask).square().sum()


def mmdit_loss(model: nn.Module, dtype: torch.dtype) -> Tensor:
    prepare = preparation(view({}))
    tokens = [prepare(batch, 0) for batch in batches(0)[:2]]  # type: ignore[arg-type]
    return torch.stack([(model(**t.inputs) - t.targets["velocity"].to(dtype)).square().sum() for t in tokens]).sum()


def gradients(kind: str, cfg: RecomputeConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    if kind == "toy":
        model = prepared(Toy(depth=DEPTH), cfg, dtype)
        toy_loss(model).backward()
    else:
        model = prepared(build_model(MODEL), cfg, dtype)
        mmdit_loss(model, dtype).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("model", ["toy", "mmdit"])
def test_gradients_are_the_same_bit_for_bit(model: str, dtype: torch.dtype) -> None:
    truth = gradients(model, NONE, dtype)
    assert all(gradient.abs().max() > 0 for name, gradient in truth.items() if name != "cond_in.weight")
    for kind, cfg in ALL.items():
        found = gradients(model, cfg, dtype)
        assert found.keys() == truth.keys()
        assert [name for name in truth if not torch.equal(found[name], truth[name])] == [], kind


# What one forward and backward of four blocks runs: (times a block began, times attention was computed).
RUNS = {"none": (4, 4), "full": (8, 8), "first": (7, 7), "every": (6, 6), "selective": (8, 4)}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", RUNS)
def test_what_runs_again(kind: str, offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "none" and offload:
        pytest.skip("refused by the configuration")
    count: Counter[str] = Counter()
    plain = KERNELS["math"]

    def counted(*args: Any) -> tuple[Tensor, Tensor]:
        count["attention"] += 1
        return plain.forward(*args)

    monkeypatch.setitem(KERNELS, "math", Kernel(counted, plain.backward))
    cfg = RecomputeConfig() if kind == "none" else ALL[f"{kind}-offload" if offload else kind]
    model = prepared(Toy(depth=DEPTH), cfg, torch.float64, kernel="math")
    for block in model.blocks:  # type: ignore[union-attr]
        block.qkv.register_forward_hook(lambda *args: count.update(["block"]))  # type: ignore[operator, union-attr]
    toy_loss(model).backward()
    assert (count["block"], count["attention"]) == RUNS[kind]


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that operators made and that are still alive; the model's weights do not count."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known: dict[int, Any] = {p.untyped_storage()._cdata: p for p in model.parameters()}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.add(x.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def activations(cfg: RecomputeConfig) -> tuple[int, int]:
    """(Bytes alive between forward and backward, most bytes alive at any time)."""
    model = prepared(Toy(width=32, depth=8), cfg, torch.float64)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with LiveBytes(model) as live:
        loss = toy_loss(model, tokens=200)
        between = live.now
        loss.backward()
        del loss
    assert live.now <= 1.01 * weights, "more than gradients is still alive"  # 1/100 is less than one block input
    return between, live.peak


def test_memory_falls_with_what_runs_again() -> None:
    found = {kind: activations(cfg) for kind, cfg in {"none": NONE, **KINDS}.items()}
    print({kind: tuple(f"{n / 2**20:.2f} MiB" for n in sizes) for kind, sizes in found.items()})
    for which in (0, 1):
        assert found["none"][which] > found["every"][which] > found["selective"][which] > found["full"][which]
    tokens = 3 * 200 * 32 * 8  # bytes of one (B, N, D) tensor
    attended = tokens + 3 * 4 * 200 * 8  # an output and its log-sum-exp
    assert found["selective"][0] - found["full"][0] == pytest.approx(8 * attended, rel=0.01)


@pytest.mark.parametrize("kind", ALL)
def test_a_forward_without_backward_leaves_nothing(kind: str) -> None:
    """What attention handed over must not know the graph that holds it."""
    model = prepared(Toy(depth=DEPTH), ALL[kind], torch.float64)
    with LiveBytes(model) as live:
        loss = toy_loss(model)
        assert live.now > 0
        del loss
    assert live.now == 0


def test_offload_moves_every_input_once_and_fetches_one_block_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    move = Offload.move

    def logged(self: Offload, x: Tensor, device: torch.device) -> Tensor:
        log.append("move")
        return move(self, x, device)

    monkeypatch.setattr(Offload, "move", logged)
    model = prepared(Toy(depth=DEPTH), ALL["full-offload"], torch.float64)
    for index, block in enumerate(model.blocks):  # type: ignore[arg-type]
        block.qkv.register_forward_hook(lambda *args, i=index: log.append(f"run {i}"))
    loss = toy_loss(model)
    # x each time; vec and the mask with the first block only, as the others share them.
    assert log == ["move", "move", "move", "run 0", "move", "run 1", "move", "run 2", "move", "run 3"]
    log.clear()
    loss.backward()
    # The last block fetches its own; after that, what comes next is on its way before a block runs.
    assert log == ["move", "move", "run 3", "move", "run 2", "move", "move", "move", "run 1", "run 0"]


@pytest.mark.parametrize("kind", ALL)
def test_a_retained_graph_runs_again_in_every_backward(kind: str) -> None:
    model = prepared(Toy(depth=DEPTH), ALL[kind], torch.float64)
    loss = toy_loss(model)
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    assert all(torch.equal(p.grad, 2 * once[name]) for name, p in model.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ALL)
def test_sampling_keeps_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Offload, "move", None)  # would fail
    model = prepared(Toy(depth=DEPTH), ALL[kind], torch.float64)
    with torch.no_grad():
        assert torch.equal(toy_loss(model), toy_loss(prepared(Toy(depth=DEPTH), NONE, torch.float64)))


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"kind": "first"}, "set blocks >= 1"),
        ({"blocks": -1}, ">= 0"),
        ({"kind": "every", "every": 1}, "kind=full"),
        ({"offload": True}, "choose another kind"),
    ],
)
def test_configuration_checks_itself(settings: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        RecomputeConfig(**settings)
