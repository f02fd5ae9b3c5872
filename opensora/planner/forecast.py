"""What a run would need, before it is started: memory, bytes, operations and time, per bucket and layout.

Memory is added up as FSDP2 allocates it, over activations found on the meta device (peak_memory.py and
activation_memory.py in acceleration/accounting); bytes are those the axes would count (comm_volume.py there). Both are
exact to a few percent. Time is a rough model on top of them, good for comparing layouts: products at ``EFFICIENCY`` of
the peak, exchanges by network.py, on GPUs weights and gradients moved while blocks compute. On CPUs FSDP2 waits for
each exchange, and gloo makes an all-reduce of a reduce-scatter.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acceleration.accounting import comm_volume, host_traffic, peak_memory, vendor_memory
from acceleration.accounting.activation_memory import Timeline, assemble, interpolate, spread, timeline
from acceleration.accounting.exchange_count import step_exchanges
from acceleration.accounting.model_profile import Attention, ModelProfile, ShardUnit, Sizes
from acceleration.accounting.peak_memory import Footprint
from acceleration.accounting.rank_layout import MicroBatch, Peers, RankLayout, TokenShares
from acceleration.config import LoraConfig, OptimConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import FSDP
from acceleration.sequence import SequenceParallel
from acceleration.sequence.install import IS_SPREAD
from opensora.assembly.bucket_shapes import check_buckets
from opensora.config.run import RunConfig
from opensora.datasets.buckets.bucket import BucketTable
from opensora.models.base import ClipMeasure, ModelConfig, latent_grid
from opensora.models.families import describe, family_of
from opensora.models.image import IMAGE_ENCODERS
from opensora.models.text import has_mask, text_tokens
from opensora.models.vae import autoencoder_shape
from opensora.planner.devices import Device
from opensora.planner.flops import attention_flops, linear_flops, mfu, training_flops
from opensora.planner.layout_forecast import Forecast, Shape
from opensora.planner.meta_model import denoiser_inputs, meta_model, shortened, stand_ins, structure
from opensora.planner.network import Network
from opensora.schedulers import OBJECTIVE_CONFIGS, ObjectiveConfig, build_objective
from opensora.schedulers.base import Objective

EFFICIENCY = 0.5  # of the peak, in the products of a large transformer
PROBED = (1024, 4096)  # tokens of a process in the runs between which is interpolated
PROBED_TEXT = (64, 256)  # and text tokens, where a process is given all of them
PROBED_FRAMES = 16
HOST = "host"  # CPU memory, among the axes along which bytes go
FEW_PACKED = 8  # samples of a packed sequence in these runs, whose rows are few beside tokens


def shapes(cfg: RunConfig) -> list[Shape]:
    """Every row of the bucket table at its size of most tokens; the table of clips is not read."""
    largest: dict[str, Shape] = {}
    for number, bucket in enumerate(bucket_table(cfg).buckets):
        one = micro_batch_of_clip(cfg, bucket.frames, (bucket.height, bucket.width))
        batch, packs = _packed(cfg, one, bucket.batch_size)
        name = f"{bucket.resolution} x {bucket.frames}"
        known = largest[name].batch if name in largest else None
        if known is None or batch.samples * batch.img > known.samples * known.img:
            clips = (batch.count, bucket.frames, bucket.height, bucket.width)
            samples = cfg.data.micro_batches * bucket.batch_size
            largest[name] = Shape(name=name, batch=batch, clips=clips, bucket=number, packs=packs, samples=samples)
    return list(largest.values())


def bucket_table(cfg: RunConfig) -> BucketTable:
    """The configured buckets.

    Raises:
        UserError: a shape that the autoencoder or the model does not take.
    """
    shape, denoising = autoencoder_shape(cfg.vae), describe(cfg.model)
    check_buckets(cfg.data, shape, denoising)
    return BucketTable(cfg.data, denoising.pixel_multiple(shape.stride), ClipMeasure(shape, denoising))


def micro_batch_of_clip(cfg: RunConfig, frames: int, size: tuple[int, int]) -> MicroBatch:
    """One clip of this length and (height, width), as tokens."""
    denoising = describe(cfg.model)
    grid = denoising.grid(latent_grid(frames, *size, autoencoder_shape(cfg.vae)))
    return MicroBatch(
        samples=1,
        txt=denoising.text_tokens(text_tokens(cfg.text)),
        img=grid.tokens,
        frames=grid.frames if denoising.token_axes == "factored" else None,
        has_mask=has_mask(cfg.text),
        picture=IMAGE_ENCODERS[cfg.image_encoder.kind].tokens,
    )


def _packed(cfg: RunConfig, one: MicroBatch, batch_size: int) -> tuple[MicroBatch, int]:
    """(what goes through the model at once, sequences of a step): of a bucket whose clips are alone in every step, each
    sequence full. Of mixed ones no sequence has more tokens, and a step has as many as some bucket's."""
    budget, data = cfg.data.tokens_per_sequence, cfg.data
    if not budget:
        return replace(one, samples=batch_size), 0
    inside = max(1, budget // one.img)
    multiple = -(-data.micro_batches // data.balance_group)
    packs = -(-data.micro_batches * batch_size // inside)
    batch = replace(one, txt=one.txt * inside, img=one.img * inside, packed=inside, has_mask=False)
    return batch, -(-packs // multiple) * multiple


class Forecaster:
    """Answers for one model; what costs time is remembered."""

    def __init__(
        self,
        model: ModelConfig,
        optim: OptimConfig,
        *,
        device_type: str,
        frozen: int = 0,
        known: bool = False,
        objective: ObjectiveConfig | None = None,
        adapters: LoraConfig | None = None,
    ) -> None:
        """
        Args:
            frozen: bytes of autoencoder and text encoder.
            known: training gives the model frames, see ``conditioning.masks``.
            objective: that it is trained with; None: that of the family's published weights.
            adapters: that are trained in place of the weights.
        """
        self.model, self.optim, self.device_type, self.frozen = model, optim, device_type, frozen
        self.known = known
        self.objective = build_objective(objective or OBJECTIVE_CONFIGS[family_of(model).objective]())
        self.adapters = adapters if adapters and adapters.rank else None
        self.streams = self.adapters is not None and self.adapters.offload == "blocks"
        self.structure = structure(model, known, self.adapters)
        self.moved = self.structure.without_frozen() if self.streams else self.structure  # by sharding
        self._stand_ins = stand_ins(meta_model(model, self.adapters))
        self._lines: dict[Any, Timeline] = {}
        self._operations: dict[MicroBatch, int] = {}

    def memory(self, place: RankLayout, batch: MicroBatch, *, batches: int = 1, exact: bool = True) -> Footprint:
        """Most that a process holds at any moment of a step of ``batches`` equal micro-batches.

        ``exact=False`` interpolates between two runs on the meta device that serve all buckets and degrees.
        """
        whole = (False, True) if batches > 1 and place.cfg.zero < 2 else (False,)
        lines = [self._micro_batch(place, batch, accumulates, exact) for accumulates in whole]
        if place.cfg.engine != "native":
            return vendor_memory.peak(self.structure, place, self.optim, lines[-1], batches=batches, frozen=self.frozen)
        more: dict[str, Any] = {"batches": batches, "frozen": self.frozen, "streams": self.streams}
        return peak_memory.peak(self.structure, place, self.optim, *lines, **more)

    def state(self, place: RankLayout) -> Footprint:
        """What a process holds whatever goes through the model: between steps, and its gradients."""
        if place.cfg.engine != "native":
            return vendor_memory.state_of(self.structure, place, self.optim, self.frozen)
        state = peak_memory.state_of(self.structure, place, self.optim, self.frozen, streams=self.streams)
        on_device = place.cfg.offload != "parameters"
        gradients = peak_memory.trained_values(self.structure, place) * place.itemsize("master")
        return replace(state, gradients=gradients * on_device)

    def forward_flops(self, batch: MicroBatch, place: RankLayout | None = None) -> int:
        """Of one whole micro-batch, all processes that share it together.

        Args:
            place: as if each of them had as many heads as the one with the most, for which the others wait.
        """
        return self.flops_of(self.structure, batch, place)

    @staticmethod
    def flops_of(structure: ModelProfile, batch: MicroBatch, place: RankLayout | None = None) -> int:
        """The same of a model that is made of ``structure``."""
        sizes, shares = batch.sizes(structure), TokenShares(structure, place, batch) if place else None
        return batch.count * sum(count * _unit_flops(unit, sizes, shares) for unit, count in structure.unit_counts)

    def training_flops(self, batch: MicroBatch) -> int:
        """Forward and backward of one whole micro-batch; frozen layers make no gradient of their weights."""
        if batch in self._operations:
            return self._operations[batch]
        sizes, frozen = batch.sizes(self.structure), 0
        for unit, count in self.structure.unit_counts:
            layers = (layer for layer in unit.layers if not layer.trains)
            frozen += count * sum(linear_flops(layer.inputs, layer.outputs, layer.rows.at(sizes)) for layer in layers)
        self._operations[batch] = training_flops(self.forward_flops(batch)) - frozen * batch.count
        return self._operations[batch]

    def forecast(
        self,
        place: RankLayout,
        shape: Shape,
        batches: int,
        device: Device,
        network: Network,
        memory: Footprint,
        step_batches: float,
        **phases: Any,
    ) -> Forecast:
        """Everything about a step in which every micro-batch is of this shape.

        ``phases``: of what comes before the step, fields of a ``Forecast``.
        """
        sent = comm_volume.step_bytes(self.moved, place, [shape.batch] * batches)
        seconds = self.seconds(place, [shape.batch] * batches, device, network)
        flops = self.training_flops(shape.batch) * step_batches
        return Forecast(
            parallel=place.cfg,
            degrees={name: place.mesh[name].degree for name in meshes.AXES},
            shape=shape.name,
            batches=batches,
            memory=memory,
            sent=sent,
            flops=flops,
            step_s=seconds,
            mfu=mfu(flops, seconds, device.flops * place.mesh.world_size),
            **phases,
        )

    def seconds(self, place: RankLayout, batches: Sequence[MicroBatch], device: Device, network: Network) -> float:
        """Time of a step with these micro-batches on every process: products, and what exchanges take beside them."""
        mesh, sent = place.mesh, self.on_wire(place, batches)
        compute = inside = 0.0
        for batch, count in Counter(batches).items():
            every, attention = self._hardware_flops(place, batch)
            shared = mesh["ring"].degree * (batch.degree or mesh["ulysses"].degree) * mesh["tensor"].degree
            speed = device.flops * EFFICIENCY * shared / count
            compute, inside = compute + every / speed, inside + attention / speed
        exchanges = step_exchanges(self.moved, place, batches)
        degrees = {name: mesh[name].degree for name in meshes.AXES}
        seconds = network.seconds(degrees, place.cfg.zero, sent, exchanges)
        hidden = {} if self.device_type == "cpu" else {FSDP: compute, "ring": inside, HOST: compute}
        seconds[HOST] = self.host_bytes(place, len(batches)) / device.host_bandwidth
        return compute + sum(max(0.0, s - hidden.get(axis, 0.0)) for axis, s in seconds.items())

    def host_bytes(self, place: RankLayout, batches: int) -> int:
        """Bytes that pass between this process's device and CPU memory in a step: weights that stream twice for each
        micro-batch, pieces as often as they are gathered with their gradients back, the optimizer's weights and
        gradients. What ``recompute.offload`` moves passes beside the blocks, and is not counted."""
        structure, offload = self.structure, place.cfg.offload
        trained = peak_memory.trained_values(structure, place) * place.itemsize("master")
        total = 0
        if self.streams:
            kept = (peak_memory.whole_frozen(structure.blocks[index], place) for index in structure.like)
            total += 2 * batches * sum(kept)
        if offload == "optimizer":
            total += 2 * trained
        if offload == "parameters":
            pieces = sum(n * comm_volume.padded(unit.parameters, place) for unit, n in structure.unit_counts)
            gathers = max(1, comm_volume.gathers_per_step(place.cfg.zero, batches))
            total += gathers * pieces * place.itemsize("master") + batches * trained
        return total

    def on_wire(self, place: RankLayout, batches: Sequence[MicroBatch]) -> dict[str, int]:
        """Axis -> bytes that this process sends in a step by what the backend makes of the exchanges."""
        peers = Peers(host_traffic.REDUCTIONS["gloo" if self.device_type == "cpu" else "nccl"])
        return comm_volume.step_bytes(self.moved, replace(place, peers=peers), batches)

    def _hardware_flops(self, place: RankLayout, batch: MicroBatch) -> tuple[int, int]:
        """(operations of a micro-batch with what is computed again, those of attention), all that share it together, as
        if each of them had as many heads as the one with the most."""
        sizes, blocks = batch.sizes(self.structure), self.structure.blocks
        shares = TokenShares(self.structure, place, batch)
        counts = self.structure.unit_counts
        attention = sum(count * _attention_flops(unit, sizes, shares) for unit, count in counts)
        waits = attention - sum(count * _attention_flops(unit, sizes) for unit, count in counts)
        kinds = Counter(zip(self.structure.like, comm_volume.recomputed(len(blocks), place), strict=True))
        again = sum(n * _rerun_flops(blocks[i], sizes, kind, shares) for (i, kind), n in kinds.items())
        every = self.training_flops(batch) + training_flops(waits * batch.count) + again * batch.count
        return every, training_flops(attention * batch.count)

    def _micro_batch(self, place: RankLayout, batch: MicroBatch, accumulates: bool, exact: bool) -> Timeline:
        """Every block at its own kind of recomputation, from short models in which all blocks have the same."""
        kinds = comm_volume.recomputed(len(self.structure.blocks), place)
        lines = {kind: self._line(place, kind, batch, accumulates, exact) for kind in dict.fromkeys(kinds)}
        parts = [(lines[kind], shown) for kind, shown in zip(kinds, self._stand_ins, strict=True)]
        return assemble(parts, lines[kinds[-1]])

    def _line(self, place: RankLayout, kind: str, batch: MicroBatch, accumulates: bool, exact: bool) -> Timeline:
        if exact:
            return self._run(place, kind, batch, accumulates)
        batch = replace(batch, packed=min(batch.packed, FEW_PACKED))
        degrees = self._probed_degrees(place, batch)
        shared = prod(degrees.values())
        small = replace(place, mesh=meshes.view(degrees | {"tensor": place.mesh["tensor"].degree}))
        if self.structure.cuts_text and not self.structure.cuts_text_itself:
            one = replace(batch, samples=1, degree=None)
            tries = [replace(one, txt=n // 16 * shared, img=n * 15 // 16 * shared) for n in PROBED]
            here = batch.samples * sum(place.local_tokens(self.structure, batch))
            shares = [(here - PROBED[0]) / (PROBED[1] - PROBED[0])]
        else:
            tries = self._tries(place, batch, shared)
            first, *others = (self._sizes(small, tried) for tried in tries)
            shares = np.linalg.lstsq((np.array(others) - first).T, self._sizes(place, batch) - first)[0].tolist()
        low, *highs = (self._run(small, kind, tried, accumulates) for tried in tries)
        return interpolate(low, *zip(highs, shares, strict=True))

    def _probed_degrees(self, place: RankLayout, batch: MicroBatch) -> dict[str, int]:
        """Of a small layout whose processes keep as much per token: pairs, but where ulysses does not divide the heads
        all of it, as the first process has more than its share of them."""
        mesh, shares = place.mesh.submesh(batch.degree), TokenShares(self.structure, place, batch)
        slots = (slot for unit, _ in self.structure.unit_counts for slot in unit.attentions)
        most = mesh["ulysses"].degree if any(_heads_waited_for(slot, shares) > slot.heads for slot in slots) else 2
        return {"ring": min(2, mesh["ring"].degree), "ulysses": min(most, mesh["ulysses"].degree)}

    def _tries(self, place: RankLayout, batch: MicroBatch, shared: int) -> list[MicroBatch]:
        """Where a process has all of the text: one with little of all, one each with more tokens, text and picture. If
        axes are exchanged also one whose frames are cut unevenly, so that a process has more tokens between switches.
        """
        inside = place.local_sizes(self.structure, batch).get("frames_inside")
        switches = batch.frames is not None and inside != batch.frames
        whole = place.mesh.submesh(batch.degree)["ulysses"].degree == 1
        frames = batch.frames and (PROBED_FRAMES if switches or whole else 1)
        sizes = [(PROBED_TEXT[t], PROBED[i] * shared, frames) for t, i in ((0, 0), (0, 1), (1, 0))]
        if switches:
            sizes.append((PROBED_TEXT[0], PROBED[0] // 3 * 3 * shared, 3))
        one = replace(batch, samples=1, degree=None)
        tries = [replace(one, txt=txt, img=img, frames=frames) for txt, img, frames in sizes]
        return [*tries, replace(tries[0], picture=2 * batch.picture)] if batch.picture else tries

    def _sizes(self, place: RankLayout, batch: MicroBatch) -> np.ndarray:
        """Tokens of all samples on a process: of the sequence, the same between axis switches, text and pictures that
        it is given."""
        sizes = place.local_sizes(self.structure, batch)
        txt, img = place.local_tokens(self.structure, batch)
        own = img + txt * self.structure.cuts_text_itself
        inside = sizes["frames_inside"] * sizes["places_inside"] if self.structure.is_factored else own
        return batch.samples * np.array([own, inside, sizes["txt"], batch.picture], float)

    def _run(self, place: RankLayout, kind: str, batch: MicroBatch, accumulates: bool) -> Timeline:
        mesh = place.mesh.submesh(batch.degree)
        offloads = kind != "none" and place.cfg.recompute.offload
        layout = tuple((mesh[name].degree, mesh[name].rank) for name in ("ring", "ulysses", "tensor"))
        key = (layout, place.cfg.precision, place.cfg.attention, kind, offloads, batch, accumulates)
        if key not in self._lines:
            cfg = replace(place.cfg, recompute=RecomputeConfig(kind=kind, offload=offloads))  # type: ignore[arg-type]
            model = shortened(meta_model(self.model, self.adapters))
            spread(model, cfg, mesh, self.device_type)
            sequence, known = SequenceParallel(mesh), self.known

            def loss() -> Tensor:
                # Inputs without a name, which would keep them alive while the loss is computed.
                prediction = model(**denoiser_inputs(self.model, batch, sequence, known=known))
                return objective_loss(self.model, self.objective, prediction).sum()

            self._lines[key] = timeline(model, loss, accumulates=accumulates)
        return self._lines[key]


def objective_loss(cfg: ModelConfig, objective: Objective, prediction: Tensor) -> Tensor:
    """Of every value of a prediction, as training has it before it is summed."""
    point, time = torch.zeros(1, 1, 1, 1, 1), torch.zeros(1)
    shape = (*prediction.shape[:-1], prediction.shape[-1] // describe(cfg).outputs)
    names = objective.noised(point, point, time).targets
    targets = {name: torch.zeros(shape, device=prediction.device) for name in names}
    return objective.loss(prediction, targets, time.to(prediction.device))


def _unit_flops(unit: ShardUnit, sizes: Sizes, shares: TokenShares | None = None) -> int:
    """Forward of one sample; ``shares``: see ``_attention_flops``."""
    layers = sum(linear_flops(layer.inputs, layer.outputs, layer.rows.at(sizes)) for layer in unit.layers)
    return layers + _attention_flops(unit, sizes, shares)


def _rerun_flops(unit: ShardUnit, sizes: Sizes, kind: str, shares: TokenShares) -> int:
    """Of what the block computes again in backward."""
    again, attention = comm_volume.RERUN[kind], _attention_flops(unit, sizes, shares)
    return again.layers * (_unit_flops(unit, sizes, shares) - attention) + again.attention * attention


def _attention_flops(unit: ShardUnit, sizes: Sizes, shares: TokenShares | None = None) -> int:
    """``shares``: of processes that all have as many heads as the one with the most; None: every head once."""
    total = 0
    for slot in unit.attentions:
        width = (slot.heads if shares is None else _heads_waited_for(slot, shares)) * slot.head_dim
        total += slot.batch.at(sizes) * attention_flops(slot.queries.at(sizes), slot.keys.at(sizes), width)
    return total


def _heads_waited_for(slot: Attention, shares: TokenShares) -> int:
    """Heads of all processes that share a sample, if each had as many as the one with the most."""
    if not IS_SPREAD[slot.axis] or (slot.axis == "space" and shares.switches):
        return slot.heads  # each process has tokens of its own, and all heads of them
    cut = shares.ulysses.degree * (shares.ring.degree if slot.axis == "window" else 1)
    return -(-slot.heads // (shares.tensor * cut)) * cut * shares.tensor
