"""A toy whose queries and keys are normed over all heads at once, and a run of it on any layout.

Every block attends to the tokens, which are cut over processes, and to a text that all of them hold. The norm is
written as its formula.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acceleration import lora
from acceleration.accounting.comm_volume import step_bytes
from acceleration.accounting.model_profile import ModelProfile
from acceleration.accounting.profiling import profile_of
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import CompileConfig, LoraConfig, MeshConfig, OptimConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.engines import build_engine
from acceleration.parallelize import parallelize
from acceleration.sequence import SequenceParallel
from opensora.utils.rng import torch_generator
from tests.dist.layouts import FP64, RECOMPUTE
from tests.dist.parity import Outcome, fill, measured_steps
from tests.dist.toy import Core

CPU = torch.device("cpu")
WIDTH, HEADS, DEPTH, CHANNELS, TEXT = 24, 6, 2, 5, 4
STEPS, EPS = 2, 1e-3  # an eps that is seen
SIZES = ((2, 11), (1, 3), (3, 8))  # (samples, tokens) of the micro-batches
SGD = OptimConfig(kind="sgd", lr=0.05, clip_norm=0.3)
ADAMW = OptimConfig(kind="adamw", lr=0.01, clip_norm=0.3, weight_decay=0.1, eps=1e-8)
ADAPTERS = LoraConfig(rank=3, alpha=5.0, targets=("blocks.*.q", "blocks.*.text_k", "blocks.*.out"))


class Norm(nn.Module):
    """Over the channels of all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = EPS
        self.weight = nn.Parameter(torch.ones(WIDTH))

    @property
    def gain(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + self.eps).sqrt() * self.weight


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "out", "text_q", "text_k", "text_v", "text_out"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))
        for name in ("norm_q", "norm_k", "text_norm_q", "text_norm_k"):
            setattr(self, name, Norm())
        self.core, self.text_core = Core(), Core()

    def forward(self, x: Tensor, text: Tensor, context: Any) -> Tensor:
        of_tokens = (self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x))
        x = x + self.out(self.core(*map(by_head, of_tokens), context=context).flatten(2))
        of_text = (self.text_norm_q(self.text_q(x)), self.text_norm_k(self.text_k(text)), self.text_v(text))
        return x + self.text_out(self.text_core(*map(by_head, of_text), context=context).flatten(2))


def by_head(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, WIDTH // HEADS))


class NormToy(nn.Module):
    block_lists = ("blocks",)
    attention_cores: ClassVar[dict[str, str]] = {"blocks.*.core": "joint", "blocks.*.text_core": "cross"}
    axis_switches: ClassVar[dict[str, str]] = {}
    tensor_shared = ()

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.text_in = nn.Linear(CHANNELS, WIDTH), nn.Linear(CHANNELS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.final = nn.Linear(WIDTH, CHANNELS)

    def forward(self, x: Tensor, text: Tensor, *, context: Any = None) -> Tensor:
        dtype = self.inp.weight.dtype
        x, text = self.inp(x.to(dtype)), self.text_in(text.to(dtype))
        for block in self.blocks:
            x = block(x, text, context)
        return self.final(x).clone()

    def tensor_plan(self) -> dict[str, tuple[str, tuple[tuple[int, int], ...]]]:
        heads = ((WIDTH, WIDTH // HEADS),)
        return {
            **{f"blocks.*.{name}": ("column", heads) for name in ("q", "k", "v", "text_q", "text_k", "text_v")},
            **{f"blocks.*.{name}": ("row", heads) for name in ("out", "text_out")},
            "blocks.*.*norm_?": ("norm", heads),
        }

    def init_parameter_(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0, 0.2, generator=generator)


@dataclass(frozen=True)
class Run:
    """A layout, and what else is done there."""

    world: int
    mesh: tuple[tuple[str, int], ...]
    zero: int = 3
    recompute: str = "none"
    optim: OptimConfig = SGD
    adapters: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        axes = "".join(f"-{axis}{degree}" for axis, degree in self.mesh)
        more = "-lora" * self.adapters + "-compiled" * self.compiled
        return f"{self.world}{axes}-zero{self.zero}-{self.recompute}-{self.optim.kind}{more}"

    @property
    def config(self) -> ParallelConfig:
        mesh: dict[str, Any] = {"shard": -1} | dict(self.mesh)
        zero: Any = self.zero
        found = ParallelConfig(zero=zero, mesh=MeshConfig(**mesh), precision=FP64, recompute=RECOMPUTE[self.recompute])
        return replace(found, compile=CompileConfig(enabled=True, backend="aot_eager")) if self.compiled else found


def batches(step: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(tokens, text, target) of the micro-batches of a step."""
    found = []
    for index, (samples, tokens) in enumerate(SIZES):
        generator = torch_generator("norm toy", step, index)
        shapes = ((samples, tokens, CHANNELS), (samples, TEXT, CHANNELS), (samples, tokens, CHANNELS))
        x, text, target = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        found.append((x, text, target))
    return found


def squares(model: nn.Module, sequence: SequenceParallel, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    x, text, target = batch
    out = model(sequence.shard(x), text, context=sequence.context(0, x.shape[1]))
    return (out - sequence.shard(target)).square().sum() / 100


def built(*, adapters: bool) -> nn.Module:
    """On the default device."""
    model = NormToy()
    if adapters:
        lora.apply(model, ADAPTERS)
    return model


def on_one_process(optim: OptimConfig, *, adapters: bool = False) -> Outcome:
    """The truth, in plain torch."""
    with torch.device("meta"):
        model = built(adapters=adapters)
    model.double().to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill(name, parameter)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer: torch.optim.Optimizer = torch.optim.SGD(named.values(), lr=optim.lr)
    if optim.kind == "adamw":
        known = {"betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
        optimizer = torch.optim.AdamW(named.values(), lr=optim.lr, **known)
    steps, whole = [], SequenceParallel(meshes.view({}))
    for step in range(STEPS):
        total = torch.stack([squares(model, whole, batch) for batch in batches(step)]).sum()
        total.backward()
        gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(named.values(), optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((total.item(), norm.item(), gradients))
    return Outcome(steps, {name: p.detach().clone() for name, p in named.items()})


def structure(*, adapters: bool) -> ModelProfile:
    def forward(model: nn.Module, *, txt: int, img: int) -> Tensor:
        return model(torch.empty(1, img, CHANNELS), torch.empty(1, txt, CHANNELS))

    with torch.device("meta"):
        return profile_of(built(adapters=adapters), forward)


def on_this_layout(run: Run) -> Outcome:
    """Runs in every process of the group."""
    mesh = meshes.build(run.config.mesh, dist.get_world_size(), CPU)
    with torch.device("meta"):
        model = built(adapters=run.adapters)
    parallelize(model, run.config, mesh, CPU, fill)
    engine, sequence = build_engine(model, run.config, run.optim, mesh), SequenceParallel(mesh)

    def mine(step: int) -> list[tuple[tuple[Tensor, Tensor, Tensor], float]]:
        every, degree = batches(step), mesh.data_degree
        held = [(batch, 1.0) for batch in every[mesh.data_rank :: degree]]
        return held + [(every[-1], 0.0)] * (-(-len(every) // degree) - len(held))

    def backward(step: int) -> Tensor:
        total, todo = torch.zeros((), dtype=torch.float64), mine(step)
        for index, (batch, weight) in enumerate(todo):
            share = squares(engine.model, sequence, batch) * weight
            engine.backward(share, last_microbatch=index == len(todo) - 1)
            total += share.detach()
        return total

    profile = structure(adapters=run.adapters)
    place = RankLayout(meshes.view({name: mesh[name].degree for name in meshes.AXES}, dist.get_rank()), run.config)

    def predicted(step: int) -> dict[str, int]:
        sizes = [MicroBatch(samples=len(x), txt=TEXT, img=x.shape[1]) for (x, *_), _ in mine(step)]
        return step_bytes(profile, place, sizes)

    return measured_steps(engine, mesh, STEPS, backward, predicted)


def on_these_layouts(runs: list[Run]) -> list[Outcome]:
    """One after the other, in the same processes."""
    return [on_this_layout(run) for run in runs]
