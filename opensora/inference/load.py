"""Where models and acceleration meet for sampling: from a run, an export or a file to components that can sample.

Weights are read into the layout of this job, whatever layout wrote them.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acceleration import kernels, lora, sharding, tensor_parallel
from acceleration import mesh as meshes
from acceleration.checkpoint import CheckpointManager, newest, pieces
from acceleration.config import LoraConfig, MeshConfig, PrecisionConfig
from acceleration.mesh import SAMPLE_AXES, Mesh
from acceleration.parallelize import parallelize
from acceleration.plan import Fill
from acceleration.precision import DTYPES
from acceleration.runtime import Runtime
from acceleration.sequence import SequenceParallel
from acceleration.work import SharedWork
from opensora.config import SAVED_NAME, RunConfig, SampleConfig, VaeParallel, load_config
from opensora.models import MMDiTConfig, build_model
from opensora.models.base import Autoencoder, TextEncoder
from opensora.models.mmdit.convert import WeightFile, WeightLayout, load_state_dict_for
from opensora.models.text import build_text_encoder
from opensora.models.vae import build_autoencoder
from opensora.utils.adapters import Adapter, is_adapter, read_adapter
from opensora.utils.errors import UserError
from opensora.utils.logging import announce
from opensora.utils.sampling import SamplingOption, passes_per_step
from opensora.utils.weights import fingerprint
from opensora.utils.work import RunAll, one_by_one


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """What is added to the weights: exported adapters, or those of a LoRA run's checkpoint."""

    lora: LoraConfig
    exported: Adapter | None
    checkpoint: Path | None  # a step directory, where ``exported`` is None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Weights on disk, and what they are weights of."""

    path: Path
    checkpoint: Path | None  # a step directory of a run; None: safetensors at ``path``
    adapters: Adapters | None
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

    A LoRA run and its export hold adapters: the weights are then those they were trained beside.

    Raises:
        UserError: nothing there, a run without a complete checkpoint, weights that come without a configuration, or
            adapters that do not fit them.
    """
    path = Path(cfg.weights)
    if not os.path.exists(path):
        raise UserError(f"weights={path}: no such file or folder; give a run folder, an export folder or a safetensors")
    saved = load_config(RunConfig, path / SAVED_NAME) if (path / SAVED_NAME).is_file() else None
    sections: dict[str, Any] = {
        name: getattr(cfg, name) or (getattr(saved, name) if saved else None) for name in ("model", "vae", "text")
    }
    for name, value in sections.items():
        if value is None:
            raise UserError(f"{name}: missing; {path} has no {SAVED_NAME} beside the weights, so say {name}.kind=...")
    checkpoint = _newest(path)
    held = _held_adapters(path, checkpoint, saved, sections["model"])
    adapters = _exported(Path(cfg.lora), sections["model"], "lora") if cfg.lora else None
    if held:
        if adapters:
            raise UserError(f"lora={cfg.lora}: {path} holds adapters already; give the weights that they belong to")
        adapters, base = held
        if base is None or not Path(base).exists():
            raise UserError(
                f"weights={path}: its adapters belong to {base}, which is not there; give weights= and lora="
            )
        path, checkpoint = Path(base), None
    if adapters and adapters.exported and checkpoint is None:
        wanted = adapters.exported.metadata.get("base")
        if wanted and wanted != fingerprint(path):
            announce(f"{path}: not the weights that the adapters of {adapters.exported.path} were trained beside")
    if checkpoint is None:
        with torch.device("meta"):  # what does not fit is said before anything is built
            load_state_dict_for(build_model(sections["model"]), path, to=weight_layout(sections["model"]))
    return Source(
        path=path,
        checkpoint=checkpoint,
        adapters=adapters,
        prompt_suffix=bool(saved and saved.data.prompt_suffix),
        **sections,
    )


def _newest(run: Path) -> Path | None:
    """The newest checkpoint of a run; None for anything else."""
    if not (run / "checkpoints").is_dir():
        return None
    try:
        checkpoint = newest(run / "checkpoints")
    except ValueError as error:
        raise UserError(f"weights={run}: {error}") from None
    if checkpoint is None:
        raise UserError(f"weights={run}: the run has no checkpoint yet; train it, or give an export folder")
    return checkpoint


def _held_adapters(
    path: Path, checkpoint: Path | None, saved: RunConfig | None, model: MMDiTConfig
) -> tuple[Adapters, str | None] | None:
    """The adapters of a LoRA run or of its export, and where their base is; None where whole weights are."""
    if is_adapter(path):
        adapters = _exported(path, model, "weights")
        assert adapters.exported is not None
        return adapters, adapters.exported.base
    if checkpoint and saved and saved.lora.rank:
        return Adapters(lora=saved.lora, exported=None, checkpoint=checkpoint), saved.train.init_from
    return None


def _exported(path: Path, model: MMDiTConfig, key: str) -> Adapters:
    """Adapters of a folder, checked layer by layer against the model."""
    exported = read_adapter(path)
    cfg = LoraConfig(rank=exported.rank, alpha=exported.alpha, targets=exported.layers)
    with torch.device("meta"):
        adapted = build_model(model)
    try:
        lora.apply(adapted, cfg)
    except ValueError as error:
        raise UserError(f"{key}={path}: {error}; these adapters belong to another model") from None
    wanted = {name: tuple(p.shape) for name, p in adapted.named_parameters() if lora.is_adapter(name)}
    found = {name: tuple(tensor.shape) for name, tensor in exported.tensors.items()}
    if wanted != found:
        name = next(name for name in (*wanted, *found) if wanted.get(name) != found.get(name))
        raise UserError(f"{key}={path}: {name} is {found.get(name)}, and would be {wanted.get(name)} for this model")
    for name, value in weight_layout(model).metadata().items():
        if exported.metadata.get(name, value) != value:
            raise UserError(f"{key}={path}: made for {name}={exported.metadata[name]}; set model.{name} to that")
    return Adapters(lora=cfg, exported=exported, checkpoint=None)


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


def check_attention(name: str) -> None:
    """That this machine has the attention kernel that ``parallel.attention`` names.

    Raises:
        UserError: what is missing, and what would work.
    """
    try:
        kernels.check_kernel(name, "cuda" if torch.cuda.is_available() else "cpu")
    except ValueError as error:
        raise UserError(f"parallel.{error}") from None


def check_guidance(mesh: MeshConfig, world_size: int, option: SamplingOption) -> None:
    """That every process along the cfg axis has a pass of guidance to compute.

    Raises:
        UserError: the key to change, and what would work.
    """
    degree, passes = meshes.resolve(mesh, world_size)["cfg"], passes_per_step(option)
    if degree <= passes:
        return
    if passes > 1:
        why = f"text to video is guided by {passes} passes per step (a third needs references)"
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
    file = _from_file(source, model) if source.checkpoint is None else None
    fill: Fill = file or _leave
    adapters = source.adapters
    if adapters:
        lora.apply(model, adapters.lora)
        tensors = adapters.exported.tensors if adapters.exported else None
        fill = lora.Filled(fill, _leave if tensors is None else FromDict(tensors))
    parallelize(model, parallel, mesh, runtime.device, fill)
    if file:
        file.check_values()
    if source.checkpoint:
        _read_checkpoint(source.checkpoint, model, use_ema=cfg.use_ema, adapters=False)
    if adapters:
        if adapters.checkpoint:
            _read_checkpoint(adapters.checkpoint, model, use_ema=cfg.use_ema, adapters=True)
        sharding.merge_adapters(model, cfg.lora_scale)
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


@dataclass(frozen=True)
class FromFile:
    """Where parameters get their values: from a file, of which each process reads its pieces, or from elsewhere."""

    file: WeightFile
    path: Path
    otherwise: Callable[[str, Tensor], None] | None = None  # writes a full parameter that the file lacks
    not_finite: list[str] = field(default_factory=list)  # what this process has read so far that holds NaN or infinity

    def read_part(self, name: str, start: tuple[int, ...], part: Tensor) -> bool:
        """See ``Partial`` in acceleration/plan.py."""
        found = self.file.read_part(name, start, part)
        if found and not torch.isfinite(part).all():
            self.not_finite.append(f"{name} (as {str(part.dtype).removeprefix('torch.')})")
        return found

    def check_values(self) -> None:
        """That what all processes read are finite numbers. Collective.

        Raises:
            UserError: the first tensor that is not, on every process.
        """
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self.not_finite)
        names = list(dict.fromkeys(name for found in everyone for name in found))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{self.path}: {names[0]}{more} holds NaN or infinite values; give weights without")

    def __call__(self, name: str, tensor: Tensor) -> None:
        assert self.otherwise is not None, name  # loading is strict
        self.otherwise(name, tensor)


@dataclass(frozen=True)
class FromDict:
    """Where parameters get their values: from tensors that every process holds."""

    tensors: dict[str, Tensor]

    def __call__(self, name: str, tensor: Tensor) -> None:
        tensor.copy_(self.tensors[name])


def _from_file(source: Source, model: nn.Module) -> FromFile:
    file, report = load_state_dict_for(model, source.path, to=weight_layout(source.model))
    announce(str(report))
    return FromFile(file, source.path)


def _leave(name: str, tensor: Tensor) -> None:
    """The value of a parameter that a checkpoint will overwrite."""


def _read_checkpoint(path: Path, model: nn.Module, *, use_ema: bool, adapters: bool) -> None:
    """Fill the sharded model's weights, or its adapters, from a training checkpoint whose bytes are checked first.

    Its moving average, if there is one and it is wanted.

    Raises:
        UserError: the checkpoint is damaged.
    """
    manager = CheckpointManager(path.parent, keep=0)
    try:
        manager.named(path)
    except ValueError as error:
        raise UserError(f"{error}; move it away to sample from the one before") from None
    which = "ema" if use_ema and manager.has(path, "ema") else "model"
    weights = {name: p.detach() for name, p in model.named_parameters() if lora.is_adapter(name) == adapters}
    manager.load(path, {which: pieces.wrap(model, weights)})
    announce(f"{path}: read {'the moving average' if which == 'ema' else 'the live weights'}")
