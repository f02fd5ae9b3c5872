"""A training problem in fp64 for STDiT, STDiT2 and STDiT3, and a run of it on any layout. Nothing divides by anything.

Clips become tokens by the project's own preparation: prompts with masks, some dropped, frames that are known, and sizes
that are no whole patches.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from acceleration import lora
from acceleration.accounting.comm_volume import step_bytes
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import LoraConfig, MeshConfig, OptimConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import Mesh
from acceleration.engines import Engine, build_engine
from acceleration.parallelize import parallelize
from acceleration.sequence import SequenceParallel
from opensora.assembly.encoders import Encoders
from opensora.assembly.token_layout import token_layout
from opensora.conditioning import ConditioningConfig, DropoutConfig
from opensora.datasets.plan.dynamic_sp import SequenceSharing
from opensora.models.families import build_model, describe, family_of
from opensora.models.stdit import STDiT2Config, STDiT3Config, STDiTConfig
from opensora.planner.meta_model import structure, told_frames
from opensora.train.preparation import Preparation, Tokens, loss_share
from opensora.utils.rng import torch_generator
from tests.dist.layouts import FP64, RECOMPUTE
from tests.dist.parity import AVERAGE, Outcome, average_by_hand, fill, measured_steps
from tests.dist.problem import TEXT_TOKENS, FakeText, PassThrough
from tests.factored_family import GaussianFlow, GaussianFlowConfig

CPU = torch.device("cpu")
SEED, STEPS, CHANNELS = 7, 2, 4
SGD = OptimConfig(kind="sgd", lr=0.05, clip_norm=0.3)
# A softmax does not see the bias of its keys: what is left of this gradient is rounding, which Adam would make large.
ADAMW = OptimConfig(kind="adamw", lr=0.01, clip_norm=0.3, weight_decay=0.1, eps=1e-4, ema_decay=0.9)
# (samples, T', H', W'): 5 frames of 1x7, a still of 3x5, 2 of 1x3, 4 of 2x5
WHOLE = ((2, 5, 2, 14), (3, 1, 6, 10), (2, 2, 2, 6), (1, 4, 4, 10))
ODD = ((2, 5, 3, 13), (3, 1, 6, 9), (2, 2, 2, 6), (1, 4, 3, 10))  # the same with sides that are no whole patches

_SHAPE: dict[str, Any] = {"hidden_size": 48, "depth": 2, "num_heads": 4, "caption_channels": 12, "model_max_length": 4}
MODELS: dict[str, Any] = {
    "stdit": STDiTConfig(**_SHAPE, space_scale=0.5, time_scale=2 / 3),
    "stdit2": STDiT2Config(**_SHAPE),
    "stdit3": STDiT3Config(**_SHAPE),
    "windows": STDiT3Config(**_SHAPE, kernel_size=(2, 3, -1), use_spatial_rope=True, cond_embed=True),
    "given": STDiT3Config(**_SHAPE, kernel_size=(3, 2, -1), use_spatial_rope=True, cond_embed=True),
    "skips": STDiT3Config(**_SHAPE, skip_temporal=True),
    "frozen": STDiT3Config(**_SHAPE, freeze_y_embedder=True, only_train_temporal=True),
}
DROPOUT = DropoutConfig(text=0.4)
MASKS = ConditioningConfig(dropout=DROPOUT, masks={"random": 0.4, "image_head": 0.3})
BESIDE = ConditioningConfig(dropout=DROPOUT, references={"t2v": 1.0, "i2v_head": 2.0, "i2v_loop": 1.0})
# As in Open-Sora 1.3: some coded from pixels with noise, some without their prompt or what is given, all weighted.
TYPES = ConditioningConfig(
    dropout=replace(DROPOUT, conditions={"cond": 1.0, "text": 1.0, "null": 1.0, "keep": 2.0}),
    mask_types={"none": 1.0, "i2v_loop": 1.0, "v2v_head_noisy": 2.0, "v2v_tail": 1.0, "other": 1.0},
    known_weight=0.4,
)
ADAPTERS = LoraConfig(rank=3, alpha=5.0)


class Latents(PassThrough):
    channels = CHANNELS


@dataclass(frozen=True)
class Size:
    """What Preparation reads of a bucket."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Clips:
    """What Preparation reads of a batch; pixels are latents already."""

    pixels: Tensor
    prompts: list[str]
    sample_ids: tuple[int, ...]
    fps: Tensor
    bucket: Size
    weight: float = 1.0
    degree: int | None = None
    epoch: int = 0


def conditioning(cfg: Any) -> ConditioningConfig:
    if cfg == MODELS["given"]:
        return TYPES
    return BESIDE if describe(cfg).references == "channels" else MASKS


def batches(cfg: Any, step: int) -> list[Clips]:
    """The micro-batches of a step, one per bucket; every step has other samples."""
    result = []
    for index, (batch, *grid) in enumerate(ODD if describe(cfg).pads else WHOLE):
        ids = tuple(1000 * step + 10 * index + i for i in range(batch))
        pixels = torch.randint(0, 256, (batch, CHANNELS, *grid), generator=torch_generator("pixels", step, index))
        prompts = [f"{'word ' * (i % 7)}{i}" for i in ids]
        fps = torch.tensor([8.0 + i % 5 for i in ids])
        size = Size(1 if grid[0] == 1 else 17 * grid[0] // 5, 300 + 8 * grid[1], 300 + 8 * grid[2])
        result.append(Clips(pixels.to(torch.uint8), prompts, ids, fps, size))
    return result


def preparation(cfg: Any, mesh: Mesh) -> Preparation:
    whole = Preparation(
        encoders=Encoders(autoencoder=Latents(), text_encoder=FakeText(), device=CPU),
        objective=GaussianFlow(GaussianFlowConfig()),
        conditioning=conditioning(cfg),
        model=cfg,
        layout=token_layout(cfg, SequenceParallel(mesh)),
        seed=SEED,
        times=lambda *given: 1000 * GaussianFlow(GaussianFlowConfig()).times(*given),
    )
    by_degree = {d: replace(whole, layout=token_layout(cfg, SequenceParallel(mesh.submesh(d)))) for d in mesh.subgroups}
    return replace(whole, by_degree=by_degree)


def counted_values(cfg: Any, tokens: Tokens) -> Tensor:
    """Which values of whole tokens the loss is over, as numbers."""
    counted = torch.ones_like(tokens.targets["velocity"], dtype=torch.float64)
    if tokens.learned is not None:
        counted = counted * tokens.learned[..., None]
    return counted if tokens.inside is None else counted * tokens.inside


def weights_by_hand(cfg: Any, tokens: Tokens) -> Tensor:
    """(B, T, 1, 1) of frames in the loss: w of the m that are given, (T - m w) / (T - m) of the others."""
    given = tokens.inputs.get("mask_index")
    if given is None or cfg != MODELS["given"]:
        return torch.ones(1, 1, 1, 1, dtype=torch.float64)
    frames, count, w = given.shape[1], given.sum(1, keepdim=True).double(), TYPES.known_weight
    return torch.where(given, w, (frames - count * w) / (frames - count).clamp(min=1))[..., None, None]


@cache
def elements(cfg: Any, step: int) -> int:
    """Latent values that the whole step learns from."""
    prepare = preparation(cfg, meshes.view({}))
    return sum(int(counted_values(cfg, prepare(one, step)).sum()) for one in batches(cfg, step))  # type: ignore[arg-type]


def alive(name: str, tensor: Tensor) -> None:
    """Weights that are all alive, and small: the stream has no norm where it asks the text, nor STDiT's where it looks
    along time, and where a softmax is one or zero the last digits of its gradients say nothing."""
    fill(name, tensor)
    tensor.mul_(0.2 if "q_linear" in name else 5.0 if "kv_linear" in name else 0.5)


def plain_model(cfg: Any) -> nn.Module:
    """On one process, as it is written."""
    model = build_model(cfg).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            alive(name, parameter)
    return model


def adapters_of(cfg: Any) -> LoraConfig:
    return replace(ADAPTERS, targets=(*family_of(cfg).lora_targets, "final_layer.linear"))


def adapted_by_hand(cfg: Any, model: nn.Module) -> dict[str, Tensor]:
    """The adapters, each added by a hook; all else frozen."""
    model.requires_grad_(False)
    with torch.device("meta"):
        names = lora.apply(build_model(cfg), adapters_of(cfg))
    found: dict[str, Tensor] = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        a = torch.empty(ADAPTERS.rank, layer.in_features, dtype=torch.float64)
        b = torch.empty(layer.out_features, ADAPTERS.rank, dtype=torch.float64)
        for kind, value in (("A", a), ("B", b)):
            alive(f"{name}.lora_{kind}.weight", value)
            found[f"{name}.lora_{kind}.weight"] = value.requires_grad_()
        layer.register_forward_hook(lambda _, args, out, a=a, b=b: out + 5 / 3 * F.linear(F.linear(args[0], a), b))
    return found


def on_one_process(cfg: Any, optim: OptimConfig = SGD, *, adapters: bool = False) -> Outcome:
    """The truth, in plain torch."""
    model = plain_model(cfg)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    named = adapted_by_hand(cfg, model) if adapters else trained
    parameters = list(named.values())
    kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=optim.lr),
        "adamw": lambda: torch.optim.AdamW(
            parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        ),
    }
    optimizer, prepare, steps = kinds[optim.kind](), preparation(cfg, meshes.view({})), []
    average = {name: p.detach().clone() for name, p in named.items()}
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches(cfg, step):
            tokens = prepare(batch, step)  # type: ignore[arg-type]
            mean, log_variance = model(**tokens.inputs).chunk(2, dim=-1)
            loss = 0.5 * (log_variance + (mean - tokens.targets["velocity"].double()) ** 2 / log_variance.exp())
            loss = loss * weights_by_hand(cfg, tokens)
            total = total + (loss * counted_values(cfg, tokens)).sum() / elements(cfg, step)
        total.backward()
        gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(parameters, optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        average = average_by_hand(average, named, step, optim.ema_decay)
        steps.append((total.item(), norm.item(), gradients))
    averages = {AVERAGE + name: value for name, value in average.items()} if optim.ema_decay else {}
    return Outcome(steps, {name: p.detach().clone() for name, p in named.items()} | averages)


def assign(cfg: Any, step: int, mesh: Mesh) -> list[Clips]:
    """Equally many micro-batches for every data-parallel rank; what is short is filled with weight 0."""
    every, degree = batches(cfg, step), mesh.data_degree
    mine = every[mesh.data_rank :: degree]
    return mine + [replace(every[-1], weight=0.0)] * (-(-len(every) // degree) - len(mine))


# ulysses -> how many processes cut the samples of each micro-batch with mesh.dynamic; these have 2, 3, 2 and 1
DEGREES = {2: (2, 1, 1, 2), 3: (3, 1, 3, 3), 4: (2, 4, 1, 2)}


def divided(cfg: Any, step: int, mesh: Mesh) -> list[Clips]:
    """``assign`` with ``mesh.dynamic``: this process's samples; who has none repeats one."""
    ulysses, mine = mesh["ulysses"], []
    sharing = SequenceSharing(degree=ulysses.degree, rank=ulysses.rank, text_tokens=TEXT_TOKENS)
    for batch in assign(cfg, step, mesh):
        degree = DEGREES[ulysses.degree][batch.sample_ids[0] // 10 % 10]
        part = sharing.local_rows(len(batch.sample_ids), degree)
        found = slice(part.start, part.stop) if part else slice(0, 1)
        fields = {name: getattr(batch, name)[found] for name in ("pixels", "prompts", "sample_ids", "fps")}
        mine.append(replace(batch, **fields, weight=batch.weight if part else 0.0, degree=degree))
    return mine


@dataclass(frozen=True)
class Run:
    """A model and a layout, and what else is done there."""

    model: str  # of MODELS
    world: int
    mesh: dict[str, int] = field(hash=False)
    zero: int = 3
    options: dict[str, Any] = field(default_factory=dict, hash=False)  # of ParallelConfig
    optim: OptimConfig = SGD
    adapters: bool = False

    def __str__(self) -> str:
        axes = "".join(f"-{axis}{degree}" for axis, degree in self.mesh.items())
        recompute = self.options.get("recompute", RECOMPUTE["none"])
        kind = next(name for name, value in RECOMPUTE.items() if value == recompute)
        more = "-lora" * self.adapters + "-compiled" * ("compile" in self.options)
        return f"{self.model}-{self.world}{axes}-zero{self.zero}-{kind}-{self.optim.kind}{more}"

    @property
    def config(self) -> ParallelConfig:
        options = {"precision": FP64} | self.options
        return ParallelConfig(zero=self.zero, mesh=MeshConfig(**{"shard": -1} | self.mesh), **options)  # type: ignore[arg-type]


def build(run: Run) -> tuple[Mesh, Engine]:
    """The sharded model and its optimizer."""
    cfg, model_cfg = run.config, MODELS[run.model]
    mesh = meshes.build(cfg.mesh, dist.get_world_size(), CPU)
    with torch.device("meta"):
        model = build_model(model_cfg)
    if run.adapters:
        lora.apply(model, adapters_of(model_cfg))
    parallelize(model, cfg, mesh, CPU, alive)
    return mesh, build_engine(model, cfg, run.optim, mesh)


def on_this_layout(run: Run) -> Outcome:
    """Runs in every process of the group."""
    mesh, engine = build(run)
    cfg, dealt = MODELS[run.model], divided if run.config.mesh.dynamic else assign
    prepare = preparation(cfg, mesh)

    def backward(step: int) -> Tensor:
        mine, total = dealt(cfg, step, mesh), torch.zeros((), dtype=torch.float64)
        for index, batch in enumerate(mine):
            share = loss_share(engine.model, prepare(batch, step), elements(cfg, step))  # type: ignore[arg-type]
            engine.backward(share, last_microbatch=index == len(mine) - 1)
            total += share.detach()
        return total

    def predicted(step: int) -> dict[str, int]:
        place = RankLayout(meshes.view({n: mesh[n].degree for n in meshes.AXES}, dist.get_rank()), run.config)
        made_of = structure(cfg, told_frames(cfg, conditioning(cfg)))
        sizes = [of_clips(cfg, batch) for batch in dealt(cfg, step, mesh)]
        return step_bytes(made_of, place, sizes)

    trains_all = run.model != "frozen" and not run.adapters  # formulas know no blocks that backward does not reach
    formula = predicted if trains_all else None
    return measured_steps(engine, mesh, STEPS, backward, formula, average=bool(run.optim.ema_decay))


def on_these_layouts(runs: list[Run]) -> list[Outcome]:
    """One after the other, in the same processes."""
    return [on_this_layout(run) for run in runs]


def of_clips(cfg: Any, batch: Clips) -> MicroBatch:
    """As formulas see it."""
    frames, height, width = batch.pixels.shape[2:]
    grid = describe(cfg).grid((frames, height, width))
    return MicroBatch(
        samples=len(batch.sample_ids),
        txt=TEXT_TOKENS,
        img=grid.tokens,
        frames=grid.frames,
        has_mask=True,
        degree=batch.degree,
    )
