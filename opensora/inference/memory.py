"""What a process needs to sample: found from the configuration alone, on the meta device."""

from dataclasses import replace

from acceleration.config import PrecisionConfig
from acceleration.distributed import mesh as meshes
from opensora.conditioning.references import parts_of
from opensora.config.run import SampleConfig
from opensora.inference.check import fit_option
from opensora.inference.find import Source
from opensora.inference.lengths import coded
from opensora.models.families import describe
from opensora.models.vae import autoencoder_shape
from opensora.planner.devices import DEVICES, Device
from opensora.planner.sampling_forecast import SamplingForecast, SamplingJob, sampling_forecast
from opensora.sampling.caches import PyramidAttentionBroadcast, needs
from opensora.sampling.guidance import passes_per_step
from opensora.utils.errors import UserError


def memory_of(cfg: SampleConfig, source: Source, world: int, device: Device = DEVICES["h100"]) -> SamplingForecast:
    """Memory of a process of ``world`` and time of a batch. Encoders are as large as the published ones.

    Raises:
        UserError: a size or length that cannot be sampled, or a mesh that does not fit so many processes.
    """
    try:
        meshes.resolve(cfg.parallel.mesh, world)
    except ValueError as error:
        raise UserError(f"parallel.mesh: {error}") from None
    return sampling_forecast(job_of(cfg, source), world, device.flops)


def job_of(cfg: SampleConfig, source: Source) -> SamplingJob:
    """A batch of the job, as the planner wants it.

    Raises:
        UserError: a size or length that cannot be sampled.
    """
    shape = autoencoder_shape(source.vae)
    option = fit_option("sampling", cfg.sampling, source.model, shape)
    assert option.width is not None and option.height is not None
    cache = option.cache
    reuse = "attention" if isinstance(cache, PyramidAttentionBroadcast) else "blocks" if needs(cache)[0] else ""
    precision = PrecisionConfig(compute=cfg.precision, reduce="fp32", master=cfg.precision)
    return SamplingJob(
        model=source.model,
        vae=source.vae,
        text=source.text,
        parallel=replace(cfg.parallel, precision=precision),
        offload=cfg.offload,
        samples=cfg.batch_size,
        frames=coded(option, describe(source.model), shape),
        height=option.height,
        width=option.width,
        steps=option.num_steps,
        passes=passes_per_step(option, references=cfg.cond_type != "t2v"),
        reuse=reuse,
        known_frames=max((part.frames for part in parts_of(cfg.cond_type, shape)), default=0),
    )
