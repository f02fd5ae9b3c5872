"""From a run, an export or a file to components that can sample: models are built, sharded and filled.

Weights are read into the layout of this job, whatever layout wrote them.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acceleration import lora
from acceleration.blocks import block_streaming
from acceleration.checkpoint import CheckpointManager, tensor_shards
from acceleration.config import PrecisionConfig
from acceleration.diagnostics.memory_usage import device_bytes
from acceleration.distributed import mesh as meshes
from acceleration.distributed.comm_timer import WAITING
from acceleration.distributed.runtime import Runtime
from acceleration.parallelize import parallelize
from acceleration.protocol import ParameterSource
from acceleration.sequence import SequenceParallel
from acceleration.sharding import fsdp
from acceleration.sharding.precision import DTYPES
from opensora.assembly.components import Components, LowNoiseExpert, tile_runner
from opensora.assembly.initial_weights import AdapterSource, FileSource
from opensora.assembly.sharded_text import image_encoder_of, text_encoder_of
from opensora.assembly.token_layout import token_layout
from opensora.assembly.turns import AUTOENCODER, DENOISER, IMAGE, LOW_NOISE, TEXT, Turns, for_sampling, streams_blocks
from opensora.config.run import SampleConfig
from opensora.inference.check import fit_option, least_bytes, pieces
from opensora.inference.find import Source, low_noise_job, names_motion
from opensora.models.base import Autoencoder, TextEncoder
from opensora.models.families import build_model, count_parameters, family_of
from opensora.models.image import ImageEncoderConfig
from opensora.models.text import TextConfig, text_tokens
from opensora.models.vae import autoencoder_shape, build_autoencoder
from opensora.models.weights.reader import load_state_dict_for
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files import digests

ROOM = 0.8  # of a device: what two experts may take there, beside all that ``least_bytes`` does not count


@dataclass(frozen=True, kw_only=True)
class LoadedText:
    """A text encoder that several models of a job read, and whose turn it is on the device."""

    cfg: TextConfig
    encoder: TextEncoder
    turns: Turns


def load_components(
    cfg: SampleConfig, source: Source, runtime: Runtime, text: LoadedText | None = None, *, name: str = ""
) -> Components:
    """Build and shard the model, and read its weights. Collective.

    Args:
        text: of a model that was loaded before: its text encoder is used, if it is of the same configuration.
        name: put before the names of model and autoencoder in the account of turns, where several are loaded.

    Raises:
        UserError: weights that do not fit the model.
    """
    mesh = meshes.build(cfg.parallel.mesh, runtime.world_size, runtime.device)
    dtype = DTYPES[cfg.precision]
    # Before the denoiser, which they then do not lie beside.
    text = text if text and text.cfg == source.text else _load_text(cfg, source, runtime, mesh)
    turns = text.turns
    autoencoder: Autoencoder = turns.of(
        name + AUTOENCODER, build_autoencoder(source.vae, runtime.device, dtype), cfg.offload
    )
    image_encoder = _load_image(cfg, source, runtime, mesh, turns)
    model = load_denoiser(cfg, source, runtime, mesh)
    turns.told_by(model, name + DENOISER)
    low, models = None, {name + DENOISER: model}
    if source.low_noise is not None and cfg.low_noise is not None:
        of_low = low_noise_job(cfg, cfg.low_noise)
        low = LowNoiseExpert(
            model=load_denoiser(of_low, source.low_noise.source, runtime, mesh), boundary=source.low_noise.boundary
        )
        turns.told_by(low.model, name + LOW_NOISE)
        models[name + LOW_NOISE] = low.model
        announce(_told_of_experts(cfg, source, mesh))
    if cfg.offload == "models" or (low is not None and takes_turns(cfg, source, mesh)):
        for turn, one in models.items():
            turns.add(turn, [one])
    return Components(
        model=model,
        cfg=source.model,
        autoencoder=autoencoder,
        text_encoder=text.encoder,
        image_encoder=image_encoder,
        turns=turns,
        objective=source.objective,
        layout=token_layout(source.model, SequenceParallel(mesh)),
        mesh=mesh,
        device=runtime.device,
        low_noise=low,
        prompt_suffix=names_motion(cfg, source),
        published_prompts=source.conditioning is None,
        run_tiles=tile_runner(cfg.vae_parallel, autoencoder, mesh),
    )


def load_denoiser(cfg: SampleConfig, source: Source, runtime: Runtime, mesh: meshes.Mesh) -> nn.Module:
    """The model of ``source``, sharded, with its weights and adapters. Collective.

    Raises:
        UserError: weights that do not fit the model, or are not those that were exported.
    """
    precision = PrecisionConfig(compute=cfg.precision, reduce="fp32", master=cfg.precision)
    parallel = replace(cfg.parallel, precision=precision, **for_sampling(cfg.parallel, cfg.offload))
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
    streams = cfg.offload == "blocks" and streams_blocks(mesh)
    parallelize(model, parallel, mesh, runtime.device, fill, whole_on_host=streams)
    if file:
        file.check_values()
    if source.checkpoint:
        _read_checkpoint(source.checkpoint, model, use_ema=cfg.use_ema, adapters=False)
    if adapters:
        if adapters.checkpoint:
            _read_checkpoint(adapters.checkpoint, model, use_ema=cfg.use_ema, adapters=True)
        fsdp.merge_adapters(model, cfg.lora_scale)
        if adapters.exported:
            fsdp.add_differences(model, adapters.exported.differences, cfg.lora_scale)
    model.requires_grad_(False).eval()
    if streams:
        block_streaming.apply(model, runtime.device)
    return model


def takes_turns(cfg: SampleConfig, source: Source, mesh: meshes.Mesh) -> bool:
    """Whether two experts take turns on a device that has no room for both, where ``offload`` does not say so."""
    room = device_bytes()
    if cfg.offload != "none" or room is None:
        return False
    shape = autoencoder_shape(source.vae)
    one = least_bytes(
        fit_option("sampling", cfg.sampling, source.model, shape),
        source.model,
        shape,
        samples=cfg.batch_size,
        txt=text_tokens(source.text),
        itemsize=DTYPES[cfg.precision].itemsize,
        parallel=cfg.parallel,
        world_size=mesh.world_size,
    )
    weights = count_parameters(source.model) * DTYPES[cfg.precision].itemsize
    return one + weights // pieces(cfg.parallel, mesh.world_size) > ROOM * room


def _told_of_experts(cfg: SampleConfig, source: Source, mesh: meshes.Mesh) -> str:
    assert source.low_noise is not None
    if cfg.offload == "blocks":
        where = "their blocks come to the device one by one"
    elif cfg.offload == "models" or takes_turns(cfg, source, mesh):
        where = "they take turns on the device"
    else:
        where = "both stay on the device"
    return f"two experts, the second below time {source.low_noise.boundary:g}: {where}"


def text_of(parts: Components, source: Source) -> LoadedText:
    """The text encoder of loaded components, for another model."""
    assert parts.turns is not None
    return LoadedText(cfg=source.text, encoder=parts.text_encoder, turns=parts.turns)


def _load_text(cfg: SampleConfig, source: Source, runtime: Runtime, mesh: meshes.Mesh) -> LoadedText:
    turns = Turns(runtime.device)
    encoder = text_encoder_of(source.text, mesh, runtime.device, DTYPES[cfg.precision])
    offload = "none" if _is_placed(source.text) else cfg.offload
    return LoadedText(cfg=source.text, encoder=turns.of(TEXT, encoder, offload), turns=turns)


def _load_image(cfg: SampleConfig, source: Source, runtime: Runtime, mesh: meshes.Mesh, turns: Turns) -> Any:
    """The image encoder, whose calls take their turn; None: there is none."""
    encoder = image_encoder_of(source.image_encoder, mesh, runtime.device, DTYPES[cfg.precision])
    offload = "none" if _is_placed(source.image_encoder) else cfg.offload
    return encoder if encoder is None else turns.of(IMAGE, encoder, offload)


def _is_placed(text: TextConfig | ImageEncoderConfig) -> bool:
    """Whether the encoder's own section says that its weights are not on the device between uses."""
    return getattr(text, "device", "auto") == "cpu" or bool(getattr(text, "offload", False))


def _from_file(source: Source, model: nn.Module) -> FileSource:
    format = family_of(source.model).weights
    file, report = load_state_dict_for(model, source.path, format, to=format.layout(source.model))
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
    saved, state = manager.manifest(path)["tensors"], {which: dict[str, Tensor](), "model": dict[str, Tensor]()}
    for name, parameter in model.named_parameters():
        if lora.is_adapter(name) == adapters:  # what was not trained has no average
            state[which if f"{which}.{name}" in saved else "model"][name] = parameter.detach()
    manager.load(path, {section: tensor_shards.wrap(model, weights) for section, weights in state.items()})
    announce(f"{path}: read {'the moving average' if which == 'ema' else 'the live weights'}")


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
