"""What a process needs to sample: found from the configuration alone, on the meta device."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from acceleration.config import PrecisionConfig
from acceleration.distributed import mesh as meshes
from opensora.assembly.reference_codes import codes_whole
from opensora.assembly.turns import DENOISER, LOW_NOISE, TEXT
from opensora.conditioning.references import parts_of
from opensora.config.run import SampleConfig
from opensora.inference.batches import kind_of
from opensora.inference.check import fit_option
from opensora.inference.find import Source, source_of
from opensora.inference.lengths import coded
from opensora.inference.prompts import Job
from opensora.inference.stills import clips_of, still_job
from opensora.models.families import describe
from opensora.models.vae import autoencoder_shape
from opensora.planner.devices import DEVICES, Device
from opensora.planner.sampling_forecast import Reuse, SamplingForecast, SamplingJob, sampling_forecast
from opensora.sampling.caches import CacheConfig, NoCache, PyramidAttentionBroadcast, plan_of
from opensora.sampling.guidance import passes_of_steps
from opensora.utils.errors import UserError

STILLS = "still "  # put before the turns of the model that makes first frames


def memory_of(cfg: SampleConfig, source: Source, world: int, device: Device = DEVICES["h100"]) -> SamplingForecast:
    """Memory of a process of ``world`` and time of a batch, with the stills that are made first. Encoders are as large
    as the published ones.

    Raises:
        UserError: a size or length that cannot be sampled, or a mesh that does not fit so many processes.
    """
    try:
        meshes.resolve(cfg.parallel.mesh, world)
    except ValueError as error:
        raise UserError(f"parallel.mesh: {error}") from None
    job = job_of(clips_of(cfg), source)
    if cfg.still is None:
        return _of_experts(job, source, world, device)
    still, of_stills = still_job(cfg, world, source_of)
    made = sampling_forecast(job_of(still, of_stills), world, device)
    # A text encoder that only the stills read stays until the job ends, where nothing moves it out.
    left = made.weights[TEXT] if of_stills.text != source.text and cfg.offload == "none" else 0
    return _of_experts(job, source, world, device, beside=left).behind(made, STILLS)


def _of_experts(job: SamplingJob, source: Source, world: int, device: Device, *, beside: int = 0) -> SamplingForecast:
    """Of a job whose steps one model makes or two, of which the second stays on the device if it has room for both."""
    one = sampling_forecast(job, world, device, beside=beside)
    if source.low_noise is None:
        return one
    found = one
    if job.offload == "none":
        both = sampling_forecast(job, world, device, beside=beside + one.weights[DENOISER])
        found = both if both.peak <= device.memory else one
    changes: dict[str, Any] = {
        name: getattr(found, name) | {LOW_NOISE: getattr(found, name)[DENOISER]}
        for name in ("kept", "weights", "turns")
    }
    return replace(found, **changes)  # seconds are those of all steps


def job_of(cfg: SampleConfig, source: Source, jobs: Sequence[Job] | None = None) -> SamplingJob:
    """A batch of the job, as the planner wants it.

    Args:
        jobs: its clips; None: as many as a batch, with the references that ``cfg.cond_type`` takes.

    Raises:
        UserError: a size or length that cannot be sampled.
    """
    shape = autoencoder_shape(source.vae)
    option = fit_option("sampling", cfg.sampling, source.model, shape)
    assert option.width is not None and option.height is not None
    kind, denoising = cfg.cond_type if jobs is None else kind_of(cfg, jobs), describe(source.model)
    frames = coded(option, denoising, shape, kind)
    known = max((part.frames for part in parts_of(kind, shape)), default=0)
    precision = PrecisionConfig(compute=cfg.precision, reduce="fp32", master=cfg.precision)
    return SamplingJob(
        model=source.model,
        vae=source.vae,
        text=source.text,
        image_encoder=source.image_encoder,
        parallel=replace(cfg.parallel, precision=precision),
        offload=cfg.offload,
        samples=cfg.batch_size,
        frames=frames,
        height=option.height,
        width=option.width,
        passes_of_steps=passes_of_steps(option, references=denoising.three_passes(kind != "t2v")),
        reuse=reuse_of(option.cache),
        known_frames=frames if known and codes_whole(denoising) else known,
        shares_tiles=cfg.vae_parallel != "off",
        clips=cfg.batch_size if jobs is None else len(jobs),
    )


def reuse_of(cache: CacheConfig) -> Reuse:
    """What a step cache keeps. A first part that always runs leaves its tokens beside those that the others start from
    (``BlockCache``); a change is that of one copy of the image tokens."""
    if isinstance(cache, NoCache):
        return Reuse()
    if isinstance(cache, PyramidAttentionBroadcast):
        every = {"joint": cache.spatial, "space": cache.spatial, "time": cache.temporal, "cross": cache.cross}
        return Reuse(axes=frozenset(axis for axis, steps in every.items() if steps > 1))
    plan = plan_of(cache)
    return Reuse(added=1, signals=int(plan.first > 0 or plan.modulated), carried=1 + (plan.first > 0))
