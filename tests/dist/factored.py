"""The problem of problem.py for the factored toy, and a run of it on any layout. Nothing divides by anything."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from acceleration import lora
from acceleration.accounting.comm_volume import step_bytes
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.checkpoint import CheckpointManager, tensor_shards
from acceleration.config import LoraConfig, MeshConfig, OptimConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import Mesh
from acceleration.engines import Engine, build_engine
from acceleration.parallelize import parallelize
from acceleration.sequence import SequenceParallel
from opensora.assembly.encoders import Encoders
from opensora.assembly.token_layout import token_layout
from opensora.conditioning import ConditioningConfig, DropoutConfig
from opensora.conditioning.frames import draw_known
from opensora.datasets.plan.dynamic_sp import SequenceSharing
from opensora.models.families import build_model
from opensora.planner.meta_model import structure
from opensora.train.preparation import Preparation, loss_share
from opensora.utils.rng import torch_generator
from tests.dist.layouts import FP64
from tests.dist.parity import Outcome, fill, measured_steps
from tests.dist.problem import TEXT_TOKENS, FakeText, PassThrough
from tests.factored_family import FAMILY, GaussianFlow, GaussianFlowConfig, ToyConfig

CPU = torch.device("cpu")
MODEL = ToyConfig(depth=2)
SEED, STEPS = 7, 2
# (samples, T', H', W'), patches of 2x2: T x S of 5x7, 1x15 (a still), 2x3 and 4x10.
BUCKETS = ((2, 5, 2, 14), (3, 1, 6, 10), (2, 2, 2, 6), (1, 4, 4, 10))
MASKS = {"random": 0.4, "image_head": 0.3}
CONDITIONING = ConditioningConfig(dropout=DropoutConfig(text=0.4), masks=MASKS)
SGD = OptimConfig(kind="sgd", lr=0.05, clip_norm=0.3)
ADAMW = OptimConfig(kind="adamw", lr=0.01, clip_norm=0.3, weight_decay=0.1, eps=1e-8, ema_decay=0.9)
ADAPTERS = LoraConfig(rank=3, alpha=5.0, targets=(*FAMILY.lora_targets, "text_in.*", "final"))


class Latents(PassThrough):
    channels = MODEL.channels


@dataclass(frozen=True)
class Size:
    """What Preparation reads of a bucket."""

    height: int
    width: int


@dataclass(frozen=True)
class ToyBatch:
    """What Preparation reads of a batch; pixels are latents already."""

    pixels: Tensor
    prompts: list[str]
    sample_ids: tuple[int, ...]
    fps: Tensor
    bucket: Size
    weight: float = 1.0
    degree: int | None = None
    epoch: int = 0


def batches(step: int) -> list[ToyBatch]:
    """The micro-batches of a step, one per bucket; every step has other samples."""
    result = []
    for index, (batch, *grid) in enumerate(BUCKETS):
        ids = tuple(1000 * step + 10 * index + i for i in range(batch))
        pixels = torch.randint(0, 256, (batch, MODEL.channels, *grid), generator=torch_generator("pixels", step, index))
        prompts = [f"{'word ' * (i % 7)}{i}" for i in ids]
        fps = torch.tensor([8.0 + i % 5 for i in ids])
        result.append(ToyBatch(pixels.to(torch.uint8), prompts, ids, fps, Size(8 * grid[1], 8 * grid[2])))
    return result


def elements(step: int) -> int:
    """Latent values that the whole step learns from."""
    total = 0
    for batch in batches(step):
        frames, values = batch.pixels.shape[2], batch.pixels[0, :, 0].numel()
        for sample in batch.sample_ids:
            known = draw_known(SEED, step, sample, frames, MASKS)
            total += values * (frames - (0 if known is None else int(known.sum())))
    return total


def preparation(mesh: Mesh) -> Preparation:
    whole = Preparation(
        encoders=Encoders(autoencoder=Latents(), text_encoder=FakeText(), device=CPU),
        objective=GaussianFlow(GaussianFlowConfig()),
        conditioning=CONDITIONING,
        model=MODEL,
        layout=token_layout(MODEL, SequenceParallel(mesh)),
        seed=SEED,
    )
    by_degree = {
        d: replace(whole, layout=token_layout(MODEL, SequenceParallel(mesh.submesh(d)))) for d in mesh.subgroups
    }
    return replace(whole, by_degree=by_degree)


def plain_model() -> nn.Module:
    """On one process, as it is written."""
    model = build_model(MODEL).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill(name, parameter)
    return model


def adapted_by_hand(model: nn.Module) -> dict[str, Tensor]:
    """The adapters of ``ADAPTERS``, each added by a hook; all else frozen."""
    model.requires_grad_(False)
    with torch.device("meta"):
        names = lora.apply(build_model(MODEL), ADAPTERS)
    found: dict[str, Tensor] = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        a = torch.empty(ADAPTERS.rank, layer.in_features, dtype=torch.float64)
        b = torch.empty(layer.out_features, ADAPTERS.rank, dtype=torch.float64)
        for kind, value in (("A", a), ("B", b)):
            fill(f"{name}.lora_{kind}.weight", value)
            found[f"{name}.lora_{kind}.weight"] = value.requires_grad_()
        layer.register_forward_hook(lambda _, args, out, a=a, b=b: out + 5 / 3 * F.linear(F.linear(args[0], a), b))
    return found


def on_one_process(optim: OptimConfig = SGD, *, adapters: bool = False) -> Outcome:
    """The truth, in plain torch."""
    model = plain_model()
    named = adapted_by_hand(model) if adapters else dict(model.named_parameters())
    parameters = list(named.values())
    kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=optim.lr),
        "adamw": lambda: torch.optim.AdamW(
            parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        ),
    }
    optimizer, prepare, steps = kinds[optim.kind](), preparation(meshes.view({})), []
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches(step):
            tokens = prepare(batch, step)  # type: ignore[arg-type]
            mean, log_variance = model(**tokens.inputs).chunk(2, dim=-1)
            loss = 0.5 * (log_variance + (mean - tokens.targets["velocity"].double()) ** 2 / log_variance.exp())
            known = tokens.inputs["known"]
            total = total + (loss * ~known[..., None]).sum() / elements(step)
        total.backward()
        gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(parameters, optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((total.item(), norm.item(), gradients))
    return Outcome(steps, {name: p.detach().clone() for name, p in named.items()})


def assign(step: int, mesh: Mesh) -> list[ToyBatch]:
    """Equally many micro-batches for every data-parallel rank; what is short is filled with weight 0."""
    every, degree = batches(step), mesh.data_degree
    mine = every[mesh.data_rank :: degree]
    return mine + [replace(every[-1], weight=0.0)] * (-(-len(every) // degree) - len(mine))


# ulysses -> how many processes cut the samples of each micro-batch with mesh.dynamic; these have 2, 3, 2 and 1
DEGREES = {2: (2, 1, 1, 2), 3: (3, 1, 3, 3), 4: (2, 4, 1, 2)}


def divided(step: int, mesh: Mesh) -> list[ToyBatch]:
    """``assign`` with ``mesh.dynamic``: this process's samples; who has none repeats one."""
    ulysses, mine = mesh["ulysses"], []
    sharing = SequenceSharing(degree=ulysses.degree, rank=ulysses.rank, text_tokens=TEXT_TOKENS)
    for batch in assign(step, mesh):
        degree = DEGREES[ulysses.degree][batch.sample_ids[0] // 10 % 10]
        part = sharing.local_rows(len(batch.sample_ids), degree)
        found = slice(part.start, part.stop) if part else slice(0, 1)
        fields = {name: getattr(batch, name)[found] for name in ("pixels", "prompts", "sample_ids", "fps")}
        mine.append(replace(batch, **fields, weight=batch.weight if part else 0.0, degree=degree))
    return mine


@dataclass(frozen=True)
class Run:
    """A layout, and what else is done there."""

    world: int
    mesh: dict[str, int] = field(hash=False)
    zero: int = 3
    options: dict[str, Any] = field(default_factory=dict, hash=False)  # of ParallelConfig
    optim: OptimConfig = SGD
    adapters: bool = False

    def __str__(self) -> str:
        axes = "".join(f"-{axis}{degree}" for axis, degree in self.mesh.items())
        more = "".join(f"-{name}" for name in (*self.options, self.optim.kind, *["lora"] * self.adapters))
        return f"{self.world}{axes}-zero{self.zero}{more}"

    @property
    def config(self) -> ParallelConfig:
        options = {"precision": FP64} | self.options
        return ParallelConfig(zero=self.zero, mesh=MeshConfig(**{"shard": -1} | self.mesh), **options)  # type: ignore[arg-type]


def build(run: Run) -> tuple[Mesh, Engine]:
    """The sharded model and its optimizer."""
    cfg = run.config
    mesh = meshes.build(cfg.mesh, dist.get_world_size(), CPU)
    with torch.device("meta"):
        model = build_model(MODEL)
    if run.adapters:
        lora.apply(model, ADAPTERS)
    parallelize(model, cfg, mesh, CPU, fill)
    return mesh, build_engine(model, cfg, run.optim, mesh)


def on_this_layout(run: Run) -> Outcome:
    """Runs in every process of the group."""
    mesh, engine = build(run)
    dealt = divided if run.config.mesh.dynamic else assign
    formula = None if run.adapters else lambda step: predicted(run.config, mesh, dealt(step, mesh))  # know no adapters
    return measured_steps(engine, mesh, STEPS, lambda step: backward(engine, mesh, dealt(step, mesh), step), formula)


def backward(engine: Engine, mesh: Mesh, mine: list[ToyBatch], step: int) -> Tensor:
    """The gradients of a step; this process's share of its loss."""
    prepare, total = preparation(mesh), torch.zeros((), dtype=torch.float64)
    for index, batch in enumerate(mine):
        share = loss_share(engine.model, prepare(batch, step), elements(step))  # type: ignore[arg-type]
        engine.backward(share, last_microbatch=index == len(mine) - 1)
        total += share.detach()
    return total


def train_and_save(run: Run, folder: Path, start: int, stop: int) -> dict[str, Tensor]:
    """Resume at ``start`` if it is not zero, run to ``stop``, save; all state as whole tensors."""
    mesh, engine = build(run)
    manager = CheckpointManager(folder, keep=0)
    if start:
        state = engine.state_dict()
        manager.load(folder / f"step-{start:08d}", state)
        engine.load_state_dict(state)
    for step in range(start, stop):
        backward(engine, mesh, assign(step, mesh), step)
        engine.step(step)
    manager.save(stop, engine.state_dict(), {})
    flat = {f"{part}.{name}": value for part, values in engine.state_dict().items() for name, value in values.items()}
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor | tensor_shards.TensorShards)}
    return {name: tensor_shards.whole(value, mesh["tensor"]).clone() for name, value in tensors.items()}


def on_these_layouts(runs: list[Run]) -> list[Outcome]:
    """One after the other, in the same processes."""
    return [on_this_layout(run) for run in runs]


def predicted(cfg: ParallelConfig, mesh: Mesh, mine: list[ToyBatch]) -> dict[str, int]:
    """What the formulas say of a step in which this process has these micro-batches."""
    place = RankLayout(meshes.view({name: mesh[name].degree for name in meshes.AXES}, dist.get_rank()), cfg)
    return step_bytes(structure(MODEL, True), place, [sizes(batch) for batch in mine])


def sizes(batch: ToyBatch) -> MicroBatch:
    """As formulas see it."""
    frames, height, width = batch.pixels.shape[2:]
    return MicroBatch(
        samples=len(batch.sample_ids),
        txt=TEXT_TOKENS,
        img=frames * (height // 2) * (width // 2),
        frames=frames,
        has_mask=True,
        degree=batch.degree,
    )
