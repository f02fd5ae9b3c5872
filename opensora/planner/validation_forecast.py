"""What a round of validation takes in a run: memory beside the state that training keeps, and time.

Clips of the held-out table are encoded, and the model sees them once per bin, without gradients; then prompts are
sampled from the same model in the same layout. Gradients are gone by then. Seconds are a bound: as if every held-out
clip were of the bucket that takes longest, and no step reused anything.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from acceleration.accounting import peak_memory, vendor_memory
from acceleration.accounting.activation_memory import Timeline
from acceleration.accounting.comm_volume import padded
from acceleration.accounting.peak_memory import Footprint
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from opensora.assembly.turns import AUTOENCODER, DENOISER, IMAGE, TEXT
from opensora.config.run import RunConfig
from opensora.datasets.plan.held_out import held_out_data
from opensora.planner.coding_memory import encode_flops, encoding_bytes, heaviest_to_encode
from opensora.planner.devices import Device
from opensora.planner.encoder_memory import image_flops, image_working_bytes, text_flops, text_working_bytes
from opensora.planner.forecast import EFFICIENCY, Forecaster, objective_loss, shapes
from opensora.planner.layout_forecast import Shape, ValidationForecast
from opensora.planner.sampling_forecast import SamplingJob, forward_line, seconds_by_turn, working_bytes


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What a run looks at, as the planner wants it."""

    cfg: RunConfig
    clips: SamplingJob | None = None  # of the prompts, in the layout of the run; None: there are none
    _lines: dict[Any, Timeline] = field(default_factory=dict, init=False, compare=False, repr=False)  # run before

    def forecast(self, forecaster: Forecaster, place: RankLayout, device: Device) -> ValidationForecast:
        """Of one layout."""
        found = ValidationForecast(every=self.cfg.validate.every)
        if self.cfg.validate.table:
            loss, seconds = self._held_out(forecaster, place, device)
            found = replace(found, held_out=loss, held_out_s=seconds)
        if self.clips is not None:
            clips, seconds = self._sampled(replace(self.clips, parallel=place.cfg), forecaster, place, device)
            found = replace(found, clips=clips, clips_s=seconds)
        return found

    def _held_out(self, forecaster: Forecaster, place: RankLayout, device: Device) -> tuple[int, float]:
        """(most bytes, seconds) of the loss; in buckets as training has them, but never packed."""
        validate = self.cfg.validate
        cfg = replace(self.cfg, data=held_out_data(self.cfg.data, validate.table, validate.root))
        found, state = [_at_most(shape, validate.samples) for shape in shapes(cfg)], between_steps(forecaster, place)
        coding = max(encoding_bytes(cfg, state, place, shape, 1) for shape in heaviest_to_encode(found))
        heaviest = max(found, key=lambda shape: shape.batch.samples * (shape.batch.txt + shape.batch.img))
        seen = self._forward(forecaster, place, state, heaviest.batch)
        most = max(s.batch.samples for s in found)
        prompts = max(
            text_working_bytes(cfg.text, _itemsize(cfg), _pieces(place), most),
            image_working_bytes(cfg.image_encoder, _itemsize(cfg), most),
        )
        slowest = max(found, key=lambda shape: forecaster.forward_flops(shape.batch) / shape.batch.samples)
        seconds = _round_s(cfg, forecaster, place, device, slowest)
        left = peak_memory.gathered_behind(forecaster.structure, place, streams=forecaster.streams)
        return max(coding + left, seen.total, state.total + left + prompts), seconds

    def _sampled(
        self, job: SamplingJob, forecaster: Forecaster, place: RankLayout, device: Device
    ) -> tuple[int, float]:
        """(most bytes, seconds) of the clips of all prompts."""
        state, profile = between_steps(forecaster, place), forecaster.structure
        seen = self._forward(forecaster, place, state, job.batch)
        working = working_bytes(job, profile, place, _pieces(place))
        left = state.total + peak_memory.gathered_behind(profile, place, streams=forecaster.streams)
        coded = max(working[turn] for turn in (TEXT, IMAGE, AUTOENCODER))
        most = max(left + coded, seen.total + working[DENOISER])
        batches = -(-job.clips // job.samples)
        turns = -(-batches // place.mesh.data_degree)
        seconds = seconds_by_turn(job, profile, place, device, from_host(forecaster, place))
        return most, turns * sum(seconds.values())

    def _forward(self, forecaster: Forecaster, place: RankLayout, state: Footprint, batch: MicroBatch) -> Footprint:
        """The moment of a forward without gradients, and of its loss, when a process holds most."""
        layout = tuple((place.mesh[name].degree, place.mesh[name].rank) for name in ("ring", "ulysses", "tensor"))
        key = (layout, place.cfg.precision, place.cfg.attention, batch)
        if key not in self._lines:
            self._lines[key] = forward_line(
                forecaster.model,
                batch,
                place,
                forecaster.device_type,
                adapters=forecaster.adapters,
                known=forecaster.known,
                after=lambda prediction: _losses(forecaster, prediction),
            )
        line, profile = self._lines[key], forecaster.structure
        if place.cfg.engine != "native":
            found = vendor_memory.peak(profile, place, forecaster.optim, line, frozen=forecaster.frozen)
            return replace(found, gradients=0, buffers=0)
        return peak_memory.forward_peak(profile, place, line, state, streams=forecaster.streams)


def between_steps(forecaster: Forecaster, place: RankLayout) -> Footprint:
    """What a process keeps when no step is on."""
    return replace(forecaster.state(place), gradients=0)


def from_host(forecaster: Forecaster, place: RankLayout) -> int:
    """Bytes of weights that come from CPU memory for one forward."""
    profile = forecaster.structure
    if forecaster.streams:
        return sum(peak_memory.whole_frozen(profile.blocks[index], place) for index in profile.like)
    if place.cfg.offload != "parameters":
        return 0
    return sum(n * padded(unit.parameters, place) for unit, n in profile.unit_counts) * place.itemsize("master")


def _at_most(shape: Shape, samples: int) -> Shape:
    """A bucket of which there are only so many samples."""
    assert shape.clips is not None
    count = min(shape.batch.samples, samples)
    return replace(shape, batch=replace(shape.batch, samples=count), clips=(count, *shape.clips[1:]))


def _losses(forecaster: Forecaster, prediction: Tensor) -> Any:
    """As ``sample_losses`` of a run makes them."""
    loss = objective_loss(forecaster.model, forecaster.objective, prediction).double()
    return torch.where(torch.ones_like(loss, dtype=torch.bool), loss, 0.0).flatten(1).sum(1)


def _round_s(cfg: RunConfig, forecaster: Forecaster, place: RankLayout, device: Device, shape: Shape) -> float:
    """Seconds of a round whose clips are all of this shape."""
    assert shape.clips is not None
    mesh, speed = place.mesh, device.flops * EFFICIENCY
    shared = mesh["ring"].degree * mesh["ulysses"].degree * mesh["tensor"].degree
    coding = encode_flops(cfg, shape.clips) / (shared if cfg.train.vae_parallel != "off" else 1)
    forward = forecaster.forward_flops(shape.batch, place) / shared / speed
    forward = max(forward, from_host(forecaster, place) / device.host_bandwidth)
    micro_batches = -(-cfg.validate.samples // shape.batch.samples)
    turns = -(-micro_batches // mesh.data_degree)
    samples = shape.batch.samples
    coding += text_flops(cfg.text, samples) + image_flops(cfg.image_encoder, samples)
    return turns * (coding / speed + cfg.validate.bins * forward)


def _pieces(place: RankLayout) -> int:
    """Processes that a text encoder is cut over."""
    return max(1, place.mesh.world_size // place.mesh["replicate"].degree)


def _itemsize(cfg: RunConfig) -> int:
    return 2 if cfg.parallel.precision.compute == "bf16" else 4
