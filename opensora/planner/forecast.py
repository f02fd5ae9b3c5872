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
from functools import lru_cache, partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from acceleration import protocol
from acceleration.accounting import comm_volume, host_traffic, peak_memory
from acceleration.accounting.activation_memory import Timeline, assemble, interpolate, spread, timeline
from acceleration.accounting.exchange_count import step_exchanges
from acceleration.accounting.model_profile import ModelProfile, ShardUnit, Sizes
from acceleration.accounting.peak_memory import Footprint
from acceleration.accounting.profiling import profile_of
from acceleration.accounting.rank_layout import MicroBatch, Peers, RankLayout
from acceleration.config import OptimConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import FSDP
from acceleration.sequence import SequenceParallel
from opensora.assembly.token_layout import forward_arguments, token_layout
from opensora.config.run import RunConfig
from opensora.datasets.buckets.bucket import BucketTable
from opensora.models.base import ModelConfig, latent_grid
from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.families import build_model, describe, family_of
from opensora.models.text import has_mask, text_tokens
from opensora.models.vae import autoencoder_shape
from opensora.planner.devices import Device
from opensora.planner.flops import attention_flops, linear_flops, mfu, training_flops
from opensora.planner.layout_forecast import Forecast, Shape
from opensora.planner.network import Network
from opensora.schedulers import OBJECTIVE_CONFIGS, ObjectiveConfig, build_objective
from opensora.schedulers.base import Objective

EFFICIENCY = 0.5  # of the peak, in the products of a large transformer
REPEATED = 3  # blocks of a list that are run to know them all: the first, one like all between, the last
PROBED = (1024, 4096)  # tokens of a process in the runs between which is interpolated
PROBED_TEXT = (64, 256)  # and text tokens, where these are no part of the sequence
PROBED_FRAMES = 16


def run_denoiser(model: nn.Module, *, known: bool = False, **sizes: int) -> Tensor:
    """The forward of a denoiser on the meta device, for one sample: ``txt`` text tokens, which have a mask, and ``img``
    image tokens or ``frames`` x ``places``.

    ``known``: frames are given in the place of noisy ones.
    """
    frames = sizes.get("frames")
    img = sizes["img"] if frames is None else frames * sizes["places"]
    batch = MicroBatch(samples=1, txt=sizes["txt"], img=img, frames=frames, has_mask=True)
    return model(**denoiser_inputs(model.cfg, batch, SequenceParallel(meshes.view({})), known=known))


def denoiser_inputs(
    cfg: Any,
    batch: MicroBatch,
    sequence: SequenceParallel,
    *,
    known: bool = False,
    device: torch.device | str = "meta",
) -> dict[str, Any]:
    """Arguments of a denoiser's forward, with the shapes and types that ``Preparation`` gives them; zeros.

    ``known``: with frames that are given in the place of noisy ones.
    """
    layout = token_layout(cfg, sequence)
    denoising, samples = layout.denoising, batch.samples

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(samples, *shape, device=device)

    def tokens_of(*channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Image tokens, whole."""
        sizes = (batch.img,) if denoising.token_axes == "joint" else (batch.frames or 1, batch.places)
        return zeros(*sizes, *channels).to(dtype)

    numbers = {"fps": zeros(), "size": zeros(2), "guidance": zeros()}
    conditions = Conditions(
        text=zeros(batch.txt, denoising.text_dim) if denoising.text != "none" else None,
        text_mask=torch.ones(samples, batch.txt, dtype=torch.bool, device=device) if batch.has_mask else None,
        pooled=zeros(denoising.pooled_dim) if denoising.pooled_dim else None,
        label=zeros().to(torch.int64) if denoising.num_classes else None,
        dropped=zeros().to(torch.bool) if denoising.null_text == "learned" else None,
        known=tokens_of(dtype=torch.bool) if known else None,
        **{name: x for name, x in numbers.items() if name in denoising.wants},
    )
    x = tokens_of(denoising.latent_channels * prod(denoising.patch))
    tokens = TokenBatch(x=layout.shard(x), positions=layout.shard(tokens_of(3)))
    return forward_arguments(cfg, tokens, zeros(), layout.shard_conditions(conditions, x))


@lru_cache
def structure(cfg: ModelConfig, known: bool = False) -> ModelProfile:
    """What a model of this shape is made of. ``known``: as trained with ``conditioning.masks``."""
    with torch.device("meta"):
        found = profile_of(build_model(cfg), partial(run_denoiser, known=known))
    # Who exchanges what is decided by the one in a run, and by the other in formulas.
    assert not found.is_factored or found.heads_along_space == describe(cfg).heads, "Denoising.heads: along space"
    return found


def shapes(cfg: RunConfig) -> list[Shape]:
    """Every row of the bucket table at its size of most tokens; the table of clips is not read."""
    multiple = describe(cfg.model).pixel_multiple(autoencoder_shape(cfg.vae).stride)
    largest: dict[str, Shape] = {}
    for bucket in BucketTable(cfg.data, multiple).buckets:
        one = _as_seen(cfg, bucket.frames, (bucket.height, bucket.width))
        batch = replace(one, samples=bucket.batch_size)
        name = f"{bucket.resolution} x {bucket.frames}"
        known = largest[name].batch if name in largest else None
        if known is None or batch.samples * batch.img > known.samples * known.img:
            clips = (bucket.batch_size, bucket.frames, bucket.height, bucket.width)
            largest[name] = Shape(name=name, batch=batch, clips=clips)
    return list(largest.values())


def _as_seen(cfg: RunConfig, frames: int, size: tuple[int, int]) -> MicroBatch:
    """One clip of this length and (height, width), as tokens."""
    denoising = describe(cfg.model)
    grid = denoising.grid(latent_grid(frames, *size, autoencoder_shape(cfg.vae)))
    return MicroBatch(
        samples=1,
        txt=denoising.text_tokens(text_tokens(cfg.text)),
        img=grid.tokens,
        frames=grid.frames if denoising.token_axes == "factored" else None,
        has_mask=has_mask(cfg.text),
    )


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
    ) -> None:
        """
        Args:
            frozen: bytes of autoencoder and text encoder.
            known: training gives the model frames, see ``conditioning.masks``.
            objective: that it is trained with; None: that of the family's published weights.
        """
        self.model, self.optim, self.device_type, self.frozen = model, optim, device_type, frozen
        self.known = known
        self.objective = build_objective(objective or OBJECTIVE_CONFIGS[family_of(model).objective]())
        self.structure = structure(model, known)
        with torch.device("meta"):
            self._stand_ins = _stand_ins(build_model(model))
        self._lines: dict[Any, Timeline] = {}

    def memory(self, place: RankLayout, batch: MicroBatch, *, batches: int = 1, exact: bool = True) -> Footprint:
        """Most that a process holds at any moment of a step of ``batches`` equal micro-batches.

        ``exact=False`` interpolates between two runs on the meta device that serve all buckets and degrees.
        """
        whole = (False, True) if batches > 1 and place.cfg.zero < 2 else (False,)
        lines = [self._micro_batch(place, batch, accumulates, exact) for accumulates in whole]
        return peak_memory.peak(self.structure, place, self.optim, *lines, batches=batches, frozen=self.frozen)

    def state(self, place: RankLayout) -> Footprint:
        """What a process holds whatever goes through the model: between steps, and its gradients."""
        state = peak_memory.state_of(self.structure, place, self.optim, self.frozen)
        return replace(state, gradients=peak_memory.trained_values(self.structure, place) * place.itemsize("master"))

    def forward_flops(self, batch: MicroBatch) -> int:
        """Of one whole micro-batch, all processes that share it together."""
        sizes = batch.sizes(self.structure)
        return batch.samples * sum(count * _unit_flops(unit, sizes) for unit, count in self.structure.unit_counts)

    def forecast(
        self,
        place: RankLayout,
        shape: Shape,
        batches: int,
        device: Device,
        network: Network,
        memory: Footprint,
        step_batches: int,
        encoding: int = 0,
    ) -> Forecast:
        """Everything about a step in which every micro-batch is of this shape."""
        sent = comm_volume.step_bytes(self.structure, place, [shape.batch] * batches)
        seconds = self.seconds(place, [shape.batch] * batches, device, network)
        flops = training_flops(self.forward_flops(shape.batch)) * step_batches
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
            encoding=encoding,
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
        exchanges = step_exchanges(self.structure, place, batches)
        degrees = {name: mesh[name].degree for name in meshes.AXES}
        seconds = network.seconds(degrees, place.cfg.zero, sent, exchanges)
        hidden = {} if self.device_type == "cpu" else {FSDP: compute, "ring": inside}
        return compute + sum(max(0.0, s - hidden.get(axis, 0.0)) for axis, s in seconds.items())

    def on_wire(self, place: RankLayout, batches: Sequence[MicroBatch]) -> dict[str, int]:
        """Axis -> bytes that this process sends in a step by what the backend makes of the exchanges."""
        peers = Peers(host_traffic.REDUCTIONS["gloo" if self.device_type == "cpu" else "nccl"])
        return comm_volume.step_bytes(self.structure, replace(place, peers=peers), batches)

    def _hardware_flops(self, place: RankLayout, batch: MicroBatch) -> tuple[int, int]:
        """(operations of a micro-batch with what is computed again, those of attention), all that share it together."""
        sizes, blocks = batch.sizes(self.structure), self.structure.blocks
        attention = sum(count * _attention_flops(unit, sizes) for unit, count in self.structure.unit_counts)
        kinds = Counter(zip(self.structure.like, comm_volume.recomputed(len(blocks), place), strict=True))
        again = sum(n * _rerun_flops(blocks[i], sizes, kind) for (i, kind), n in kinds.items())
        every = training_flops(self.forward_flops(batch)) + again * batch.samples
        return every, training_flops(attention * batch.samples)

    def _micro_batch(self, place: RankLayout, batch: MicroBatch, accumulates: bool, exact: bool) -> Timeline:
        """Every block at its own kind of recomputation, from short models in which all blocks have the same."""
        kinds = comm_volume.recomputed(len(self.structure.blocks), place)
        lines = {kind: self._line(place, kind, batch, accumulates, exact) for kind in dict.fromkeys(kinds)}
        parts = [(lines[kind], shown) for kind, shown in zip(kinds, self._stand_ins, strict=True)]
        return assemble(parts, lines[kinds[-1]])

    def _line(self, place: RankLayout, kind: str, batch: MicroBatch, accumulates: bool, exact: bool) -> Timeline:
        if exact:
            return self._run(place, kind, batch, accumulates)
        degrees = {name: min(2, place.mesh[name].degree) for name in ("ring", "ulysses")}
        shared = prod(degrees.values())
        small = replace(place, mesh=meshes.view(degrees | {"tensor": place.mesh["tensor"].degree}))
        if self.structure.cuts_text:
            tries = [replace(batch, samples=1, txt=n // 16 * shared, img=n * 15 // 16 * shared) for n in PROBED]
            here = batch.samples * sum(place.local_tokens(self.structure, batch))
            shares = [(here - PROBED[0]) / (PROBED[1] - PROBED[0])]
        else:
            tries = self._tries(place, batch, shared)
            first, *others = (self._sizes(small, tried) for tried in tries)
            shares = np.linalg.lstsq((np.array(others) - first).T, self._sizes(place, batch) - first)[0].tolist()
        low, *highs = (self._run(small, kind, tried, accumulates) for tried in tries)
        return interpolate(low, *zip(highs, shares, strict=True))

    def _tries(self, place: RankLayout, batch: MicroBatch, shared: int) -> list[MicroBatch]:
        """Where text is no part of the sequence: one with little of all, one each with more tokens and more text. If
        axes are exchanged also one whose frames are cut unevenly, so that a process has more tokens between switches.
        """
        inside = place.local_sizes(self.structure, batch).get("frames_inside")
        switches = batch.frames is not None and inside != batch.frames
        frames = batch.frames and (PROBED_FRAMES if switches or place.mesh["ulysses"].degree == 1 else 1)
        sizes = [(PROBED_TEXT[t], PROBED[i] * shared, frames) for t, i in ((0, 0), (0, 1), (1, 0))]
        if switches:
            sizes.append((PROBED_TEXT[0], PROBED[0] // 3 * 3 * shared, 3))
        return [replace(batch, samples=1, txt=txt, img=img, frames=frames) for txt, img, frames in sizes]

    def _sizes(self, place: RankLayout, batch: MicroBatch) -> np.ndarray:
        """Tokens of all samples on a process: image, the same between axis switches, text."""
        sizes = place.local_sizes(self.structure, batch)
        txt, img = place.local_tokens(self.structure, batch)
        inside = sizes["frames_inside"] * sizes["places_inside"] if self.structure.is_factored else img
        return batch.samples * np.array([img, inside, txt], float)

    def _run(self, place: RankLayout, kind: str, batch: MicroBatch, accumulates: bool) -> Timeline:
        mesh = place.mesh
        layout = tuple((mesh[name].degree, mesh[name].rank) for name in ("ring", "ulysses", "tensor"))
        key = (layout, place.cfg.precision, place.cfg.attention, kind, batch, accumulates)
        if key not in self._lines:
            cfg = replace(place.cfg, recompute=RecomputeConfig(kind=kind))  # type: ignore[arg-type]
            with torch.device("meta"):
                model = _shortened(build_model(self.model))
            spread(model, cfg, mesh, self.device_type)
            sequence, known = SequenceParallel(mesh), self.known

            def loss() -> Tensor:
                # Inputs without a name, which would keep them alive while the loss is computed.
                prediction = model(**denoiser_inputs(self.model, batch, sequence, known=known))
                return _objective_loss(self.model, self.objective, prediction)

            self._lines[key] = timeline(model, loss, accumulates=accumulates)
        return self._lines[key]


def _shortened(model: nn.Module) -> nn.Module:
    """The model with the blocks of every list that are run to know them all, in place."""
    for name in protocol.block_lists(model):
        blocks = list(model.get_submodule(name).children())
        if len(blocks) > REPEATED:
            setattr(model, name, nn.ModuleList([*blocks[: REPEATED - 1], blocks[-1]]))
    return model


def _stand_ins(model: nn.Module) -> list[int]:
    """For every block the number of one like it in the model that ``_shortened`` leaves; shortens the model."""
    names = protocol.block_names(model)
    depths = {name: len(list(model.get_submodule(name).children())) for name in protocol.block_lists(model)}
    shown = protocol.block_names(_shortened(model))
    found = []
    for name in names:
        blocks, _, key = name.rpartition(".")
        depth, left, index = depths[blocks], min(depths[blocks], REPEATED), int(key)
        like = index if index < left - 1 else left - 1 if index == depth - 1 else left - 2
        found.append(shown.index(f"{blocks}.{like}"))
    return found


def _objective_loss(cfg: ModelConfig, objective: Objective, prediction: Tensor) -> Tensor:
    """What training sums up of a prediction."""
    point, time = torch.zeros(1, 1, 1, 1, 1), torch.zeros(1)
    shape = (*prediction.shape[:-1], prediction.shape[-1] // describe(cfg).outputs)
    names = objective.noised(point, point, time).targets
    targets = {name: torch.zeros(shape, device=prediction.device) for name in names}
    return objective.loss(prediction, targets, time.to(prediction.device)).sum()


def _unit_flops(unit: ShardUnit, sizes: Sizes) -> int:
    """Forward of one sample."""
    layers = sum(linear_flops(layer.inputs, layer.outputs, layer.rows.at(sizes)) for layer in unit.layers)
    return layers + _attention_flops(unit, sizes)


def _rerun_flops(unit: ShardUnit, sizes: Sizes, kind: str) -> int:
    """Of what the block computes again in backward."""
    again, attention = comm_volume.RERUN[kind], _attention_flops(unit, sizes)
    return again.layers * (_unit_flops(unit, sizes) - attention) + again.attention * attention


def _attention_flops(unit: ShardUnit, sizes: Sizes) -> int:
    return sum(
        slot.batch.at(sizes) * attention_flops(slot.queries.at(sizes), slot.keys.at(sizes), slot.heads * slot.head_dim)
        for slot in unit.attentions
    )
