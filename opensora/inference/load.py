"""Where models and acceleration meet for sampling: from a run, an export or a file to components that can sample.

Weights are read into the layout of this job, whatever layout wrote them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acceleration import mesh as meshes
from acceleration.checkpoint import CheckpointManager, newest
from acceleration.config import MeshConfig, PrecisionConfig
from acceleration.mesh import Mesh
from acceleration.parallelize import parallelize
from acceleration.precision import DTYPES
from acceleration.runtime import Runtime
from acceleration.sequence import SequenceParallel
from opensora.config import SAVED_NAME, RunConfig, SampleConfig, load_config
from opensora.models import MMDiTConfig, build_model
from opensora.models.base import Autoencoder, TextEncoder
from opensora.models.mmdit.convert import WeightLayout, load_state_dict_for
from opensora.models.text import build_text_encoder
from opensora.models.vae import build_autoencoder
from opensora.utils.errors import UserError
from opensora.utils.logging import announce


@dataclass(frozen=True, kw_only=True)
class Source:
    """Weights on disk, and what they are weights of."""

    path: Path
    checkpoint: Path | None  # a step directory of a run; None: safetensors at ``path``
    model: MMDiTConfig
    vae: Any
    text: Any
    prompt_suffix: bool  # training told the model frame rate and motion score


@dataclass(frozen=True, kw_only=True)
class Components:
    """Everything that sampling needs, on this process's device."""

    model: nn.Module
    cfg: MMDiTConfig
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    sequence: SequenceParallel
    mesh: Mesh
    device: torch.device
    prompt_suffix: bool


def find_source(cfg: SampleConfig) -> Source:
    """What ``cfg.weights`` holds; sections that ``cfg`` gives replace those saved with the weights.

    Raises:
        UserError: nothing there, a run without a complete checkpoint, or weights that come without a configuration.
    """
    path = Path(cfg.weights)
    if not path.exists():
        raise UserError(f"weights={path}: no such file or folder; give a run folder, an export folder or a safetensors")
    saved = load_config(RunConfig, path / SAVED_NAME) if (path / SAVED_NAME).is_file() else None
    sections: dict[str, Any] = {
        name: getattr(cfg, name) or (getattr(saved, name) if saved else None) for name in ("model", "vae", "text")
    }
    for name, value in sections.items():
        if value is None:
            raise UserError(f"{name}: missing; {path} has no {SAVED_NAME} beside the weights, so say {name}.kind=...")
    checkpoint = None
    if (path / "checkpoints").is_dir():
        try:
            checkpoint = newest(path / "checkpoints")
        except ValueError as error:
            raise UserError(f"weights={path}: {error}") from None
        if checkpoint is None:
            raise UserError(f"weights={path}: the run has no checkpoint yet; train it, or give an export folder")
    return Source(path=path, checkpoint=checkpoint, prompt_suffix=bool(saved and saved.data.prompt_suffix), **sections)


def check_layout(mesh: MeshConfig, world_size: int, num_heads: int) -> None:
    """That this many processes can be arranged as asked.

    Raises:
        UserError: the key to change, and what would work.
    """
    try:
        degree = meshes.resolve(mesh, world_size)["ulysses"]
    except ValueError as error:
        raise UserError(f"parallel.mesh: {error}") from None
    if num_heads % degree:
        allowed = ", ".join(str(d) for d in range(1, num_heads + 1) if num_heads % d == 0)
        raise UserError(
            f"parallel.mesh.ulysses={degree}: does not divide model.num_heads={num_heads}; allowed are {allowed}"
        )


def load_components(cfg: SampleConfig, source: Source, runtime: Runtime) -> Components:
    """Build and shard the model, and read its weights. Collective.

    Raises:
        UserError: weights that do not fit the model.
    """
    mesh = meshes.build(cfg.parallel.mesh, runtime.world_size, runtime.device)
    precision = PrecisionConfig(compute=cfg.precision, reduce="fp32", master=cfg.precision)
    parallel = replace(cfg.parallel, precision=precision)
    with torch.device("meta"):
        model = build_model(source.model)
    if source.checkpoint is None:
        parallelize(model, parallel, mesh, runtime.device, _from_file(source, model))
    else:
        parallelize(model, parallel, mesh, runtime.device, lambda name, tensor: None)
        _read_checkpoint(source.checkpoint, model, use_ema=cfg.use_ema)
    model.requires_grad_(False).eval()
    dtype = DTYPES[cfg.precision]
    return Components(
        model=model,
        cfg=source.model,
        autoencoder=build_autoencoder(source.vae, runtime.device, dtype),
        text_encoder=build_text_encoder(source.text, runtime.device, dtype),
        sequence=SequenceParallel(mesh["ulysses"]),
        mesh=mesh,
        device=runtime.device,
        prompt_suffix=source.prompt_suffix,
    )


def weight_layout(cfg: MMDiTConfig) -> WeightLayout:
    """How this model names and orders its weights."""
    return WeightLayout(fused_qkv=cfg.fused_qkv, rope_layout=cfg.rope_layout)


def _from_file(source: Source, model: nn.Module) -> Callable[[str, Tensor], None]:
    state, report = load_state_dict_for(model, source.path, to=weight_layout(source.model))
    announce(str(report))
    return lambda name, tensor: tensor.copy_(state[name])  # type: ignore[return-value]


def _read_checkpoint(path: Path, model: nn.Module, *, use_ema: bool) -> None:
    """Fill the sharded model from a training checkpoint: its moving average, if there is one and it is wanted."""
    manager = CheckpointManager(path.parent, keep=0)
    which = "ema" if use_ema and manager.has(path, "ema") else "model"
    manager.load(path, {which: {name: parameter.detach() for name, parameter in model.named_parameters()}})
    announce(f"{path}: read {'the moving average' if which == 'ema' else 'the live weights'}")
