"""What can be known of a sampling job before a process group exists or a model is loaded: does it fit together."""

import os
from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch

from acceleration.config import ParallelConfig
from acceleration.diagnostics.memory_usage import device_bytes, machine_bytes
from acceleration.distributed import mesh
from acceleration.protocol import block_names
from acceleration.sharding.precision import DTYPES
from opensora.assembly.step_caches import check_cache
from opensora.assembly.turns import for_sampling
from opensora.conditioning.references import parts_of
from opensora.config.run import RunConfig, SampleConfig, check_fit, check_objective
from opensora.inference.find import Source, names_motion
from opensora.inference.lengths import coded, latents_made
from opensora.inference.opensora_1x.check import check_placed
from opensora.inference.opensora_1x.sizes import clip_latents, video_frames
from opensora.inference.prompts import Job, told_of
from opensora.inference.references import (
    check_count,
    check_frames,
    check_length,
    check_references,
    chosen,
    count_frames,
    split,
)
from opensora.inference.watermark import read_watermark
from opensora.models.base import AutoencoderShape, ModelConfig, Width, latent_grid
from opensora.models.families import build_model, count_parameters, describe, other_encoders
from opensora.models.image import check_image_encoder
from opensora.models.text import check_prompts, check_text_encoder, num_classes, text_tokens
from opensora.models.vae import autoencoder_shape, check_autoencoder
from opensora.sampling.guidance import passes_per_step
from opensora.sampling.options import SamplingOption, sanitize_sampling_option
from opensora.schedulers import ObjectiveConfig, build_objective
from opensora.schedulers.iddpm import IDDPMConfig
from opensora.schedulers.rectified_flow_v1 import RectifiedFlowV1Config
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import short
from opensora.utils.respacing import spaced_steps

GIB = 2**30
PIXEL_BYTES = 3 * (4 + 1)  # of a decoded pixel: fp32, and the bytes that are written

CHAIN_SOLVERS = ("ddpm", "ddim")  # that step along a chain of a diffusion model
SOLVER_OPTIONS: dict[str, tuple[str, ...]] = {  # what belongs to some solvers alone
    "timestep_respacing": CHAIN_SOLVERS,
    "clip_denoised": CHAIN_SOLVERS,
    "eta": ("ddim",),
    "flow_shift": ("euler", "unipc", "dpm++"),
}


def check_sample(cfg: SampleConfig, source: Source, jobs: Sequence[Job], world_size: int) -> None:
    """Everything about the job that can be refused from texts and headers of files alone.

    Raises:
        UserError: the key to change, and what would work.
    """
    check_models(cfg, source)
    samples = min(cfg.batch_size, len(jobs))
    option = check_option("sampling", cfg.sampling, cfg, source, samples=samples, world_size=world_size)
    announce_size("sampling", cfg.sampling, option)
    announce_untrained_guidance(cfg.sampling, source)
    announce_untrained_times(source)
    check_jobs(cfg, source, jobs)
    read_watermark(cfg.watermark)
    if source.conditioning is None and (other := other_encoders(source.model, source.vae, source.text)):
        announce(other)


def check_models(cfg: SampleConfig, source: Source) -> None:
    """That the models of a job are there and fit together, and that there is a device to offload from.

    Raises:
        UserError: they do not, with the key.
    """
    try:
        check_fit(source.model, source.vae, source.text, source.image_encoder)
        check_objective(source.model, source.objective)
    except ValueError as error:
        raise UserError(str(error)) from None
    check_autoencoder(source.vae)
    latents = Width(autoencoder_shape(source.vae).channels, f"vae.kind={source.vae.kind}")
    check_text_encoder(source.text, latents, source.model)
    check_image_encoder(source.image_encoder, source.model)
    check_offload(cfg.offload)


def check_option(
    key: str, option: SamplingOption, cfg: SampleConfig, source: Source, *, samples: int, world_size: int
) -> SamplingOption:
    """The option with a size that the model can make; its method and solver fit the model, and its clips this machine.

    Args:
        key: the option's name, for messages.
        samples: clips that are denoised together.

    Raises:
        UserError: they do not.
    """
    made = fit_option(key, option, source.model, autoencoder_shape(source.vae))
    solver_of(key, option, source.objective)
    channels = describe(source.model).latent_channels
    if option.cfg_channel is not None and option.cfg_channel > channels:
        raise UserError(
            f"{key}.cfg_channel={option.cfg_channel}: must be at most {channels}, the latent channels of the model"
        )
    needed = least_bytes(
        made,
        source.model,
        autoencoder_shape(source.vae),
        samples=samples,
        txt=text_tokens(source.text),
        itemsize=DTYPES[cfg.precision].itemsize,
        parallel=replace(cfg.parallel, **for_sampling(cfg.parallel, cfg.offload)),
        world_size=world_size,
    )
    check_memory(key, made, needed)
    return made


def check_jobs(cfg: SampleConfig, source: Source, jobs: Sequence[Job]) -> None:
    """That the references of all clips can be read, and are what ``cond_type`` takes.

    Raises:
        UserError: the first that is not.
    """
    _check_texts(cfg, source, jobs)
    if cfg.goes_on:
        check_placed(cfg, source, jobs, solver_of("sampling", cfg.sampling, source.objective))
        return _check_video(cfg, source, len(jobs))
    listed = [split(job.ref) for job in jobs]
    for job, references in zip(jobs, listed, strict=True):
        with told_of(job):
            check_count(cfg.cond_type, len(references))
    if cfg.cond_type == "t2v":
        return
    check_references(source.model, source.objective, cfg.cond_type)
    if not any(listed):
        raise UserError(f"cond_type={cfg.cond_type}: needs references; give ref, or a table with a column ref")
    shape, frames = autoencoder_shape(source.vae), cfg.sampling.num_frames
    made = coded(cfg.sampling, describe(source.model), shape, cfg.cond_type)
    check_length(cfg.cond_type, latents_made(made, shape), frames, shape)
    counts: dict[str, int] = {}
    for job, references in zip(jobs, listed, strict=True):
        with told_of(job):
            counts |= {path: count_frames(path) for path in references if path not in counts}
            for part in parts_of(cfg.cond_type, shape) if references else ():
                path = references[chosen(cfg.cond_type, part)]
                check_frames(path, counts[path], part, cfg.cond_type)


def _check_video(cfg: SampleConfig, source: Source, clips: int) -> None:
    """That videos of several clips fit this machine, which holds all of their pixels; says how long they are."""
    if cfg.loop == 1:
        return
    denoising, shape = describe(source.model), autoencoder_shape(source.vae)
    made = fit_option("sampling", cfg.sampling, source.model, shape)
    assert made.height is not None and made.width is not None
    frames = video_frames(cfg, clip_latents(cfg, denoising, shape), shape, denoising.references)
    needed = min(cfg.batch_size, clips) * frames * made.height * made.width * PIXEL_BYTES
    check_memory("sampling", replace(made, num_frames=frames), needed)
    announce(f"loop={cfg.loop}: each video has {frames} frames, of clips of {cfg.sampling.num_frames}")


def _check_texts(cfg: SampleConfig, source: Source, jobs: Sequence[Job]) -> None:
    """That prompts are such as the text encoder reads."""
    if num_classes(source.text) and names_motion(cfg, source):
        raise UserError("prompt_suffix=true: must be false with text.kind=classes, which reads numbers")
    check_prompts(source.text, (text for job in jobs for text in (job.text, job.neg)))


def check_validation(cfg: RunConfig, world_size: int, clips: int) -> None:
    """That the samples which a run makes while it trains, so many together, fit this machine beside nothing else.

    Raises:
        UserError: they do not, with the estimate.
    """
    shape, key = autoencoder_shape(cfg.vae), "validate.sampling"
    option = fit_option(key, cfg.validate.sampling, cfg.model, shape)
    announce_size(key, cfg.validate.sampling, option)
    needed = least_bytes(
        option,
        cfg.model,
        shape,
        samples=clips,
        txt=text_tokens(cfg.text),
        itemsize=DTYPES[cfg.parallel.precision.compute].itemsize,
        parallel=cfg.parallel,
        world_size=world_size,
    )
    check_memory(key, option, needed)


def announce_untrained_guidance(option: SamplingOption, source: Source) -> None:
    """Say so where guidance moves away from what training never showed the model."""
    if source.conditioning and not source.conditioning.dropout.text and passes_per_step(option) > 1:
        announce(
            f"sampling.guidance={option.guidance:g}: the model was trained with conditioning.dropout.text=0, so it has "
            "never seen a clip without its prompt, which guidance moves away from; guidance=1 switches it off"
        )


def announce_untrained_times(source: Source) -> None:
    """Say so where the weights are of one of two experts, and the other is missing."""
    low, high = source.time_range
    if source.low_noise is None and (low, high) != (0.0, 1.0):
        announce(
            f"{source.path}: trained at times from {low:g} to {high:g} alone, and makes all steps; give both experts, "
            "the other one as weights or low_noise.weights"
        )


def announce_size(key: str, asked: SamplingOption, made: SamplingOption) -> None:
    """Say so where the size that was asked for is none that the model can make."""
    if asked.width is not None and (asked.width, asked.height) != (made.width, made.height):
        size = f"width={asked.width}, height={asked.height}"
        announce(f"{key}: {size} become {made.width}x{made.height}, the next whole tokens")


def fit_option(key: str, option: SamplingOption, model: ModelConfig, shape: AutoencoderShape) -> SamplingOption:
    """The option with a size that the model can make.

    Args:
        key: the section's name, for messages.

    Raises:
        UserError: a still for a model whose tokens span several latent frames, or a method that the model is not made
            for.
    """
    denoising, stride = describe(model), shape.stride
    reads_guidance, multiple = "guidance" in denoising.wants, denoising.pixel_multiple(stride)
    try:
        option = sanitize_sampling_option(option, multiple=multiple, rounds=not denoising.cuts_sizes(shape))
        denoising.check_frames(latents_made(coded(option, denoising, shape), shape))
    except ValueError as error:
        raise UserError(f"{key}.num_frames={option.num_frames}: {error}") from None
    check_step_cache(key, option, model)
    method = "distill" if reads_guidance else "i2v"
    if option.method != method:
        reads = "reads" if reads_guidance else "does not read"
        raise UserError(f"{key}.method={option.method}: must be {method}, as the model {reads} guidance as an input")
    return option


def check_offload(offload: str, key: str = "offload") -> None:
    """That there is a device to offload from.

    Raises:
        UserError: there is none.
    """
    if offload != "none" and not torch.cuda.is_available():
        raise UserError(f"{key}={offload}: needs a GPU, and this machine shows none; use {key}=none")


def check_step_cache(key: str, option: SamplingOption, model: ModelConfig) -> None:
    """That the model has what ``option.cache`` reuses.

    Raises:
        UserError: it has not.
    """
    if option.cache.kind == "none":
        return
    with torch.device("meta"):
        blocks = len(block_names(build_model(model)))
    try:
        check_cache(option.cache, model.kind, describe(model), blocks)
    except ValueError as error:
        raise UserError(f"{key}.{error}") from None


def least_bytes(
    option: SamplingOption,
    model: ModelConfig,
    shape: AutoencoderShape,
    *,
    samples: int,
    txt: int,
    itemsize: int,
    parallel: ParallelConfig,
    world_size: int,
) -> int:
    """What a process holds at least at one time, whatever the kernels: its share of the weights beside either the
    activations of one block, or the decoded clips.

    A lower bound, so that what it refuses could never have run: no attention matrix, no copies, nothing of the
    autoencoder's inside, and no text encoder.

    Args:
        option: with width and height.
        samples, txt: clips denoised together; text tokens of each, whether the model reads them or not.
        itemsize: bytes of a weight and an activation.
    """
    assert option.width is not None and option.height is not None
    degrees = mesh.resolve(parallel.mesh, world_size)
    denoising = describe(model)
    made = coded(option, denoising, shape)
    frames, rows, columns = latent_grid(made, option.height, option.width, shape)
    latents = frames * rows * columns
    patch = prod(denoising.patch)
    txt, tokens = denoising.text_tokens(txt), latents // patch // (degrees["ring"] * degrees["ulysses"])
    # Residual, queries, keys and values are whole on the process (tensor parallelism cuts the last three).
    widths = denoising.width * (1 + 3 / degrees["tensor"])
    block = int(samples * (tokens + txt / (degrees["ring"] * degrees["ulysses"])) * widths * itemsize)
    noise = samples * tokens * denoising.latent_channels * patch * 4
    clips = samples * (made * option.height * option.width * PIXEL_BYTES + latents * shape.channels * 4)
    whole = 0 if parallel.offload == "parameters" else count_parameters(model) * itemsize
    return max(whole // pieces(parallel, world_size) + block + noise, whole // world_size + clips)


def pieces(parallel: ParallelConfig, world_size: int) -> int:
    """Into how many pieces weights are cut while a model samples: below ZeRO 3 a process has all that tensor
    parallelism leaves it, as what was gathered stays."""
    degrees = mesh.resolve(parallel.mesh, world_size)
    return world_size // degrees["replicate"] if parallel.zero == 3 else degrees["tensor"]


def fitting_solvers(objective: ObjectiveConfig) -> dict[str, tuple[str, ...]]:
    """Solvers that fit what a model was trained for, the default first -> fields that are for others alone."""
    fitting = build_objective(objective).solvers
    return {one: tuple(name for name, owners in SOLVER_OPTIONS.items() if one not in owners) for one in fitting}


def solver_of(key: str, option: SamplingOption, objective: ObjectiveConfig) -> str:
    """The solver that ``option`` names, or the first that fits.

    Args:
        key: the section's name, for messages.

    Raises:
        UserError: one that does not fit what the model was trained for.
    """
    fitting = build_objective(objective).solvers
    if option.solver is not None and option.solver not in fitting:
        raise UserError(
            f"{key}.solver={short(option.solver)}: must be one of {', '.join(fitting)}, as the model was trained with "
            f"objective.kind={objective.kind}; null takes the first"
        )
    solver = option.solver or fitting[0]
    _check_solver_options(key, option, objective, solver)
    return solver


def _check_solver_options(key: str, option: SamplingOption, objective: ObjectiveConfig, solver: str) -> None:
    for name, owners in SOLVER_OPTIONS.items():
        value, default = getattr(option, name), SamplingOption.__dataclass_fields__[name].default
        if solver not in owners and value != default:
            raise UserError(
                f"{key}.{name}={short(repr(value))}: is for solver={' or '.join(owners)}, not {solver}; leave it out"
            )
    if isinstance(objective, RectifiedFlowV1Config):
        try:
            objective.check_frames(option.num_frames)
        except ValueError as error:
            raise UserError(f"{key}.num_frames={option.num_frames}: {error}") from None
    if not isinstance(objective, IDDPMConfig) or solver not in CHAIN_SOLVERS:
        return
    asked, name = option.timestep_respacing, "timestep_respacing"
    if asked is None:
        asked, name = str(option.num_steps), "num_steps"
    try:
        spaced_steps(asked, objective.diffusion_steps)
    except ValueError as error:
        raise UserError(f"{key}.{name}={asked}: {error}") from None


def check_memory(key: str, option: SamplingOption, needed: int) -> None:
    """That this machine could ever hold ``needed`` bytes for a process.

    Raises:
        UserError: it could not, with the estimate and the remedies.
    """
    device = device_bytes()
    room = device or machine_bytes()
    if device is None and room is not None:  # processes of a machine share its memory
        room //= max(1, _processes_here())
    if room is None or needed <= room:
        return
    clip = f"{option.num_frames} frames of {option.width}x{option.height}"
    owner = "a GPU" if device else "this machine, for each of its processes,"
    raise UserError(
        f"{key}: {clip} take at least {needed / GIB:.3g} GiB a process, and {owner} has {room / GIB:.3g} GiB; lower "
        f"{key}.num_frames, the size or batch_size, or share clips among more processes (parallel.mesh.ulysses) and "
        "weights as well (parallel.zero=3)"
    )


def _processes_here() -> int:
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 8 else 1
