"""The loss on clips that a run is not trained on, by part of the time and by bucket.

A sample is encoded once in a round and seen at one time in each bin. Noise, time, crop and the kind of its references
are functions of (validate.seed, sample, bin, purpose): of no step, process, batch or run. Loss is the objective's,
summed over all processes and divided by the number of latent values, so it is that of one process on any layout.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acceleration.distributed.comm_timer import WAITING
from acceleration.distributed.mesh import Mesh
from opensora.assembly.encoders import Encoders
from opensora.conditioning import DropoutConfig
from opensora.config.run import RunConfig
from opensora.datasets.loading.feature_store import Features
from opensora.datasets.loading.loader import read_batches
from opensora.datasets.loading.reader import Batch
from opensora.datasets.plan.batch_plan import BatchPlan
from opensora.datasets.plan.held_out import HeldOut, choose, held_out_data
from opensora.datasets.table.index import IndexedTable, open_table
from opensora.datasets.table.overlap import common_clips
from opensora.models.base import ClipMeasure, TextFeatures
from opensora.models.families import describe
from opensora.models.vae import autoencoder_shape
from opensora.schedulers.base import Objective
from opensora.train.preparation import Preparation, Tokens
from opensora.utils.console import Progress, announce
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import short
from opensora.utils.rng import torch_generator
from opensora.utils.tokens import Grid

SHOWN = 3  # clips that a message names


def open_held_out(cfg: RunConfig) -> HeldOut | None:
    """The samples that every round of validation uses; None without a held-out table.

    Raises:
        UserError: it cannot be read, or none of its clips fits a bucket.
    """
    validate = cfg.validate
    if not validate.every or not validate.table:
        return None
    shape, denoising = autoencoder_shape(cfg.vae), describe(cfg.model)
    data, multiple = held_out_data(cfg.data, validate.table, validate.root), denoising.pixel_multiple(shape.stride)
    try:
        table = open_table(validate.table, validate.root, cfg.data.index)
        plan = BatchPlan(table, data, multiple, validate.seed, ClipMeasure(shape, denoising))
    except UserError as error:
        named = str(error).replace("data.table", "validate.table")
        key = "" if "validate.table" in named else f"validate.table={short(str(validate.table))}: "
        raise UserError(f"{key}{named}") from None
    return HeldOut(table, plan, data, choose(plan, validate.samples, validate.seed))


def announce_held_out(held: HeldOut, training: IndexedTable) -> None:
    """Say what the loss will be of, and which of these clips are trained on as well."""
    report, used = held.plan.report(), held.sample_ids
    fitting = sum(count for _, count in report.per_bucket)
    announce(
        f"validation: {len(used)} of {len(held.table)} held-out clips in {len(held.buckets)} buckets"
        + (f"; {len(held.table) - fitting} fit no bucket" if fitting < len(held.table) else "")
    )
    if common := common_clips(used, held.table, training):
        names = ", ".join(held.table.path(row) for row in common[:SHOWN])
        announce(
            f"validate.table: {len(common)} of the {len(used)} clips are in data.table too ({names}"
            f"{', ...' if len(common) > SHOWN else ''}): the loss on these says nothing of what is new to the model"
        )


@dataclass(frozen=True)
class _InBin:
    """Times of samples, uniform within a part of all times."""

    low: float
    high: float
    whole: bool = False  # numbers alone are times

    def __call__(self, seed: int, step: int, sample_ids: tuple[int, ...], grid: Grid) -> Tensor:
        """(B,) fp32 on the CPU."""
        drawn = [torch.rand((), generator=torch_generator(seed, step, sample, "time in bin")) for sample in sample_ids]
        times = self.low + (self.high - self.low) * torch.stack(drawn)
        return times.floor() if self.whole else times


@dataclass(frozen=True, kw_only=True)
class _EncodedAhead(Encoders):
    """Gives what is encoded already with the batch."""

    def encode(self, batch: Batch, text: TextFeatures | None = None) -> Features:
        assert batch.features is not None
        return batch.features


def in_bins(prepare: Preparation, bins: int, seed: int) -> tuple[Encoders, tuple[Preparation, ...]]:
    """What encodes held-out clips, and what then makes tokens of them in each bin: whole prompts, fixed draws."""
    values = {entry.name: getattr(prepare.encoders, entry.name) for entry in fields(Encoders)}
    values |= {"stored": False, "seed": seed}
    conditioning = replace(prepare.conditioning, dropout=DropoutConfig(text=0.0, pooled=0.0))
    ahead = replace(prepare, encoders=_EncodedAhead(**values), conditioning=conditioning, seed=seed, by_degree={})
    latest = getattr(prepare.objective, "latest_time", 1.0)
    edges = itertools.pairwise(bin_edges(prepare.objective, bins, latest))
    whole = getattr(prepare.objective, "whole_times", False)
    return Encoders(**values), tuple(replace(ahead, times=_InBin(*edge, whole)) for edge in edges)


def bin_edges(objective: Objective, bins: int, latest: float = 1.0) -> list[float]:
    """Where bins begin and end: of all times up to the latest, or of those that an expert is trained at."""
    low, high = getattr(objective, "time_range", (0.0, 1.0))
    return [latest * low + latest * (high - low) * index / bins for index in range(bins + 1)]


@dataclass
class Totals:
    """Sums over this process's share of what was seen, by bucket and bin."""

    names: tuple[str, ...]  # of buckets
    bins: int
    sums: Tensor = field(init=False)  # (buckets, bins, 3) fp64: loss, latent values, samples

    def __post_init__(self) -> None:
        self.sums = torch.zeros(len(self.names), self.bins, 3, dtype=torch.float64)

    def add(self, name: str, index: int, loss: Tensor, values: Tensor, counted: Tensor, *, samples: int) -> None:
        """Per sample: (B,) sums of loss and latent values on this process; those not ``counted`` are left out."""
        kept = torch.stack([torch.where(counted, x.double(), 0.0).sum() for x in (loss, values)]).cpu()
        self.sums[self.names.index(name), index] += torch.cat([kept, torch.tensor([samples], dtype=torch.float64)])

    def reduced(self, mesh: Mesh) -> Tensor:
        """(buckets, bins, 3) over all processes. Collective."""
        # Processes along the tensor axis hold the same share: one of them counts.
        share = (self.sums * (mesh["tensor"].rank == 0)).to(torch.device(mesh.device_type))
        with WAITING.on("all_reduce of the validation loss"):
            dist.all_reduce(share)
        return share.cpu()


def records(totals: Totals, sums: Tensor, ends: Sequence[float]) -> dict[str, Any]:
    """What goes to metrics.jsonl: means over latent values, of all, by bin, by bucket, and by both.

    ``ends``: of the bins, see ``bin_edges``.
    """
    edges = [f"{low:.2f}-{high:.2f}" for low, high in itertools.pairwise(ends)]

    def mean(part: Tensor) -> float:
        loss, values = part.reshape(-1, 3).sum(0)[:2].tolist()
        return loss / values if values else float("nan")

    found: dict[str, Any] = {"validate/loss": mean(sums), "validate/samples": round(float(sums[:, 0, 2].sum()))}
    found |= {f"validate/bin/{edge}": mean(sums[:, index]) for index, edge in enumerate(edges)}
    for row, name in enumerate(totals.names):
        found[f"validate/bucket/{name}"] = mean(sums[row])
        found[f"validate/bins/{name}"] = [mean(sums[row, index]) for index in range(totals.bins)]
    return found


@torch.no_grad()
def sample_losses(model: nn.Module, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """(B,) sums of the loss over this process's tokens of every sample, and how many values these are of."""
    loss = tokens.objective.loss(model(**tokens.inputs), tokens.targets, tokens.times).double()
    learned = torch.ones_like(loss, dtype=torch.bool)
    if tokens.learned is not None:
        learned = tokens.learned[..., None].expand_as(loss)
    return torch.where(learned, loss, 0.0).flatten(1).sum(1), learned.flatten(1).sum(1)


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """Computes the numbers of a round, in the layout of a run."""

    held: HeldOut
    encoders: Encoders  # of held-out clips
    prepared: tuple[Preparation, ...]  # what makes tokens of them, in each bin
    mesh: Mesh
    device: torch.device
    seed: int
    told: set[int] = field(default_factory=set)  # clips that cannot be read, and which was said

    def round(self, model: nn.Module, stops: Callable[[], bool]) -> dict[str, Any] | None:
        """The numbers, or None if ``stops`` says so before a micro-batch, everywhere. Collective."""
        held, bins = self.held, len(self.prepared)
        mine = held.assign(self.mesh.data_rank, self.mesh.data_degree)
        totals = Totals(tuple(map(str, held.buckets)), bins)
        bar = Progress(len(mine) * bins, unit="validation") if dist.get_rank() == 0 else None
        batches = read_batches(held.table, held.plan, held.data, iter(mine), self.seed, substitutes=False)
        try:
            for turn, batch in enumerate(batches):
                if stops():
                    return None
                assert isinstance(batch, Batch)
                self._add(totals, model, batch)
                if bar is not None:
                    bar.update_to((turn + 1) * bins)
        finally:
            batches.close()
            if bar is not None:
                bar.close()
        return records(totals, totals.reduced(self.mesh), bin_edges(self.prepared[0].objective, bins))

    def _add(self, totals: Totals, model: nn.Module, batch: Batch) -> None:
        """One micro-batch, at a time in every bin."""
        unreadable = {sample: why for sample, _, why in batch.replaced}
        readable = [batch.weight > 0 and sample not in unreadable for sample in batch.sample_ids]
        counted = torch.tensor(readable, device=self.device)
        batch = replace(batch, features=self.encoders.encode(batch))
        is_first = self.mesh.is_first_of_sample
        for index, prepare in enumerate(self.prepared):
            loss, values = sample_losses(model, prepare(batch, index))
            totals.add(str(batch.bucket), index, loss, values, counted, samples=sum(readable) if is_first else 0)
        if is_first and batch.weight:
            self._tell(unreadable)

    def _tell(self, unreadable: Mapping[int, str]) -> None:
        for sample, why in unreadable.items():
            if sample not in self.told:
                self.told.add(sample)
                announce(f"validate.table: row {sample + 1} is left out of the validation loss: {why}", every_rank=True)


def held_out_loss(cfg: RunConfig, held: HeldOut | None, prepare: Preparation, mesh: Mesh) -> HeldOutLoss | None:
    """For a run that has held-out clips; ``prepare`` is what its training uses."""
    if held is None:
        return None
    encoders, prepared = in_bins(prepare, cfg.validate.bins, cfg.validate.seed)
    device = prepare.encoders.device
    return HeldOutLoss(
        held=held, encoders=encoders, prepared=prepared, mesh=mesh, device=device, seed=cfg.validate.seed
    )
