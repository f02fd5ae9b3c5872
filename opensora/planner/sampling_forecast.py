"""What sampling takes, before it is started: memory of every turn, and time.

Text encoder, denoiser and autoencoder take turns (``opensora/assembly/turns.py``); the turn that takes most decides.
Each is run on the meta device at its true sizes, the denoiser with a few of its blocks. Time is products at
``EFFICIENCY`` of the peak. What a step cache leaves out depends on the clips, and is not left out here: with one the
time is a bound, that of steps which all compute.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from torch import Tensor

from acceleration.accounting import peak_memory
from acceleration.accounting.activation_memory import Timeline, forward_timeline, spread
from acceleration.accounting.comm_volume import padded
from acceleration.accounting.model_profile import ModelProfile
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import LoraConfig, ParallelConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from acceleration.sequence import SequenceParallel
from acceleration.sharding.precision import DTYPES
from opensora.assembly.turns import AUTOENCODER, DENOISER, IMAGE, TEXT, SampleOffload, for_sampling, forecast
from opensora.models.base import ModelConfig, latent_grid
from opensora.models.families import describe
from opensora.models.image import IMAGE_ENCODERS, ImageEncoderConfig, NoImageEncoder
from opensora.models.text import TextConfig, has_mask, text_tokens
from opensora.models.vae import AutoencoderConfig, autoencoder_shape
from opensora.planner.coding_memory import decode_bytes, decode_flops, encode_bytes, encode_flops_of
from opensora.planner.devices import Device
from opensora.planner.encoder_memory import (
    encoder_bytes,
    image_encoder_bytes,
    image_flops,
    image_working_bytes,
    text_flops,
    text_working_bytes,
)
from opensora.planner.forecast import EFFICIENCY, Forecaster
from opensora.planner.meta_model import denoiser_inputs, meta_model, shortened, stand_ins, structure

LATENT_COPIES = 6  # of a clip's latents in fp32: noise, whole and cut, those of the step, and predictions


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """What a step cache keeps of every pass of guidance from one step to the next, as copies of tokens."""

    added: int = 0  # of all tokens: what blocks add to them
    signals: int = 0  # of image tokens: what a change is measured from
    carried: int = 0  # of all tokens, while blocks run, whatever the number of passes
    axes: frozenset[str] = frozenset()  # attentions along these keep what they gave

    @property
    def any(self) -> bool:
        """Whether steps may be passed by in part."""
        return bool(self.added or self.axes)


@dataclass(frozen=True, kw_only=True)
class SamplingJob:
    """A batch of clips, as the planner wants it; sizes are those that are made."""

    model: ModelConfig
    vae: AutoencoderConfig
    text: TextConfig
    image_encoder: ImageEncoderConfig = field(default_factory=NoImageEncoder)
    parallel: ParallelConfig  # with the precision that is sampled in
    offload: SampleOffload
    samples: int
    frames: int
    height: int
    width: int
    passes_of_steps: tuple[int, ...]  # of guidance, in every step
    reuse: Reuse = Reuse()
    known_frames: int = 0  # pixels of the longest reference that is coded by itself
    shares_tiles: bool = True  # processes of a clip share out the tiles that are coded
    clips: int = 1  # of the whole job

    @property
    def passes(self) -> int:
        """Of a step with the most."""
        return max(self.passes_of_steps)

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
            picture=IMAGE_ENCODERS[self.image_encoder.kind].tokens,
        )


@dataclass(frozen=True)
class SamplingForecast:
    """Bytes of the process that needs most, and seconds of a batch."""

    kept: dict[str, int]  # of weights, by turn, on the device or in CPU memory
    weights: dict[str, int]  # of them on the device in their own turn
    turns: dict[str, int]  # most, by turn
    seconds: dict[str, float]  # by turn
    bounds: frozenset[str] = frozenset()  # turns of which seconds are the most: a step cache may leave some out

    @property
    def peak(self) -> int:
        return max(self.turns.values())

    def behind(self, before: "SamplingForecast", name: str) -> "SamplingForecast":
        """With the turns of another job ahead of its own, which are called ``name`` and what they are."""

        def joined(earlier: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
            return {f"{name}{turn}": value for turn, value in earlier.items()} | dict(own)

        return SamplingForecast(
            kept=joined(before.kept, self.kept),
            weights=joined(before.weights, self.weights),
            turns=joined(before.turns, self.turns),
            seconds=joined(before.seconds, self.seconds),
            bounds=frozenset(f"{name}{turn}" for turn in before.bounds) | self.bounds,
        )

    def plain(self) -> dict[str, Any]:
        """For JSON; memory in GiB."""
        return {
            "peak_gib": self.peak / 2**30,
            "turns_gib": {name: size / 2**30 for name, size in self.turns.items()},
            "weights_gib": {name: size / 2**30 for name, size in self.weights.items()},
            "kept_gib": {name: size / 2**30 for name, size in self.kept.items()},
            "seconds": self.seconds,
            "seconds_at_most": sorted(self.bounds),
        }


def sampling_forecast(
    job: SamplingJob, world: int, device: Device, device_type: str = "cuda", *, beside: int = 0
) -> SamplingForecast:
    """Of one batch on ``world`` processes.

    Args:
        beside: bytes on every device that are of nothing in this job.

    Raises:
        ValueError: a mesh that does not fit so many processes.
    """
    place = RankLayout(meshes.view(meshes.resolve(job.parallel.mesh, world), 0, device_type), _sampled_in(job))
    profile = structure(job.model)
    pieces = max(1, world // place.mesh["replicate"].degree)
    autoencoder, text = encoder_bytes(job.vae, job.text, place.itemsize("compute"), pieces)
    line = forward_line(job.model, job.batch, place, device_type)
    denoiser = peak_memory.forward_peak(profile, place, line)
    kept = {TEXT: text, DENOISER: denoiser.weights, AUTOENCODER: autoencoder}
    if job.image_encoder.kind != "none":
        kept[IMAGE] = image_encoder_bytes(job.image_encoder, place.itemsize("compute"), pieces)
    working = working_bytes(job, profile, place, pieces)
    working[DENOISER] += denoiser.total - denoiser.weights
    if job.offload == "none":  # what was gathered stays for the next batch
        for turn in kept.keys() - {DENOISER}:
            working[turn] += peak_memory.gathered_behind(profile, place)
    turns = {name: forecast_turn(job, name, working[name] + beside, kept, profile, place) for name in kept}
    weights = {name: _weights_in_turn(job, name, kept, profile, place) for name in kept}
    bounds = frozenset({DENOISER} if job.reuse.any else ())
    seconds = seconds_by_turn(job, profile, place, device, _from_host(job, profile, place))
    if job.offload != "none":  # encoders are copied in, a denoiser also out
        for name in kept:
            copies = 2 * (job.offload == "models") if name == DENOISER else 1
            seconds[name] += copies * kept[name] / device.host_bandwidth
    return SamplingForecast(kept, weights, turns, seconds, bounds)


def _sampled_in(job: SamplingJob) -> ParallelConfig:
    """The layout with what ``offload`` changes in it, but for where the pieces are, which ``forecast_turn`` counts, and
    how many are gathered ahead."""
    changed = for_sampling(job.parallel, job.offload)
    return replace(job.parallel, zero=changed.get("zero", job.parallel.zero))


def working_bytes(job: SamplingJob, profile: ModelProfile, place: RankLayout, pieces: int) -> dict[str, int]:
    """Bytes beside weights, by turn; of the denoiser without those of its forward.

    ``pieces``: see ``encoder_bytes``.
    """
    return {
        TEXT: text_working_bytes(job.text, place.itemsize("compute"), pieces, job.samples),
        DENOISER: _latent_bytes(job) + reused_bytes(job.reuse, job.passes, job.model, job.batch, profile, place),
        AUTOENCODER: _coding_bytes(job),
        IMAGE: image_working_bytes(job.image_encoder, place.itemsize("compute"), job.samples),
    }


def forecast_turn(
    job: SamplingJob, turn: str, working: int, kept: Mapping[str, int], profile: ModelProfile, place: RankLayout
) -> int:
    """Most bytes of a turn that takes ``working`` beside weights."""
    block, outside = _whole_units(profile, place)
    without = sum(kept.values()) + working
    # With several processes FSDP2 keeps what is outside of blocks in CPU memory, too.
    return forecast(job.offload, turn, without, kept, block=block, outside=outside if _streams(place) else 0)


def _weights_in_turn(
    job: SamplingJob, turn: str, kept: Mapping[str, int], profile: ModelProfile, place: RankLayout
) -> int:
    """Weights of a model on the device in its turn: of a denoiser whose blocks stream the block that runs, the next
    one, and what is outside of blocks."""
    if job.offload != "blocks" or turn != DENOISER:
        return kept[turn]
    block, outside = _whole_units(profile, place)
    return min(2, len(profile.blocks)) * block + outside


def _from_host(job: SamplingJob, profile: ModelProfile, place: RankLayout) -> int:
    """Bytes of weights that come from CPU memory for a forward."""
    if job.offload == "blocks" and _streams(place):
        tensor = place.mesh["tensor"].degree
        blocks = (prod(p.cut(tensor)) for unit in profile.blocks for p in unit.parameters)
        return sum(blocks) * place.itemsize("compute")
    if job.offload != "blocks" and job.parallel.offload != "parameters":
        return 0
    return sum(n * padded(unit.parameters, place) for unit, n in profile.unit_counts) * place.itemsize("compute")


def _whole_units(profile: ModelProfile, place: RankLayout) -> tuple[int, int]:
    """Bytes of the largest block, and of what is outside of blocks."""
    tensor, itemsize = place.mesh["tensor"].degree, place.itemsize("compute")
    whole = [sum(prod(p.cut(tensor)) for p in unit.parameters) * itemsize for unit in profile.units]
    return max(whole[:-1]), whole[-1]


def _streams(place: RankLayout) -> bool:
    return place.mesh.world_size == place.mesh["tensor"].degree


def forward_line(
    model: ModelConfig,
    batch: MicroBatch,
    place: RankLayout,
    device_type: str,
    *,
    adapters: LoraConfig | None = None,
    known: bool = False,
    after: Callable[[Tensor], Any] = lambda prediction: prediction,
) -> Timeline:
    """Activations of one forward without gradients, from a model of a few blocks.

    Args:
        adapters, known: see ``structure``.
        after: what is made of the prediction.
    """
    cfg, mesh = replace(place.cfg, recompute=RecomputeConfig()), place.mesh
    found = stand_ins(meta_model(model, adapters))
    short = spread(shortened(meta_model(model, adapters)), cfg, mesh, device_type)
    sequence = SequenceParallel(mesh)
    line = forward_timeline(short, lambda: after(short(**denoiser_inputs(model, batch, sequence, known=known))))
    return replace(line, forward=tuple(line.forward[index] for index in found))


def _latent_bytes(job: SamplingJob) -> int:
    """Of what the loop over steps holds beside a pass, predictions of all passes included."""
    shape = autoencoder_shape(job.vae)
    frames, rows, columns = latent_grid(job.frames, job.height, job.width, shape)
    return job.samples * shape.channels * frames * rows * columns * 4 * (LATENT_COPIES + job.passes)


def reused_bytes(
    reuse: Reuse, passes: int, model: ModelConfig, batch: MicroBatch, profile: ModelProfile, place: RankLayout
) -> int:
    """Of what a step cache keeps of every pass that this process computes, and holds while blocks run."""
    mine = -(-passes // place.mesh["cfg"].degree)
    txt, img = place.local_tokens(profile, batch)
    tokens = img + txt * profile.cuts_text  # that blocks hand on
    copies = mine * (reuse.added * tokens + reuse.signals * img) + reuse.carried * tokens
    local, outputs = place.local_sizes(profile, batch), 0
    for unit, count in profile.unit_counts:
        kept = (slot for slot in unit.attentions if slot.axis in reuse.axes)
        outputs += count * sum(
            slot.batch.at(local) * slot.queries.at(local) * slot.heads * slot.head_dim for slot in kept
        )
    values = copies * describe(model).width + mine * outputs // place.mesh["tensor"].degree
    return batch.samples * values * place.itemsize("compute")


def _coding_bytes(job: SamplingJob) -> int:
    """Of decoding, and of coding references before it."""
    dtype = DTYPES[job.parallel.precision.compute]
    found = [decode_bytes(job.vae, job.samples, job.frames, job.height, job.width, dtype)]
    if job.known_frames:
        found.append(encode_bytes(job.vae, 1, job.known_frames, job.height, job.width, dtype))
    return max(found)


def seconds_by_turn(
    job: SamplingJob, profile: ModelProfile, place: RankLayout, device: Device, from_host: int
) -> dict[str, float]:
    """Of a batch, by the operations of every turn.

    Args:
        from_host: bytes of weights that come from CPU memory for a forward, which may take longer than what is done
            with them.
    """
    mesh, speed = place.mesh, device.flops * EFFICIENCY
    shared = mesh["ring"].degree * mesh["ulysses"].degree * mesh["tensor"].degree
    turns = sum(-(-passes // mesh["cfg"].degree) for passes in job.passes_of_steps)
    forward = Forecaster.flops_of(profile, job.batch, place) / shared / speed
    forward = max(forward, from_host / device.host_bandwidth)
    coding = decode_flops(job.vae, job.samples, job.frames, job.height, job.width)
    if job.known_frames:
        coding += job.samples * encode_flops_of(job.vae, 1, job.known_frames, job.height, job.width)
    return {
        TEXT: text_flops(job.text, job.samples * min(2, job.passes)) / speed,
        DENOISER: forward * turns,
        AUTOENCODER: coding / (shared if job.shares_tiles else 1) / speed,
    } | ({IMAGE: image_flops(job.image_encoder, job.samples) / speed} if job.image_encoder.kind != "none" else {})
