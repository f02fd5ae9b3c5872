"""A small run on any device, by the entry points that training and sampling use. What changes with them changes here.

Everything a run does on its device is done: prepare (encode, draw, corrupt, cut), forward, backward, the guard's update
(norm, clipping, optimizer, average), the state for a checkpoint, and its file.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.checkpoint import CheckpointManager
from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import Mesh
from acceleration.engines import Engine, build_engine
from acceleration.parallelize import parallelize
from opensora.assembly.components import Components
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.datasets.buckets.bucket import Bucket
from opensora.datasets.loading.reader import Batch, PackedBatch
from opensora.inference.pipeline import _predict, build_api, conditions_of
from opensora.models.conditions import Conditions
from opensora.models.families import build_model, describe
from opensora.models.vae import autoencoder_shape
from opensora.sampling.guidance import build_guidance
from opensora.sampling.loop import denoise
from opensora.sampling.options import SamplingOption
from opensora.schedulers.euler import Euler
from opensora.schedulers.timesteps import get_schedule
from opensora.train.health.anomaly_guard import AnomalyGuard
from opensora.train.preparation import Preparation, loss_share
from opensora.train.setup import build_preparation
from opensora.utils.rng import torch_generator

Enter = Callable[[str], None]
CPU = torch.device("cpu")
STEPS = 2
# (samples, frames, height, width): a clip of two, a still, three of another shape.
SHAPES = ((2, 5, 16, 24), (1, 1, 32, 16), (3, 5, 16, 16))
BASE: dict[str, Any] = {
    "name": "device",
    "model": {
        "kind": "mmdit",
        "hidden_size": 64,
        "num_heads": 4,
        "depth": 2,
        "depth_single_blocks": 2,
        "axes_dim": [4, 6, 6],
        "in_channels": 24,
        "patch_size": 1,
        "context_in_dim": 64,
        "vec_in_dim": 64,
        "cond_embed": True,
    },
    "vae": {"kind": "dct", "channels": 24},
    "text": {"kind": "bytes", "dim": 64, "depth": 1, "max_words": 6},
    "conditioning": {"dropout": {"text": 0.5, "pooled": 0.5}},
    "data": {"table": "none.csv", "buckets": {"32px": {1: [1.0, 1]}}},
    "parallel": {"zero": 3, "precision": {"compute": "fp32"}},
    "optim": {"lr": 1e-3, "clip_norm": 0.3, "ema_decay": 0.9, "eps": 1e-8},
    "train": {"steps": STEPS},
}


def config(changes: dict[str, Any] | None = None) -> RunConfig:
    """The base with these keys changed, as ``{"parallel.zero": 2}``."""
    overrides = [f"{key}={value}" for key, value in (changes or {}).items()]
    return load_config(RunConfig, BASE, overrides)


@dataclass
class Outcome:
    """What a run came to, on one process."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)  # the average, whole, on the CPU
    pixels: Tensor | None = None
    waits: list[Any] = field(default_factory=list)
    operators: int = 0


@dataclass
class Trainer:
    """The parts of a run that work on its device."""

    cfg: RunConfig
    mesh: Mesh
    engine: Engine
    prepare: Preparation
    guard: AnomalyGuard
    device: torch.device


def values(name: str, tensor: Tensor) -> None:
    """Weights that are all alive; the model's own start at zero would hide most of the network."""
    tensor.copy_(torch.randn(tensor.shape, generator=torch_generator("weights", name), dtype=torch.float64) * 0.1)


def build(cfg: RunConfig, device: torch.device) -> Trainer:
    """As opensora/train/setup.py, but for files, logs and the watchdog."""
    mesh = meshes.build(cfg.parallel.mesh, dist.get_world_size(), device)
    with torch.device("meta"):
        model = build_model(cfg.model)
    parallelize(model, cfg.parallel, mesh, device, values)
    engine = build_engine(model, cfg.parallel, cfg.optim, mesh)
    return Trainer(cfg, mesh, engine, build_preparation(cfg, mesh, device), AnomalyGuard(cfg.guard), device)


def batches(cfg: RunConfig, step: int) -> list[Batch | PackedBatch]:
    """The micro-batches of a step, as the loader hands them over."""
    every = [_batch(step, index, shape) for index, shape in enumerate(SHAPES)]
    return [PackedBatch(tuple(every))] if cfg.data.tokens_per_sequence else list(every)


def _batch(step: int, index: int, shape: Sequence[int]) -> Batch:
    samples, frames, height, width = shape
    generator = torch_generator("pixels", step, index)
    ids = tuple(100 * step + 10 * index + i for i in range(samples))
    return Batch(
        pixels=torch.randint(0, 256, (samples, 3, frames, height, width), generator=generator).to(torch.uint8),
        prompts=[f"a clip {'of words ' * (i % 4)}{i}" for i in ids],
        sample_ids=ids,
        bucket=Bucket("32px", frames, height, width, samples),
        fps=torch.full((samples,), 24.0),
        epoch=0,
        weight=1.0,
        degree=1 if samples > 1 else None,
    )


def elements(cfg: RunConfig) -> int:
    """Latent values of a step."""
    stride, channels = 8, autoencoder_shape(cfg.vae).channels
    return sum(
        samples * channels * ((frames - 1) // 4 + 1) * (height // stride) * (width // stride)
        for samples, frames, height, width in SHAPES
    )


def one_step(trainer: Trainer, step: int) -> tuple[float, float]:
    """(loss, norm) of update ``step``: the body of opensora/train/loop.py."""
    cfg, engine = trainer.cfg, trainer.engine
    engine.set_lr(cfg.optim.lr)
    loss = torch.zeros((), dtype=torch.float32).to(trainer.device)
    every = batches(cfg, step)
    for index, batch in enumerate(every):
        tokens = trainer.prepare(batch, step)
        share = loss_share(engine.model, tokens, elements(cfg))
        engine.backward(share, last_microbatch=index == len(every) - 1)
        loss += share.detach()
    update = trainer.guard.update(engine, trainer.mesh, step, loss)
    assert update.bad is None
    return update.loss, update.grad_norm


def run(cfg: RunConfig, device: torch.device, enter: Enter, sampled: Sequence[dict[str, Any]]) -> Outcome:
    """Train, save in the background, load into another trainer, and sample as every element of ``sampled`` says.

    Args:
        enter: is told what begins: build, step, save, load, sample.
    """
    enter("build")
    trainer, found = build(cfg, device), Outcome()
    enter("step")
    steps = [one_step(trainer, step) for step in range(STEPS)]
    found.losses, found.norms = [list(column) for column in zip(*steps, strict=True)]
    with shared_folder() as folder:
        enter("save")
        path = save(trainer, folder, in_background=True)
        enter("load")
        other = build(cfg, device)
        load(other, path)
    found.weights = dict(other.engine.full_weights("ema" if cfg.optim.ema_decay else "live"))
    enter("sample")
    with torch.no_grad():
        clips = [sample(trainer, **option) for option in sampled]
        if sampled and reads_references(cfg):
            clips.append(with_references(trainer))
    enter("end")
    found.pixels = torch.cat(clips).cpu() if clips else None
    return found


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A temporary folder that every process of the group knows."""
    with tempfile.TemporaryDirectory() as own:
        names = [own]
        dist.broadcast_object_list(names)
        yield Path(names[0])
        dist.barrier()


def save(trainer: Trainer, folder: Path, *, in_background: bool) -> Path:
    """The state as a checkpoint."""
    manager = CheckpointManager(folder, keep=1, in_background=in_background)
    manager.save(STEPS, trainer.engine.state_dict(), {})
    manager.wait()
    path = manager.latest()
    manager.close()
    assert path is not None
    return path


def load(trainer: Trainer, path: Path) -> None:
    """The state of a checkpoint in place of the trainer's."""
    manager = CheckpointManager(path.parent, keep=1)
    state = trainer.engine.state_dict()
    manager.load(path, state)
    trainer.engine.load_state_dict(state)


def components(trainer: Trainer) -> Components:
    """What sampling needs, around the same model."""
    cfg, encoders = trainer.cfg, trainer.prepare.encoders
    assert encoders.autoencoder is not None
    return Components(
        model=trainer.engine.model,
        cfg=cfg.model,
        autoencoder=encoders.autoencoder,
        text_encoder=encoders.text_encoder,
        objective=cfg.objective,
        layout=trainer.prepare.layout,
        mesh=trainer.mesh,
        device=trainer.device,
        prompt_suffix=True,
    )


def sample(trainer: Trainer, **option: Any) -> Tensor:
    """Pixels of two prompts."""
    chosen = SamplingOption(width=24, height=16, num_frames=5, num_steps=2, **option)
    return build_api(components(trainer))(chosen, text=["a red circle", "blue"], neg=["", "gray"])


def reads_references(cfg: RunConfig) -> bool:
    """Whether the model takes known frames, and is guided by passes."""
    denoising = describe(cfg.model)
    return denoising.references != "none" and "guidance" not in denoising.wants


def with_references(trainer: Trainer) -> Tensor:
    """Pixels of a clip whose first frame is known: three passes a step. Sampling has no command for it yet."""
    parts, device = components(trainer), trainer.device
    layout, prompts = parts.layout, ["a red circle", "blue"]
    grid = layout.denoising.grid((2, 2, 3))
    x = layout.patchify(torch.randn(2, 24, *grid.latents, generator=torch_generator("noise")).to(device))
    positions = layout.shard(layout.positions(grid, 2, device))
    known = torch.zeros(2, *grid.latents, dtype=torch.bool)
    known[:, 0] = True
    latents = torch.randn(2, 24, *grid.latents, generator=torch_generator("known")) * known[:, None]
    frames = layout.patchify_conditions(Conditions(reference=latents.to(device), known=known.to(device)))
    frames = layout.shard_conditions(frames, x)
    option = SamplingOption(width=24, height=16, num_frames=5, image_osci=True, scale_temporal_osci=True)
    told = conditions_of(parts, prompts, x, option)
    found = denoise(
        _predict(parts, parts.model, positions, grid),
        layout.shard(x),
        Euler(get_schedule(2, 6, 2)),
        build_guidance(option, references=True, steps=2, latent_frames=2, positions=positions),
        replace(told, reference=frames.reference, known=frames.known),
        conditions_of(parts, ["", ""], x, option),
    )
    return parts.autoencoder.decode(layout.unpatchify(layout.gather(found, grid), grid))
