"""A training problem in fp64 for a model of any family, and a run of it on any layout.

Tokens and conditions go through ``TokenLayout`` and ``Family.arguments``; the loss is the squared difference of all
outputs to a target, so that no objective is needed. Nothing divides by anything.
"""

from dataclasses import dataclass, replace
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
from acceleration.config import CompileConfig, LoraConfig, MeshConfig, OptimConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.engines import build_engine
from acceleration.parallelize import parallelize
from acceleration.sequence import SequenceParallel
from opensora.assembly.token_layout import TokenLayout, forward_arguments, token_layout
from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.dit import DiTConfig
from opensora.models.families import build_model, describe, family_of
from opensora.models.latte import LatteConfig
from opensora.models.pixart import PixArtConfig, PixArtMSConfig, PixArtSigmaConfig
from opensora.planner.meta_model import structure
from opensora.train.packed_tokens import EncodedTokens, concat_packed
from opensora.utils.rng import torch_generator
from opensora.utils.tokens import Grid
from tests.dist.layouts import FP64, RECOMPUTE
from tests.dist.parity import AVERAGE, Outcome, average_by_hand, fill, measured_steps

CPU = torch.device("cpu")
STEPS, TEXT_TOKENS, PICTURE = 2, 5, 3
SGD = OptimConfig(kind="sgd", lr=0.05, clip_norm=0.3)
ADAMW = OptimConfig(kind="adamw", lr=0.01, clip_norm=0.3, weight_decay=0.1, eps=1e-8, ema_decay=0.9)
# (samples, T', H', W'): 2x4x5 tokens with patches of 2x2, a still, clips of few tokens
BUCKETS = ((2, 2, 8, 10), (1, 1, 10, 14), (3, 2, 4, 6))
EVEN = ((2, 4, 8, 10), (3, 2, 2, 6))  # for patches of two frames

_ADALN: dict[str, Any] = {"hidden_size": 32, "num_heads": 4, "mlp_ratio": 2.0, "caption_channels": 12}
_PIXART: dict[str, Any] = {
    **{"hidden_size": 36, "num_heads": 4, "mlp_ratio": 2.0, "depth": 2, "caption_channels": 12},
    **{"model_max_length": 4, "space_scale": 0.5, "time_scale": 2 / 3, "base_size": 7},
}
MODELS: dict[str, Any] = {
    "dit": DiTConfig(**_ADALN, depth=2),
    "dit_class": DiTConfig(**_ADALN, depth=2, condition="label_7", no_temporal_pos_emb=True),
    "dit_xl2x2": DiTConfig(**_ADALN, depth=2, patch_size=(2, 2, 2)),
    "latte": LatteConfig(**_ADALN, depth=3),
    "latte_class": LatteConfig(**_ADALN, depth=4, condition="label_7"),
    "pixart": PixArtConfig(**_PIXART),
    "pixart_ms": PixArtMSConfig(**_PIXART),
    "pixart_frozen": PixArtConfig(**_PIXART, freeze="text"),
    "pixart_qk": PixArtSigmaConfig(**_PIXART, qk_norm=True, input_size=(1, 8, 8)),
    "pixart_kv": PixArtSigmaConfig(
        **_PIXART, qk_norm=True, kv_compress_sampling="conv", kv_compress_scale_factor=2, kv_compress_layer=(1,)
    ),
}
EDGES = {  # the first and the last layer of tokens
    "wan": ("patch_embedding", "head.head"),
    "hunyuan_video": ("img_in.proj", "final_layer.linear"),
}


@dataclass(frozen=True)
class Sample:
    """A micro-batch of whole tokens."""

    x: Tensor
    positions: Tensor
    target: Tensor
    t: Tensor
    conditions: Conditions
    grid: Grid
    weight: float = 1.0


Pack = tuple[Sample, ...]  # in one sequence


def batches(cfg: Any, step: int) -> list[Sample]:
    """The micro-batches of a step, one per bucket; every step has other samples."""
    whole, denoising, found = token_layout(cfg, SequenceParallel(meshes.view({}))), describe(cfg), []
    for index, (samples, *latents) in enumerate(EVEN if denoising.patch[0] == 2 else BUCKETS):
        generator = torch_generator("chapters", step, index)
        grid = denoising.grid((latents[0], latents[1], latents[2]))

        def draw(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        x = draw(samples, denoising.latent_channels, *latents)
        target = [whole.patchify(draw(*x.shape)) for _ in range(denoising.outputs)]
        told = whole.patchify_conditions(conditions(cfg, samples, grid, generator, draw))
        found.append(
            Sample(
                whole.patchify(x),
                whole.positions(grid, samples, CPU),
                torch.cat(target, dim=-1),
                longest_time(cfg) * torch.rand(samples, generator=generator, dtype=torch.float64),
                told,
                grid,
            )
        )
    return found


def packs(cfg: Any, step: int) -> list[Pack]:
    """The samples of a step in two sequences."""
    first, *others = batches(cfg, step)
    return [(first, *others[1:]), (others[0],)]


def longest_time(cfg: Any) -> float:
    return 1.0 if describe(cfg).times == "unit" else 1000.0


def conditions(cfg: Any, samples: int, grid: Grid, generator: torch.Generator, draw: Any) -> Conditions:
    """Whatever the family reads; some samples are dropped, some frames known."""
    denoising, found = describe(cfg), dict[str, Any]()
    if denoising.text != "none":
        found["text"] = draw(samples, TEXT_TOKENS, denoising.text_dim)
        lengths = torch.randint(1, TEXT_TOKENS + 1, (samples, 1), generator=generator)
        found["text_mask"] = torch.arange(TEXT_TOKENS) < lengths
    if denoising.pooled_dim:
        found["pooled"] = draw(samples, denoising.pooled_dim)
    if denoising.num_classes:
        found["label"] = torch.randint(denoising.num_classes, (samples,), generator=generator)
    if denoising.null_text == "learned":
        found["dropped"] = torch.arange(samples) % 2 == 1
    if denoising.image_dim:
        found["image_tokens"] = draw(samples, PICTURE, denoising.image_dim)
    if denoising.references in ("in_place", "clip"):
        by_frame = torch.rand(samples, grid.latents[0], generator=generator) < 0.4
        found["known"] = by_frame[:, :, None, None].expand(samples, *grid.latents).clone()
    if denoising.references == "clip":
        found["reference"] = draw(samples, denoising.latent_channels, *grid.latents)
    if "size" in denoising.wants:
        found["size"] = 8.0 * torch.tensor(grid.latents[1:], dtype=torch.float64).expand(samples, 2)
    if "fps" in denoising.wants:
        found["fps"] = 8.0 + torch.arange(samples, dtype=torch.float64)
    if "guidance" in denoising.wants:
        found["guidance"] = 1.0 + torch.arange(samples, dtype=torch.float64)
    return Conditions(**found)


def elements(cfg: Any, step: int) -> int:
    """Output values of the whole step that the loss is over."""
    return sum(int(learned(cfg, sample).sum()) * sample.target.shape[-1] for sample in batches(cfg, step))


def learned(cfg: Any, sample: Sample) -> Tensor:
    """Tokens that the loss is over."""
    known = sample.conditions.known if describe(cfg).references == "in_place" else None
    return torch.ones(sample.x.shape[:-1], dtype=torch.bool) if known is None else ~known


def plain_model(cfg: Any) -> nn.Module:
    """On one process, as it is written."""
    model = build_model(cfg).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill(name, parameter)
    return model


def squares(model: nn.Module, cfg: Any, layout: TokenLayout, sample: Sample | Pack) -> Tensor:
    """Sum over this process's tokens."""
    if isinstance(sample, tuple):
        return packed_squares(model, cfg, layout, sample)
    tokens = TokenBatch(x=layout.shard(sample.x), positions=layout.shard(sample.positions), grid=sample.grid.sides)
    told = layout.shard_conditions(sample.conditions, sample.x)
    out = model(**forward_arguments(cfg, tokens, sample.t, told))
    difference = (out - layout.shard(sample.target)).square()
    return (difference * layout.shard(learned(cfg, sample))[..., None]).sum() * sample.weight


def packed_squares(model: nn.Module, cfg: Any, layout: TokenLayout, samples: Pack) -> Tensor:
    """The same of one sequence with all of these."""
    encoded = [
        EncodedTokens(x=s.x, positions=s.positions, targets={"": s.target}, t=s.t, conditions=s.conditions)
        for s in samples
    ]
    whole, of = concat_packed(encoded)
    mine = layout.shard_text(of[0]), layout.shard(of[1])
    tokens = TokenBatch(x=layout.shard(whole.x), positions=layout.shard(whole.positions), sample_of=mine)
    told = whole.conditions.map(image=layout.shard, text=layout.shard_text)
    told = replace(told, context=layout.sequence.packed_context(*of, CPU))
    out = model(**forward_arguments(cfg, tokens, whole.t, told))
    return (out - layout.shard(whole.targets[""])).square().sum() * samples[0].weight


def adapters_of(cfg: Any) -> LoraConfig:
    """On every layer that the family names for them, and on the first and last."""
    edges = EDGES.get(cfg.kind, ("x_embedder", "final_layer.linear"))
    return LoraConfig(rank=3, alpha=5.0, targets=(*family_of(cfg).lora_targets, *edges))


def adapted_by_hand(model: nn.Module, cfg: Any) -> dict[str, Tensor]:
    """Adapters, each added by a hook; all else frozen."""
    model.requires_grad_(False)
    with torch.device("meta"):
        names = lora.apply(build_model(cfg), adapters_of(cfg))
    found: dict[str, Tensor] = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        a = torch.empty(3, layer.in_features, dtype=torch.float64)
        b = torch.empty(layer.out_features, 3, dtype=torch.float64)
        for kind, value in (("A", a), ("B", b)):
            fill(f"{name}.lora_{kind}.weight", value)
            found[f"{name}.lora_{kind}.weight"] = value.requires_grad_()
        layer.register_forward_hook(lambda _, args, out, a=a, b=b: out + 5 / 3 * F.linear(F.linear(args[0], a), b))
    return found


def on_one_process(cfg: Any, optim: OptimConfig = SGD, *, adapters: bool = False) -> Outcome:
    """The truth, in plain torch."""
    model, layout = plain_model(cfg), token_layout(cfg, SequenceParallel(meshes.view({})))
    named: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if adapters:
        named = adapted_by_hand(model, cfg)
    parameters, steps = list(named.values()), []
    optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=optim.lr)
    if optim.kind == "adamw":
        optimizer = torch.optim.AdamW(
            parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )
    average = {name: p.detach().clone() for name, p in named.items()}
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for sample in batches(cfg, step):
            total = total + squares(model, cfg, layout, sample) / elements(cfg, step)
        total.backward()
        gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(parameters, optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        average = average_by_hand(average, named, step, optim.ema_decay)
        steps.append((total.item(), norm.item(), gradients))
    averages = {AVERAGE + name: value for name, value in average.items()} if optim.ema_decay else {}
    kept = named if adapters else dict(model.named_parameters())
    return Outcome(steps, {name: p.detach().clone() for name, p in kept.items()} | averages)


@dataclass(frozen=True)
class Run:
    """A model and a layout."""

    model: str  # of MODELS
    world: int
    axes: tuple[tuple[str, int], ...] = ()
    zero: int = 3
    recompute: str = "none"
    kind: str = "sgd"
    adapters: bool = False
    compiled: bool = False
    packed: bool = False

    def __str__(self) -> str:
        axes = "".join(f"-{axis}{degree}" for axis, degree in self.axes)
        more = "-lora" * self.adapters + "-compiled" * self.compiled + "-packed" * self.packed
        return f"{self.model}-{self.world}{axes}-zero{self.zero}-{self.recompute}-{self.kind}{more}"

    @property
    def optim(self) -> OptimConfig:
        return ADAMW if self.kind == "adamw" else SGD

    @property
    def config(self) -> ParallelConfig:
        mesh: dict[str, Any] = {"shard": -1} | dict(self.axes)
        zero: Any = self.zero
        found = ParallelConfig(zero=zero, mesh=MeshConfig(**mesh), precision=FP64, recompute=RECOMPUTE[self.recompute])
        return replace(found, compile=CompileConfig(enabled=True, backend="aot_eager")) if self.compiled else found


def idle(one: Sample | Pack) -> Sample | Pack:
    """It only keeps a process in step with its peers."""
    return replace(one, weight=0.0) if isinstance(one, Sample) else tuple(replace(s, weight=0.0) for s in one)


def on_this_layout(run: Run, cfg: Any) -> Outcome:
    """Runs in every process of the group."""
    parallel = run.config
    mesh = meshes.build(parallel.mesh, dist.get_world_size(), CPU)
    with torch.device("meta"):
        model = build_model(cfg)
    if run.adapters:
        lora.apply(model, adapters_of(cfg))
    parallelize(model, parallel, mesh, CPU, fill)
    engine = build_engine(model, parallel, run.optim, mesh)
    layout = token_layout(cfg, SequenceParallel(mesh))

    def mine(step: int) -> list[Any]:
        every: list[Any] = packs(cfg, step) if run.packed else list(batches(cfg, step))
        held = every[mesh.data_rank :: mesh.data_degree]
        return held + [idle(every[-1])] * (-(-len(every) // mesh.data_degree) - len(held))

    def backward(step: int) -> Tensor:
        total, held = torch.zeros((), dtype=torch.float64), mine(step)
        for index, sample in enumerate(held):
            share = squares(engine.model, cfg, layout, sample) / elements(cfg, step)
            engine.backward(share, last_microbatch=index == len(held) - 1)
            total += share.detach()
        return total

    def predicted(step: int) -> dict[str, int]:
        place = RankLayout(meshes.view({name: mesh[name].degree for name in meshes.AXES}, dist.get_rank()), parallel)
        known = describe(cfg).references == "in_place"
        made_of = structure(cfg, known, adapters_of(cfg) if run.adapters else None)
        return step_bytes(made_of, place, [sizes(sample) for sample in mine(step)])

    return measured_steps(engine, mesh, STEPS, backward, predicted, average=bool(run.optim.ema_decay))


@torch.no_grad()
def steps_of_sampling(model: nn.Module, cfg: Any, layout: TokenLayout) -> list[Tensor]:
    """Whole tokens of every bucket after three steps from noise, of which each process takes its own."""
    found = []
    for sample in batches(cfg, 0):
        x, told = layout.shard(sample.x), layout.shard_conditions(sample.conditions, sample.x)
        for t in (0.9, 0.5, 0.1):
            tokens = TokenBatch(x=x, positions=layout.shard(sample.positions), grid=sample.grid.sides)
            out = model(**forward_arguments(cfg, tokens, torch.full_like(sample.t, t * longest_time(cfg)), told))
            x = x - 0.4 * out[..., : x.shape[-1]].tanh()
        found.append(layout.gather(x, sample.grid).clone())
    return found


def sampled(cfg: Any) -> list[Tensor]:
    """On one process."""
    return steps_of_sampling(plain_model(cfg), cfg, token_layout(cfg, SequenceParallel(meshes.view({}))))


def sampled_on_these_layouts(runs: list[Run], configs: dict[str, Any]) -> list[list[Tensor]]:
    """Runs in every process of the group; all have all samples, shared by the processes of a sample."""
    found = []
    for run in runs:
        parallel, cfg = run.config, configs[run.model]
        mesh = meshes.build(parallel.mesh, dist.get_world_size(), CPU)
        with torch.device("meta"):
            model = build_model(cfg)
        parallelize(model, parallel, mesh, CPU, fill)
        found.append(steps_of_sampling(model.eval(), cfg, token_layout(cfg, SequenceParallel(mesh))))
    return found


def train_and_save(run: Run, cfg: Any, folder: Path, start: int, stop: int) -> dict[str, Tensor]:
    """Resume at ``start`` if it is not zero, run to ``stop``, save; all state as whole tensors, and the export."""
    parallel = run.config
    mesh = meshes.build(parallel.mesh, dist.get_world_size(), CPU)
    with torch.device("meta"):
        model = build_model(cfg)
    # A resumed run starts from other values than the first did: all that counts is in the checkpoint.
    parallelize(model, parallel, mesh, CPU, (lambda name, tensor: tensor.zero_()) if start else fill)  # type: ignore
    engine, layout = build_engine(model, parallel, run.optim, mesh), token_layout(cfg, SequenceParallel(mesh))
    manager = CheckpointManager(folder, keep=0)
    if start:
        state = engine.state_dict()
        manager.load(folder / f"step-{start:08d}", state)
        engine.load_state_dict(state)
    for step in range(start, stop):
        for sample in (mine := batches(cfg, step)):
            share = squares(engine.model, cfg, layout, sample) / elements(cfg, step) / mesh.data_degree
            engine.backward(share, last_microbatch=sample is mine[-1])
        engine.step(step)
    manager.save(stop, engine.state_dict(), {})
    flat = {f"{part}.{name}": value for part, values in engine.state_dict().items() for name, value in values.items()}
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor | tensor_shards.TensorShards)}
    found = {name: tensor_shards.whole(value, mesh["tensor"]).clone() for name, value in tensors.items()}
    return found | {f"exported.{name}": value.clone() for name, value in engine.full_weights("ema")}


def sizes(sample: Sample | Pack) -> MicroBatch:
    """As formulas see it; what is hidden of texts is not in a pack."""
    if isinstance(sample, tuple):
        masks = [s.conditions.text_mask for s in sample]
        txt, img = sum(int(m.sum()) for m in masks if m is not None), sum(s.x.shape[0] * s.x.shape[1] for s in sample)
        return MicroBatch(samples=1, txt=txt, img=img, packed=sum(len(s.x) for s in sample))
    text = sample.conditions.text
    factored = sample.x.ndim == 4
    return MicroBatch(
        samples=len(sample.x),
        txt=0 if text is None else text.shape[1],
        img=sample.grid.tokens,
        frames=sample.grid.frames if factored else None,
        has_mask=text is not None,
        picture=0 if sample.conditions.image_tokens is None else PICTURE,
    )


def on_these_layouts(runs: list[Run], configs: dict[str, Any]) -> list[Outcome]:
    """One after the other, in the same processes."""
    return [on_this_layout(run, configs[run.model]) for run in runs]
