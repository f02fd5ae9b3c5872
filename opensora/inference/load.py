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
from acceleration import tensor_parallel
from acceleration.checkpoint import CheckpointManager, newest, pieces
from acceleration.config import MeshConfig, PrecisionConfig
from acceleration.mesh import SAMPLE_AXES, Mesh
from acceleration.parallelize import parallelize
from acceleration.precision import DTYPES
from acceleration.runtime import Runtime
from acceleration.sequence import SequenceParallel
from acceleration.work import SharedWork
from opensora.config import SAVED_NAME, RunConfig, SampleConfig, VaeParallel, load_config
from opensora.models import MMDiTConfig, build_model
from opensora.models.base import Autoencoder, TextEncoder
from opensora.models.mmdit.convert import WeightLayout, load_state_dict_for
from opensora.models.text import build_text_encoder
from opensora.models.vae import build_autoencoder
from opensora.utils.errors import UserError
from opensora.utils.logging import announce
from opensora.utils.sampling import SamplingOption, passes_per_step
from opensora.utils.work import RunAll, one_by_one


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
    run_tiles: RunAll = one_by_one  # who codes the tiles of a clip


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


def check_layout(mesh: MeshConfig, world_size: int, model: MMDiTConfig) -> None:
    """That this many processes can be arranged as asked, and can share the model's heads.

    Raises:
        UserError: the key to change, and what would work.
    """
    try:
        degrees = meshes.resolve(mesh, world_size)
    except ValueError as error:
        raise UserError(f"parallel.mesh: {error}") from None
    tensor, ulysses, ring = degrees["tensor"], degrees["ulysses"], degrees["ring"]
    if tensor > 1:
        try:
            with torch.device("meta"):
                tensor_parallel.check(build_model(model), tensor)
        except ValueError as error:
            allowed = ", ".join(str(d) for d in range(1, model.num_heads + 1) if model.num_heads % d == 0)
            raise UserError(f"parallel.mesh.{error}; divisors of model.num_heads are {allowed}") from None
    heads = model.num_heads // tensor
    if ulysses > heads:
        best = max(d for d in range(1, heads + 1) if (ring * ulysses) % d == 0)
        raise UserError(
            f"parallel.mesh.ulysses={ulysses}: more than the {heads} heads that each process holds; "
            f"use ulysses={best} with ring={ring * ulysses // best}"
        )
    if heads % ulysses:
        announce(
            f"parallel.mesh.ulysses={ulysses} does not divide {heads} heads: some processes attend with "
            f"{-(-heads // ulysses)} heads, others with {heads // ulysses}"
        )


def check_guidance(mesh: MeshConfig, world_size: int, option: SamplingOption) -> None:
    """That every process along the cfg axis has a pass of guidance to compute.

    Raises:
        UserError: the key to change, and what would work.
    """
    degree, passes = meshes.resolve(mesh, world_size)["cfg"], passes_per_step(option)
    if degree <= passes:
        return
    if passes > 1:
        why = f"text to video is guided by {passes} passes per step"
    elif option.method == "distill":
        why = "sampling.method=distill makes one pass per step"
    else:
        why = f"sampling.guidance={option.guidance:g} is off, one pass per step"
    raise UserError(
        f"parallel.mesh.cfg={degree}: {why}; set parallel.mesh.cfg={passes}, and ring, ulysses or shard=-1 for the rest"
    )


def tile_runner(choice: VaeParallel, autoencoder: Autoencoder, mesh: Mesh) -> RunAll:
    """Who codes the tiles of a clip: the processes that work on the same samples together, or each all of them."""
    if choice == "off" or (choice == "auto" and not autoencoder.is_costly):
        return one_by_one
    return SharedWork(*(mesh[name] for name in SAMPLE_AXES))


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
    autoencoder = build_autoencoder(source.vae, runtime.device, dtype)
    return Components(
        model=model,
        cfg=source.model,
        autoencoder=autoencoder,
        text_encoder=build_text_encoder(source.text, runtime.device, dtype),
        sequence=SequenceParallel(mesh),
        mesh=mesh,
        device=runtime.device,
        prompt_suffix=source.prompt_suffix,
        run_tiles=tile_runner(cfg.vae_parallel, autoencoder, mesh),
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
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    manager.load(path, {which: pieces.wrap(model, weights)})
    announce(f"{path}: read {'the moving average' if which == 'ema' else 'the live weights'}")
