"""What sampling takes, before it is started: memory of every turn, and time.

Text encoder, denoiser and autoencoder take turns (``opensora/assembly/turns.py``); the turn that takes most decides.
Each is run on the meta device at its true sizes, the denoiser with a few of its blocks. Time is products at
``EFFICIENCY`` of the peak: what a step cache leaves out depends on the clips, and is not left out here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from acceleration.accounting import peak_memory
from acceleration.accounting.activation_memory import Timeline, forward_timeline, spread
from acceleration.accounting.model_profile import ModelProfile
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import ParallelConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from acceleration.sequence import SequenceParallel
from acceleration.sharding.precision import DTYPES
from opensora.assembly.turns import AUTOENCODER, DENOISER, TEXT, SampleOffload, forecast
from opensora.models.base import ModelConfig, latent_grid
from opensora.models.families import describe
from opensora.models.text import TextConfig, has_mask, text_tokens
from opensora.models.vae import AutoencoderConfig, autoencoder_shape
from opensora.planner.coding_memory import decode_bytes, decode_flops, encode_bytes
from opensora.planner.encoder_memory import encoder_bytes, text_flops, text_working_bytes
from opensora.planner.forecast import EFFICIENCY, Forecaster
from opensora.planner.meta_model import denoiser_inputs, meta_model, shortened, stand_ins, structure

LATENT_COPIES = 6  # of a clip's latents in fp32: noise, whole and cut, those of the step, and predictions


@dataclass(frozen=True, kw_only=True)
class SamplingJob:
    """A batch of clips, as the planner wants it; sizes are those that are made."""

    model: ModelConfig
    vae: AutoencoderConfig
    text: TextConfig
    parallel: ParallelConfig  # with the precision that is sampled in
    offload: SampleOffload
    samples: int
    frames: int
    height: int
    width: int
    steps: int
    passes: int  # of a step with the most
    reuse: str = ""  # what a step cache keeps between steps: "" nothing, "blocks", "attention"
    known_frames: int = 0  # pixels of the longest reference that is coded by itself

    @property
    def batch(self) -> MicroBatch:
        denoising = describe(self.model)
        grid = denoising.grid(latent_grid(self.frames, self.height, self.width, autoencoder_shape(self.vae)))
        return MicroBatch(
            samples=self.samples,
            txt=denoising.text_tokens(text_tokens(self.text)),
            img=grid.tokens,
            frames=grid.frames if denoising.token_axes == "factored" else None,
            has_mask=has_mask(self.text),
        )


@dataclass(frozen=True)
class SamplingForecast:
    """Bytes of the process that needs most, and seconds of a batch."""

    kept: dict[str, int]  # of weights, by turn
    turns: dict[str, int]  # most, by turn
    seconds: dict[str, float]  # by turn

    @property
    def peak(self) -> int:
        return max(self.turns.values())

    def plain(self) -> dict[str, Any]:
        """For JSON; memory in GiB."""
        return {
            "peak_gib": self.peak / 2**30,
            "turns_gib": {name: size / 2**30 for name, size in self.turns.items()},
            "weights_gib": {name: size / 2**30 for name, size in self.kept.items()},
            "seconds": self.seconds,
        }


def sampling_forecast(job: SamplingJob, world: int, flops: float, device_type: str = "cuda") -> SamplingForecast:
    """Of one batch on ``world`` processes.

    Args:
        flops: of a device, per second, at its peak.

    Raises:
        ValueError: a mesh that does not fit so many processes.
    """
    place = RankLayout(meshes.view(meshes.resolve(job.parallel.mesh, world), 0, device_type), job.parallel)
    profile = structure(job.model)
    itemsize = place.itemsize("compute")
    pieces = max(1, world // place.mesh["replicate"].degree)
    autoencoder, text = encoder_bytes(job.vae, job.text, itemsize, pieces)
    denoiser = peak_memory.forward_peak(profile, place, _line(job, place, device_type))
    beside = _latent_bytes(job) + _reused_bytes(job, profile, place)
    kept = {TEXT: text, DENOISER: denoiser.weights, AUTOENCODER: autoencoder}
    working = {
        TEXT: text_working_bytes(job.text, itemsize, pieces, job.samples * job.passes),
        DENOISER: denoiser.total - denoiser.weights + beside,
        AUTOENCODER: _coding_bytes(job),
    }
    turns = {name: forecast_turn(job, name, working[name], kept, profile, place) for name in kept}
    return SamplingForecast(kept, turns, _seconds(job, profile, place, flops))


def forecast_turn(
    job: SamplingJob, turn: str, working: int, kept: Mapping[str, int], profile: ModelProfile, place: RankLayout
) -> int:
    """Most bytes of a turn that takes ``working`` beside weights."""
    tensor, itemsize = place.mesh["tensor"].degree, place.itemsize("compute")
    whole = [sum(torch.Size(p.cut(tensor)).numel() for p in unit.parameters) * itemsize for unit in profile.units]
    streams = place.mesh.world_size == tensor  # else FSDP2 keeps what is outside of blocks in CPU memory, too
    without = sum(kept.values()) + working
    return forecast(job.offload, turn, without, kept, block=max(whole[:-1]), outside=whole[-1] if streams else 0)


def _line(job: SamplingJob, place: RankLayout, device_type: str) -> Timeline:
    """Activations of one pass, from a model of a few blocks."""
    cfg, mesh = replace(place.cfg, recompute=RecomputeConfig()), place.mesh
    found = stand_ins(meta_model(job.model))
    model = spread(shortened(meta_model(job.model)), cfg, mesh, device_type)
    line = forward_timeline(model, lambda: model(**denoiser_inputs(job.model, job.batch, SequenceParallel(mesh))))
    return replace(line, forward=tuple(line.forward[index] for index in found))


def _latent_bytes(job: SamplingJob) -> int:
    """Of what the loop over steps holds beside a pass, predictions of all passes included."""
    shape = autoencoder_shape(job.vae)
    frames, rows, columns = latent_grid(job.frames, job.height, job.width, shape)
    return job.samples * shape.channels * frames * rows * columns * 4 * (LATENT_COPIES + job.passes)


def _reused_bytes(job: SamplingJob, profile: ModelProfile, place: RankLayout) -> int:
    """Of what a step cache keeps of every pass that this process computes."""
    passes = -(-job.passes // place.mesh["cfg"].degree)
    txt, img = place.local_tokens(profile, job.batch)
    token = job.samples * describe(job.model).width * place.itemsize("compute")
    if job.reuse == "attention":
        return passes * len(profile.blocks) * (txt + img) * token // place.mesh["tensor"].degree
    # What the blocks add to both streams, what the first one changed, and the streams while blocks run.
    return (passes * (2 * img + txt) + img + txt) * token if job.reuse == "blocks" else 0


def _coding_bytes(job: SamplingJob) -> int:
    """Of decoding, and of coding references before it."""
    dtype = DTYPES[job.parallel.precision.compute]
    found = [decode_bytes(job.vae, job.samples, job.frames, job.height, job.width, dtype)]
    if job.known_frames:
        found.append(encode_bytes(job.vae, 1, job.known_frames, job.height, job.width, dtype))
    return max(found)


def _seconds(job: SamplingJob, profile: ModelProfile, place: RankLayout, flops: float) -> dict[str, float]:
    """Of all turns, by their operations."""
    mesh, speed = place.mesh, flops * EFFICIENCY
    shared = mesh["ring"].degree * mesh["ulysses"].degree * mesh["tensor"].degree
    passes = -(-job.passes // mesh["cfg"].degree)
    forward = Forecaster.flops_of(profile, job.batch)
    return {
        TEXT: text_flops(job.text, job.samples * min(2, job.passes)) / speed,
        DENOISER: forward * passes * job.steps / shared / speed,
        AUTOENCODER: decode_flops(job.vae, job.samples, job.frames, job.height, job.width) / shared / speed,
    }
