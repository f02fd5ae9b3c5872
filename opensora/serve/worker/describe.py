"""What a model can do, for the web process: ``ModelInfo`` from a configuration, what is on disk, and the planner."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from acceleration.diagnostics.memory_usage import device_bytes, machine_bytes
from opensora.assembly.turns import DENOISER
from opensora.conditioning.references import KINDS, kinds_of
from opensora.config.schema import plain
from opensora.inference.check import fit_option, fitting_solvers, solver_of
from opensora.inference.find import Source
from opensora.inference.lengths import coded
from opensora.inference.memory import memory_of
from opensora.inference.references import takes_references
from opensora.models.base import latent_grid
from opensora.models.families import describe
from opensora.models.vae import autoencoder_shape
from opensora.planner.devices import DEVICES, Device
from opensora.planner.forecast import EFFICIENCY
from opensora.planner.sampling_forecast import SamplingForecast
from opensora.sampling.options import SamplingOption
from opensora.serve.model_info import Cost, ModelInfo
from opensora.serve.worker.models import Prepared
from opensora.utils.errors import UserError
from opensora.utils.sizes import frame_size

MOST_SECONDS = 60.0  # of a clip, where nothing else bounds it
LENGTHS = 2  # of every size, whose costs are told


def device_here(device: torch.device) -> Device | None:
    """What a device can do, where its name says which it is; None: nobody has told."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    return next((found for key, found in DEVICES.items() if key in name), None)


def room_here(local_processes: int) -> int:
    """Bytes that a process may use: of its GPU, or its part of this machine's memory; 0: not known."""
    return device_bytes() or (machine_bytes() or 0) // max(1, local_processes)


class Costs:
    """Forecasts of one model, each made once."""

    def __init__(self, one: Prepared, world_size: int, device: Device | None, room: int) -> None:
        self.cfg, self.source, self.room = one.cfg, one.source, room
        self.known = device is not None
        self._world, self._device = world_size, device or DEVICES["cpu"]
        self._made: dict[tuple[SamplingOption, str, int], SamplingForecast] = {}

    def of(self, option: SamplingOption, kind: str = "t2v", clips: int = 1) -> SamplingForecast:
        """
        Raises:
            UserError: a size or length that cannot be sampled.
        """
        key = (replace(option, seed=0), kind, clips)
        if key not in self._made:
            asked: dict[str, Any] = {"sampling": key[0], "cond_type": kind, "batch_size": clips}
            cfg = replace(self.cfg, **asked)
            self._made[key] = memory_of(cfg, self.source, self._world, self._device)
        return self._made[key]

    def fits(self, option: SamplingOption, kind: str = "t2v", clips: int = 1) -> bool:
        return not self.room or self.of(option, kind, clips).peak <= self.room

    def mfu(self, option: SamplingOption, kind: str, clips: int, step_s: float) -> float | None:
        """Share of the device's peak in a step of so many seconds; None: its peak is not known."""
        if not self.known or step_s <= 0:
            return None
        return EFFICIENCY * self.of(option, kind, clips).seconds[DENOISER] / option.num_steps / step_s


def model_info(one: Prepared, costs: Costs, measured_step_s: float | None = None) -> ModelInfo:
    """
    Args:
        measured_step_s: of the default size, which forecasts of others are scaled by.

    Raises:
        UserError: a size of the configuration that the model cannot make.
    """
    cfg, source = one.cfg, one.source
    shape = autoencoder_shape(source.vae)
    option = fit_option("sampling", cfg.sampling, source.model, shape)
    sizes = tuple(dict.fromkeys(_sizes(one, option)))
    frames = legal_frames(one, option, costs)
    kinds = cond_types(source)
    scale = 1.0
    if measured_step_s:
        scale = measured_step_s / max(costs.of(option).seconds[DENOISER] / option.num_steps, 1e-12)
    return ModelInfo(
        name=one.name,
        created=created(source),
        defaults=plain(option),
        neg=cfg.neg,
        multiple=describe(source.model).pixel_multiple(shape.stride),
        sizes=sizes,
        frames=frames,
        cond_types=kinds,
        references={kind: files_of(kind) for kind in kinds if kind != "t2v"},
        loras=tuple(one.loras),
        solvers=fitting_solvers(source.objective),
        experts=1 if source.low_noise is None else 2,
        channels=describe(source.model).latent_channels,
        room_bytes=costs.room,
        costs=tuple(_costs(one, option, sizes, frames, costs, scale)),
    )


def cond_types(source: Source) -> tuple[str, ...]:
    """What references may give: the kinds that training has shown, or all of them where nothing says which; stills
    first."""
    if not takes_references(source.model, source.objective):
        return ("t2v",)
    trained = source.conditioning.references if source.conditioning else {}
    kinds = kinds_of(describe(source.model).references)
    return ("t2v", *(kind for kind in kinds if kind != "t2v" and (not trained or trained.get(kind))))


def files_of(kind: str) -> int:
    """References that a kind takes at most."""
    return len(KINDS[kind])


def created(source: Source) -> int:
    """When the weights were written, in seconds since 1970."""
    place = source.checkpoint or source.path
    files = [place] if place.is_file() else [path for path in place.glob("*") if path.is_file()]
    return int(max((path.stat().st_mtime for path in files), default=time.time()))


def legal_frames(one: Prepared, option: SamplingOption, costs: Costs) -> tuple[int, ...]:
    """Lengths that are made as they are asked for, up to the longest that is allowed and fits; ascending."""
    shape, denoising = autoencoder_shape(one.source.vae), describe(one.source.model)
    most = one.served.max_frames or max(option.num_frames, int(MOST_SECONDS * option.fps))
    legal = []
    for frames in range(1, most + 1):
        asked = replace(option, num_frames=frames)
        if coded(asked, denoising, shape) == frames and _can_be_made(asked, one):
            legal.append(frames)
    if not one.served.max_frames:
        legal = legal[: _fitting(legal, option, costs)]
    return tuple(sorted({*legal, option.num_frames}))


def _can_be_made(option: SamplingOption, one: Prepared) -> bool:
    try:
        fit_option("sampling", option, one.source.model, autoencoder_shape(one.source.vae))
        solver_of("sampling", option, one.source.objective)
    except UserError:
        return False
    return True


def _fitting(legal: Sequence[int], option: SamplingOption, costs: Costs) -> int:
    """How many of the lengths fit the memory of a device."""
    low, high = 0, len(legal)
    while low < high:
        middle = (low + high) // 2
        if costs.fits(replace(option, num_frames=legal[middle])):
            low = middle + 1
        else:
            high = middle
    return low


def _sizes(one: Prepared, option: SamplingOption) -> Iterator[tuple[int, int]]:
    """(width, height), the default first."""
    assert option.width is not None and option.height is not None
    yield option.width, option.height
    multiple = describe(one.source.model).pixel_multiple(autoencoder_shape(one.source.vae).stride)
    for text in one.served.sizes:
        width, height = text.split("x")
        asked = replace(option, width=int(width), height=int(height))
        made = fit_option("sampling", asked, one.source.model, autoencoder_shape(one.source.vae))
        assert made.width is not None and made.height is not None
        yield made.width, made.height
    if not one.served.sizes:
        area = option.width * option.height
        tall, square = (frame_size(area, ratio, multiple) for ratio in ("9:16", "1:1"))
        yield from (tall, (square[1], square[0]), (tall[1], tall[0]))  # 16:9 has the sides of 9:16


def _costs(
    one: Prepared,
    option: SamplingOption,
    sizes: Sequence[tuple[int, int]],
    frames: Sequence[int],
    costs: Costs,
    scale: float,
) -> Iterator[Cost]:
    """Of every size at some lengths, by the pixels of a clip."""
    lengths = sorted({frames[round(i * (len(frames) - 1) / LENGTHS)] for i in range(LENGTHS + 1)} | {option.num_frames})
    clips = sorted((width * height * length, width, height, length) for width, height in sizes for length in lengths)
    for _, width, height, length in clips:
        asked = replace(option, width=width, height=height, num_frames=length)
        found = costs.of(asked)
        yield Cost(
            width=width,
            height=height,
            frames=length,
            tokens=tokens_of(one.source, asked),
            peak_bytes=found.peak,
            step_s=scale * found.seconds[DENOISER] / option.num_steps,
            other_s=sum(seconds for turn, seconds in found.seconds.items() if turn != DENOISER),
        )


def tokens_of(source: Source, option: SamplingOption) -> int:
    """Image tokens of a clip."""
    shape, denoising = autoencoder_shape(source.vae), describe(source.model)
    assert option.width is not None and option.height is not None
    made = coded(option, denoising, shape)
    return denoising.grid(latent_grid(made, option.height, option.width, shape)).tokens


def forecast_text(costs: Costs, option: SamplingOption, kind: str) -> str:
    """What a clip needs, for a message."""
    needed, room = costs.of(option, kind).peak / 2**30, costs.room / 2**30
    told = f" of {room:.3g} GiB that it has" if room else ""
    return (
        f"{option.num_frames} frames of {option.width}x{option.height} did not fit the memory: forecast "
        f"{needed:.3g} GiB a process{told}; ask for fewer frames or a smaller size"
    )
