"""Where models and acceleration meet for sampling: from a run, an export or a file to components that can sample.

Weights are read into the layout of this job, whatever layout wrote them.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acceleration import lora
from acceleration.checkpoint import CheckpointManager, newest, tensor_shards
from acceleration.checkpoint.atomic_dir import MANIFEST
from acceleration.checkpoint.listing import candidates
from acceleration.config import LoraConfig, PrecisionConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed.comm_timer import WAITING
from acceleration.distributed.runtime import Runtime
from acceleration.parallelize import parallelize
from acceleration.protocol import ParameterSource
from acceleration.sequence import SequenceParallel
from acceleration.sharding import fsdp
from acceleration.sharding.precision import DTYPES
from opensora.assembly.components import Components, tile_runner
from opensora.assembly.initial_weights import AdapterSource, FileSource, check_weights, weight_layout
from opensora.assembly.token_layout import token_layout
from opensora.config.load import load_config
from opensora.config.run import SAVED_NAME, RunConfig, SampleConfig
from opensora.models.base import ModelConfig
from opensora.models.families import build_model, family_of
from opensora.models.mmdit.convert import (
    FLUX,
    AdapterPlan,
    WeightLayout,
    convert_shapes,
    load_state_dict_for,
    plan_adapter,
)
from opensora.models.text import build_text_encoder
from opensora.models.vae import build_autoencoder
from opensora.models.weights.adapters import CONFIG, WEIGHTS, Adapter, FittedAdapter, is_adapter, read_adapter
from opensora.schedulers import OBJECTIVE_CONFIGS, ObjectiveConfig
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files import digests
from opensora.utils.files.safetensors_files import fingerprint
from opensora.utils.files.user_files import absence


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """What is added to the weights: exported adapters, or those of a LoRA run's checkpoint."""

    lora: LoraConfig | None  # of a run; None: as ``exported`` says
    exported: FittedAdapter | None
    checkpoint: Path | None  # a step directory, where ``exported`` is None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Weights on disk, and what they are weights of."""

    path: Path
    checkpoint: Path | None  # a step directory of a run; None: safetensors at ``path``
    adapters: Adapters | None
    model: ModelConfig
    vae: Any
    text: Any
    objective: ObjectiveConfig  # that it was trained with
    prompt_suffix: bool  # training told the model frame rate and motion score


def find_source(cfg: SampleConfig) -> Source:
    """What ``cfg.weights`` holds; sections that ``cfg`` gives replace those saved with the weights.

    A LoRA run and its export hold adapters: the weights are then those they were trained beside.

    Raises:
        UserError: nothing there, a run without a complete checkpoint, weights that come without a configuration, or
            adapters that do not fit them.
    """
    path = Path(cfg.weights)
    if reason := absence(path):
        raise UserError(f"weights={path}: {reason}; give a run folder, an export folder or a safetensors file")
    kind, run = part_of_run(path)
    if run is not None and not candidates(path / "checkpoints"):
        raise UserError(f"weights={path}: is {kind}; give the run's folder, weights={run}, whose newest one is read")
    of_lora = part_of_run(Path(cfg.lora)) if cfg.lora else ("", None)
    if of_lora[1] is not None:
        raise UserError(
            f"lora={cfg.lora}: is {of_lora[0]}; give lora={of_lora[1] / 'exported'}, or weights={of_lora[1]}"
        )
    saved = _saved_config(path if path.is_dir() else path.parent)
    sections: dict[str, Any] = {
        name: getattr(cfg, name) or (getattr(saved, name) if saved else None) for name in ("model", "vae", "text")
    }
    for name, value in sections.items():
        if value is None:
            raise UserError(f"{name}: missing; {path} has no {SAVED_NAME} beside the weights, so say {name}.kind=...")
    objective = cfg.objective or (saved.objective if saved else default_objective(sections["model"]))
    checkpoint = _newest(path)
    held = _held_adapters(path, checkpoint, saved, sections["model"])
    adapters = _exported(Path(cfg.lora), sections["model"], "lora") if cfg.lora else None
    if held:
        if adapters:
            raise UserError(f"lora={cfg.lora}: {path} holds adapters already; give the weights that they belong to")
        adapters, base = held
        if base is None or absence(base):
            raise UserError(
                f"weights={path}: its adapters belong to {base}, which is not there; give weights= and lora="
            )
        path, checkpoint = Path(base), None
    if adapters and adapters.exported and checkpoint is None:
        exported = adapters.exported.adapter
        wanted = exported.metadata.get("base")
        if wanted and wanted != fingerprint(path):
            announce(f"{path}: not the weights that the adapters of {exported.path} were trained beside")
    if checkpoint is None:
        check_weights("weights", path, sections["model"])  # what does not fit is said before anything is built
        digests.read_digests(path if path.is_dir() else path.parent)  # and so is a list that cannot be read
    return Source(
        path=path,
        checkpoint=checkpoint,
        adapters=adapters,
        objective=objective,
        prompt_suffix=bool(saved and saved.data.prompt_suffix),
        **sections,
    )


def default_objective(model: ModelConfig) -> ObjectiveConfig:
    """What weights without a configuration beside them were trained with: as those that the family publishes."""
    return OBJECTIVE_CONFIGS[family_of(model).objective]()


def part_of_run(path: Path) -> tuple[str, Path | None]:
    """(what ``path`` is of a training run, the run's folder), for messages; None: nothing where checkpoints are."""
    whole = Path(os.path.abspath(path))
    if candidates(path / "checkpoints"):
        return "the folder of a run", path
    if candidates(path):
        return "the checkpoints of a run", whole.parent
    if os.path.lexists(path / MANIFEST) and (whole in candidates(whole.parent) or any(path.glob("shard-*"))):
        return "one checkpoint of a run", whole.parents[1]
    return "", None


def _saved_config(path: Path) -> RunConfig | None:
    """What a run or an export says of itself; None where it says nothing."""
    if not (path / SAVED_NAME).is_file():
        return None
    try:
        return load_config(RunConfig, path / SAVED_NAME)
    except UserError as error:
        digests.verify(path, [SAVED_NAME])  # then damage is the better reason
        raise UserError(
            f"weights={path}: {error}; a run's next start writes its {SAVED_NAME} anew, an export's is exported again"
        ) from None


def verify_export(*places: Path) -> None:
    """That exported files at ``places`` (folders, or files in one) are those that were exported, as far as their
    folder has a list of digests. Every process reads its share of the files. Collective.

    Raises:
        UserError: the first file that is not, on every process.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    problem = next((said for said in (_damaged(place, rank, world) for place in places) if said), None)
    everyone: list[str | None] = [None] * world
    with WAITING.on("agreement on the digests of weights"):
        dist.all_gather_object(everyone, problem)
    said = next((one for one in everyone if one is not None), None)
    if said is not None:
        raise UserError(said)


def _damaged(place: Path, rank: int, world: int) -> str | None:
    one_file = place.is_file() and place.suffix != ".json"
    folder = place if place.is_dir() else place.parent
    try:
        listed = digests.read_digests(folder)
    except UserError as error:
        return str(error)
    if listed is None:
        return None
    if one_file and place.name not in listed and rank == 0:
        announce(f"{place}: not in {digests.NAME} beside it, so its bytes are not checked")
    names = sorted(listed, key=lambda name: (-(folder / name).stat().st_size, name))[rank::world]
    return digests.damaged(folder, [name for name in names if not one_file or name == place.name], listed)


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
    last = candidates(run / "checkpoints")[-1]
    if last != checkpoint:
        announce(f"weights={run}: {last.name} is damaged; {checkpoint.name} is sampled from instead")
    return checkpoint


def _held_adapters(
    path: Path, checkpoint: Path | None, saved: RunConfig | None, model: ModelConfig
) -> tuple[Adapters, str | None] | None:
    """The adapters of a LoRA run or of its export, and where their base is; None where whole weights are."""
    if is_adapter(path):
        adapters = _exported(path, model, "weights")
        assert adapters.exported is not None
        return adapters, adapters.exported.adapter.base or (saved.train.init_from if saved else None)
    if checkpoint and saved and saved.lora.rank:
        return Adapters(lora=saved.lora, exported=None, checkpoint=checkpoint), saved.train.init_from
    return None


def _exported(path: Path, model: ModelConfig, key: str) -> Adapters:
    """Adapters of a folder or a file, as the model's layers need them.

    Raises:
        UserError: they do not fit the model.
    """
    layout = weight_layout(model)
    try:
        adapter = read_adapter(path)
    except UserError:
        if path.is_dir():
            digests.verify(path, [WEIGHTS, CONFIG])  # then damage is the better reason
        raise
    try:
        fitted, plan = fit_adapter(adapter, _shapes(model), layout)
    except ValueError as error:
        raise UserError(f"{key}={path}: {error}; these adapters belong to another model") from None
    announce(f"{key}={path}: {_described(adapter)}{f', names behind {plan.prefix}' if plan.prefix else ''}")
    if plan.guessed:
        announce(
            f"{key}={path}: does not say its rope_layout; taken for {plan.guessed} by the names of its layers, and put "
            f"into the order of model.rope_layout={layout.rope_layout}"
        )
    return Adapters(lora=None, exported=fitted, checkpoint=None)


def _described(adapter: Adapter) -> str:
    """How many adapters, of which rank and scale."""

    def span(values: list[float]) -> str:
        low, high = f"{min(values):g}", f"{max(values):g}"
        return low if low == high else f"{low} to {high}"

    ranks = [adapter.matrices(layer)[0].shape[0] for layer in adapter.layers]
    return f"adapters of {len(ranks)} layers, rank {span([*ranks])}, alpha/rank {span([*adapter.scales.values()])}"


def fit_adapter(
    adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], layout: WeightLayout
) -> tuple[FittedAdapter, AdapterPlan]:
    """Adapters as the layers of a model of these parameters need them.

    Raises:
        ValueError: a layer that the model does not have, or one of another size.
    """
    plan = plan_adapter(adapter.sizes(), shapes, layout, adapter.metadata)
    outputs = {name.removesuffix(".weight"): shape[0] for name, shape in shapes.items() if shape}
    return FittedAdapter(adapter, plan.pieces, outputs), plan


def flux_adapter(
    model: ModelConfig, tensors: Mapping[str, Tensor], scale: float
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Adapters of a model of ours for the layers of the same model in the Flux layout: (tensors, layer -> scale)."""
    layout = weight_layout(model)
    scales = {name.removesuffix(f".{lora.A}"): scale for name in tensors if name.endswith(lora.A)}
    ours = Adapter(path=Path(), base=None, tensors=dict(tensors), scales=scales, metadata=layout.metadata())
    fitted, _ = fit_adapter(ours, convert_shapes(_shapes(model), source=layout, to=FLUX), FLUX)
    sizes = fitted.sizes()
    names = [f"{layer}.{kind}" for layer in sizes for kind in (lora.A, lora.B)]
    return {name: fitted.tensor(name) for name in names}, {layer: scale for layer, (_, scale) in sizes.items()}


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build_model(model).state_dict().items()}


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
    exported = [source.path] if source.checkpoint is None else []
    if source.adapters and source.adapters.exported:
        exported.append(source.adapters.exported.adapter.path)
    verify_export(*exported)
    file = _from_file(source, model) if source.checkpoint is None else None
    fill: ParameterSource = file or _leave
    adapters = source.adapters
    if adapters:
        if adapters.exported:
            lora.attach(model, adapters.exported.sizes())
        elif adapters.lora:
            lora.apply(model, adapters.lora)
        fill = lora.LoraSource(fill, AdapterSource(adapters.exported) if adapters.exported else _leave)
    parallelize(model, parallel, mesh, runtime.device, fill)
    if file:
        file.check_values()
    if source.checkpoint:
        _read_checkpoint(source.checkpoint, model, use_ema=cfg.use_ema, adapters=False)
    if adapters:
        if adapters.checkpoint:
            _read_checkpoint(adapters.checkpoint, model, use_ema=cfg.use_ema, adapters=True)
        fsdp.merge_adapters(model, cfg.lora_scale)
    model.requires_grad_(False).eval()
    dtype = DTYPES[cfg.precision]
    autoencoder = build_autoencoder(source.vae, runtime.device, dtype)
    return Components(
        model=model,
        cfg=source.model,
        autoencoder=autoencoder,
        text_encoder=build_text_encoder(source.text, runtime.device, dtype),
        objective=source.objective,
        layout=token_layout(source.model, SequenceParallel(mesh)),
        mesh=mesh,
        device=runtime.device,
        prompt_suffix=source.prompt_suffix,
        run_tiles=tile_runner(cfg.vae_parallel, autoencoder, mesh),
    )


def _from_file(source: Source, model: nn.Module) -> FileSource:
    file, report = load_state_dict_for(model, source.path, to=weight_layout(source.model))
    announce(str(report))
    return FileSource(file, source.path)


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
    manager.load(path, {which: tensor_shards.wrap(model, weights)})
    announce(f"{path}: read {'the moving average' if which == 'ema' else 'the live weights'}")
