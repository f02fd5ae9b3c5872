"""The fastest layouts that fit: every layout worth a thought, forecast and compared."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from acceleration.accounting import host_traffic
from acceleration.accounting.rank_layout import RankLayout
from acceleration.config import MeshConfig, ParallelConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import FSDP
from acceleration.sharding import tensor_parallel
from opensora.assembly.layout import check_layout
from opensora.config.run import RunConfig
from opensora.datasets.plan.dynamic_sp import SequenceSharing
from opensora.models.families import build_model, describe
from opensora.planner.coding_memory import encode_flops, encoding_bytes, heaviest_to_encode
from opensora.planner.devices import Device
from opensora.planner.encoder_memory import (
    frozen_bytes,
    image_flops,
    image_working_bytes,
    text_flops,
    text_working_bytes,
)
from opensora.planner.forecast import EFFICIENCY, Forecaster, bucket_table, shapes
from opensora.planner.layout_forecast import Forecast, Shape
from opensora.planner.meta_model import told_frames
from opensora.planner.network import Network
from opensora.planner.sampling_forecast import SamplingJob
from opensora.planner.validation_forecast import Validation
from opensora.utils.errors import UserError

RESERVE = 0.08  # of the device's memory: context, kernels' workspace, fragments
MAX_RING = 16


def layouts(cfg: RunConfig, world: int, node: int) -> Iterator[ParallelConfig]:
    """Every layout worth a thought: layers and heads are shared within a node, no process is without a micro-batch or a
    head. Heads need not be divided: what it costs that some processes have one more is in the forecast.

    ``node``: processes of a node.
    """
    denoising = describe(cfg.model)
    heads = denoising.heads
    with torch.device("meta"):
        model = build_model(cfg.model)
    batches = cfg.data.micro_batches
    for tensor in _divisors(world, node):
        if not _divides(model, tensor):
            continue
        for ulysses, ring in product(_divisors(world // tensor, node // tensor), _divisors(world, MAX_RING)):
            data, rest = divmod(world, tensor * ulysses * ring)
            # Models that keep time and space apart exchange frames, and heads where frames are few.
            idle = denoising.token_axes == "joint" and ulysses > heads // tensor
            cuts = ulysses * ring > 1 and not denoising.cuts_tokens
            if rest or idle or cuts or data > batches:
                continue
            for replicate, zero, kind in product(_divisors(data, data), (0, 1, 2, 3), ("none", "full")):
                if zero == 0 and replicate > 1:
                    continue  # all processes have a copy as it is
                mesh = MeshConfig(
                    replicate=replicate,
                    shard=data // replicate,
                    ring=ring,
                    ulysses=ulysses,
                    tensor=tensor,
                    dynamic=cfg.parallel.mesh.dynamic and ring == 1 and ulysses > 1,
                )
                recompute = RecomputeConfig(kind=kind)  # type: ignore[arg-type]
                yield replace(cfg.parallel, zero=zero, mesh=mesh, recompute=recompute)  # type: ignore[arg-type]


def _divides(model: nn.Module, tensor: int) -> bool:
    try:
        tensor_parallel.check(model, tensor)
    except ValueError:
        return False
    return True


def check_own(cfg: RunConfig, world: int) -> str | None:
    """What is wrong with the configured layout on so many processes; None: nothing."""
    try:
        check_layout(cfg.parallel.mesh, world, cfg.model)
    except UserError as error:
        return str(error)
    return None


class Planner:
    """Forecasts of a run on ``world`` devices, of its own layout and of others."""

    def __init__(
        self,
        cfg: RunConfig,
        world: int,
        device: Device,
        *,
        device_type: str,
        exact: bool = False,
        network: Network | None = None,
        clips: SamplingJob | None = None,
    ) -> None:
        """
        Args:
            exact: run every shape on the meta device, instead of interpolating between two.
            network: None: nodes and links as the device's makers say.
            clips: that a run samples of its prompts while it trains; None: no clips.
        """
        self.cfg, self.world, self.device, self.exact = cfg, world, device, exact
        self.network = network or Network.of_device(device, world)
        self.forecaster = Forecaster(
            cfg.model,
            cfg.optim,
            device_type=device_type,
            frozen=frozen_bytes(cfg, world),
            known=told_frames(cfg.model, cfg.conditioning),
            objective=cfg.objective,
            adapters=cfg.lora,
        )
        self._table = bucket_table(cfg)
        self.device_type = device_type
        self.shapes = sorted(shapes(cfg), key=lambda s: s.batch.samples * (s.batch.txt + s.batch.img))
        self.encoded = {shape.name for shape in (self.shapes if exact else heaviest_to_encode(self.shapes))}
        self.room = int(device.memory * (1 - RESERVE))
        watches = cfg.validate.every and (cfg.validate.table or clips)
        self.validation = Validation(cfg=cfg, clips=clips) if watches else None

    def own(self) -> list[Forecast]:
        """The configured layout, on every shape."""
        return [self.one(self.cfg.parallel, shape) for shape in self.shapes]

    def one(self, parallel: ParallelConfig, shape: Shape, *, with_memory: bool = True) -> Forecast:
        """One layout on one shape; without memory, of activations there are none."""
        place = self._place(parallel)
        shape = self._as_shared(shape, place)
        batches, every = self._batches(place, shape), self._in_a_step(shape)
        if with_memory:
            memory = self.forecaster.memory(place, shape.batch, batches=batches, exact=self.exact)
        else:
            memory = self.forecaster.state(place)
        phases = self._phases(place, shape, batches) if with_memory else {}
        if self.validation and with_memory and shape.name == self.shapes[-1].name:
            phases["validation"] = self.validation.forecast(self.forecaster, place, self.device)
        return self.forecaster.forecast(place, shape, batches, self.device, self.network, memory, every, **phases)

    def _phases(self, place: RankLayout, shape: Shape, batches: int) -> dict[str, Any]:
        """Memory and time of what comes before a step: encoding clips and prompts."""
        state, cfg, found = self.forecaster.state(place), self.cfg, dict[str, Any]()
        if shape.name in self.encoded:
            found["encoding"] = encoding_bytes(cfg, state, place, shape, batches)
        if cfg.data.features or shape.clips is None:
            return found
        itemsize = place.itemsize("compute") if cfg.parallel.precision.compute == "bf16" else 4
        pieces = max(1, self.world // place.mesh["replicate"].degree)
        working = max(
            text_working_bytes(cfg.text, itemsize, pieces, shape.clips[0]),
            image_working_bytes(cfg.image_encoder, itemsize, shape.clips[0]),
        )
        if working:
            found["text"] = state.state + (state.gradients if batches > 1 else 0) + working
        flops = text_flops(cfg.text, shape.clips[0]) + image_flops(cfg.image_encoder, shape.clips[0])
        flops += encode_flops(cfg, shape.clips) if "encoding" in found else 0.0
        sharing = place.mesh["ring"].degree * (shape.batch.degree or place.mesh["ulysses"].degree)
        shared = sharing * place.mesh["tensor"].degree if cfg.train.vae_parallel != "off" else 1
        found["encode_s"] = flops * batches / (self.device.flops * EFFICIENCY * max(1, shared))
        return found

    def _as_shared(self, shape: Shape, place: RankLayout) -> Shape:
        """With ``mesh.dynamic``: by as many processes of ulysses as pay, each with its part of the samples."""
        degree = place.mesh["ulysses"].degree
        if not place.cfg.mesh.dynamic or degree == 1 or shape.bucket is None:
            return shape
        sharing = SequenceSharing(degree=degree, text_tokens=shape.batch.txt)
        samples = shape.batch.samples
        chosen, _ = self._table.shared(np.array([shape.bucket]), np.array([samples]), sharing)
        local = len(sharing.local_rows(samples, int(chosen[0])))
        return replace(shape, batch=replace(shape.batch, samples=local, degree=int(chosen[0])))

    def best(self, count: int, watch: Callable[[int, int], None] = lambda done, total: None) -> list[Forecast]:
        """The ``count`` fastest layouts whose heaviest shape fits, fastest first, on that shape.

        Args:
            watch: told after each layout how many are timed, of how many.

        Raises:
            UserError: nothing fits, with what to change.
        """
        heaviest, some = self.shapes[-1], self.shapes[:: max(1, len(self.shapes) // 3)]
        timed: list[tuple[float, int, ParallelConfig]] = []
        closest: Forecast | None = None
        tried = list(layouts(self.cfg, self.world, self.network.most))
        for number, parallel in enumerate(tried, 1):
            if self.forecaster.state(self._place(parallel)).total <= self.room:
                timed.append((sum(self.one(parallel, s, with_memory=False).step_s for s in some), len(timed), parallel))
            watch(number, len(tried))
        found: list[Forecast] = []
        for _, _, parallel in sorted(timed):
            forecast = self.one(parallel, heaviest)
            if forecast.peak <= self.room:
                found.append(forecast)
                if len(found) == count:
                    break
            elif closest is None or forecast.peak < closest.peak:
                closest = forecast
        if not found:
            raise UserError(self._nothing(closest))
        return found

    def hybrid(self, best: Forecast) -> str | None:
        """Whether a copy of the state on every host, cut within it (hybrid sharding), is better than one over all of
        them, and why; None where the question does not arise.

        ``best``: the layout about whose state it is, on the heaviest shape.
        """
        mesh, data = best.parallel.mesh, best.degrees["replicate"] * best.degrees["shard"]
        zero = best.parallel.zero or self.cfg.parallel.zero or 2
        ways = [
            replace(best.parallel, zero=zero, mesh=replace(mesh, replicate=n, shard=data // n))
            for n in _divisors(data, data)
        ]
        every, copies = ways[0], next((way for way in ways if not self._cut_across(way)), None)
        if copies is None or copies is every:
            return None
        whole, own = self.one(every, self.shapes[-1], with_memory=False), self.one(copies, self.shapes[-1])
        leaving = [host_traffic.readable(self._leaving(forecast)) for forecast in (own, whole)]
        said = (
            f"hybrid sharding, parallel.mesh.replicate={copies.mesh.replicate} across hosts x "
            f"shard={copies.mesh.shard} within: {own.step_s:.3g} s per step and {leaving[0]} from a host, where "
            f"shard={data} over all takes {whole.step_s:.3g} s and {leaving[1]}"
        )
        if own.step_s >= whole.step_s:
            return f"{said}: not faster"
        if own.peak > self.room:
            return f"{said}: faster, but it needs {own.peak / 2**30:.1f} GiB of {self.room / 2**30:.1f}"
        return f"{said}: faster, and it fits"

    def _cut_across(self, parallel: ParallelConfig) -> bool:
        """Whether a copy of the state is cut over processes of several hosts."""
        place = self._place(parallel)
        degrees = {name: place.mesh[name].degree for name in meshes.AXES}
        return self.network.leaving_host(degrees, parallel.zero, {FSDP: 1.0}) > 0

    def _leaving(self, forecast: Forecast) -> float:
        """Bytes that leave a host in a step of the heaviest shape."""
        batches = [self.shapes[-1].batch] * forecast.batches
        sent = self.forecaster.on_wire(self._place(forecast.parallel), batches)
        return self.network.leaving_host(forecast.degrees, forecast.parallel.zero, sent)

    def _nothing(self, closest: Forecast | None) -> str:
        room = f"{self.room / 2**30:.1f} GiB of {self.world} devices"
        if closest is None:
            return f"no layout fits: weights, optimizer and gradients alone need more than the {room}; use more devices"
        needs = f"needs at least {closest.peak / 2**30:.1f} GiB and there are the {room}"
        if closest.validation and closest.peak == closest.validation.peak:
            clips = closest.validation.clips == closest.peak
            lower = "validate.batch_size or the size in validate.sampling" if clips else "batch sizes in data.buckets"
            return f"no layout fits: a round of validation {needs}; lower {lower}, or use more devices"
        return f"no layout fits: {closest.shape} {needs}; lower its batch size in data.buckets, or use more devices"

    def _place(self, parallel: ParallelConfig) -> RankLayout:
        return RankLayout(meshes.view(meshes.resolve(parallel.mesh, self.world), 0, self.device_type), parallel)

    def _batches(self, place: RankLayout, shape: Shape) -> int:
        """Micro-batches, or packs, of a process in a step."""
        every = shape.packs or self.cfg.data.micro_batches
        return -(-every // (place.mesh["replicate"].degree * place.mesh["shard"].degree))

    def _in_a_step(self, shape: Shape) -> float:
        """Micro-batches of a step that are as full as this one, all processes together."""
        batch = shape.batch
        return shape.samples / batch.count if shape.packs or batch.degree else self.cfg.data.micro_batches


def _divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]
