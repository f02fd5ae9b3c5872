"""What this process reads at each step, and what the whole step amounts to."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from math import prod

from acceleration.distributed.mesh import Mesh
from opensora.assembly.bucket_shapes import check_buckets as check_buckets
from opensora.conditioning.frames import draw_known
from opensora.conditioning.references import draw_kind, given_frames
from opensora.config.run import LossReduction, RunConfig
from opensora.datasets import DataConfig
from opensora.datasets.buckets.bucket import Bucket
from opensora.datasets.loading.loader import build_loader
from opensora.datasets.loading.reader import Batch, PackedBatch
from opensora.datasets.plan.batch_plan import BatchPlan, MicroBatch, PackedSequence
from opensora.datasets.plan.batch_plan import check_rows as check_rows
from opensora.datasets.plan.dynamic_sp import SequenceSharing
from opensora.datasets.table.index import IndexedTable, open_table
from opensora.models.base import AutoencoderShape, ClipMeasure, latent_grid
from opensora.models.families import describe
from opensora.models.text import text_tokens
from opensora.models.vae import autoencoder_shape


def open_data(cfg: RunConfig) -> tuple[IndexedTable, BatchPlan]:
    """The clip table, indexed once per node, and the order of the run.

    Raises:
        UserError: the table cannot be read, the autoencoder cannot code a bucket's length, or no clip fits a bucket.
    """
    shape, denoising = autoencoder_shape(cfg.vae), describe(cfg.model)
    check_buckets(cfg.data, shape, denoising)
    table = open_table(cfg.data.table, cfg.data.root, cfg.data.index)
    # A bucket's size is a multiple of the pixels that one token spans on a side.
    multiple = denoising.pixel_multiple(shape.stride)
    return table, BatchPlan(table, cfg.data, multiple, cfg.seed, ClipMeasure(shape, denoising))


def expected_idle(plan: BatchPlan, dp_degree: int, steps: Iterable[int]) -> float:
    """Mean share of steps that data-parallel processes wait for the slowest, by the cost model."""
    shares = [plan.idle(step, dp_degree) for step in steps]
    return sum(shares) / len(shares)


Given = Callable[[int, int, int], int]  # (step, sample, latent frames) -> how many of these the loss leaves out


def left_out(cfg: RunConfig) -> Given | None:
    """How many latent frames of a sample are given to the model and not learned; None: of none any."""
    conditioning, shape, denoising = cfg.conditioning, autoencoder_shape(cfg.vae), describe(cfg.model)
    masks, weights = conditioning.masks, conditioning.references

    def masked(step: int, sample: int, frames: int) -> int:
        known = draw_known(cfg.seed, step, sample, frames, masks)
        return 0 if known is None else int(known.sum())

    def referenced(step: int, sample: int, frames: int) -> int:
        return given_frames(draw_kind(cfg.seed, step, sample, frames, weights, shape, learn_some=True), frames, shape)

    if denoising.references == "in_place" and masks:
        return masked
    return referenced if denoising.reads_beside and weights and not conditioning.known_in_loss else None


def sharing(cfg: RunConfig, mesh: Mesh) -> SequenceSharing | None:
    """This process among those of its data-parallel rank; None where all of them cut all samples."""
    if not cfg.parallel.mesh.dynamic:
        return None
    axis = mesh["ulysses"]
    text = describe(cfg.model).text_tokens(text_tokens(cfg.text))
    return SequenceSharing(degree=axis.degree, rank=axis.rank, text_tokens=text)


class StepData:
    """Batches of this process in step order, from ``start_step`` on."""

    def __init__(
        self,
        table: IndexedTable,
        plan: BatchPlan,
        cfg: DataConfig,
        mesh: Mesh,
        shape: AutoencoderShape,
        *,
        start_step: int,
        stop_step: int,
        seed: int,
        sharing: SequenceSharing | None = None,
        given: Given | None = None,
        reduction: LossReduction = "elements",
    ) -> None:
        """
        Args:
            sharing: choose for each micro-batch how many processes cut a sample; see ``BatchPlan.assign``.
            given: see ``left_out``.
            reduction: see ``loss_terms``.
        """
        self.plan = plan
        self.index = table
        self.table = table.content
        self.waited_s = 0.0  # time the loop spent waiting for data
        self._rank, self._degree, self._sharing = mesh.data_rank, mesh.data_degree, sharing
        self._shape, self._given, self._reduction = shape, given, reduction
        self._batches = build_loader(
            table,
            plan,
            cfg,
            start_step=start_step,
            stop_step=stop_step,
            dp_rank=self._rank,
            dp_degree=self._degree,
            seed=seed,
            sharing=sharing,
        )

    def assigned(self, step: int) -> tuple[MicroBatch | PackedSequence, ...]:
        """This process's micro-batches, or packs, of a step."""
        return self.plan.assign(step, self._rank, self._degree, self._sharing)

    def assigned_to(self, step: int, mesh: Mesh) -> tuple[MicroBatch | PackedSequence, ...]:
        """The same of the process that sees ``mesh``."""
        sharing = replace(self._sharing, rank=mesh["ulysses"].rank) if self._sharing else None
        return self.plan.assign(step, mesh.data_rank, mesh.data_degree, sharing)

    def microbatches(self, step: int) -> Iterator[tuple[Batch | PackedBatch, bool]]:
        """(batch, whether it is the step's last) for this process. Every process gets equally many."""
        count = len(self.assigned(step))
        for i in range(count):
            started = time.monotonic()
            batch = next(self._batches)
            self.waited_s += time.monotonic() - started
            yield batch, i == count - 1

    def loss_terms(self, step: int) -> int:
        """What the loss of this step is the mean over: latent values, or samples, all processes together."""
        return self.global_elements(step) if self._reduction == "elements" else self.bucket_samples(step).total()

    def global_elements(self, step: int) -> int:
        """Latent values that the loss of this step is the mean over, all processes together; no communication."""
        if self._given is None:
            return self.latent_values(step)
        parts = [part for batch in self.plan.step(step) for part in batch.parts]
        return sum(self._learned(part.bucket, step, sample) for part in parts for sample in part.sample_ids)

    def latent_values(self, step: int) -> int:
        """Latent values of this step's samples, all processes together."""
        return sum(samples * self._latents(bucket) for bucket, samples in self.plan.shapes(step).items())

    def bucket_samples(self, step: int) -> Counter[Bucket]:
        """Samples of each bucket that this step consumes, all processes together."""
        return self.plan.shapes(step)

    def close(self) -> None:
        """End the workers."""
        self._batches.close()

    def _latents(self, bucket: Bucket) -> int:
        return self._shape.channels * prod(latent_grid(bucket.frames, bucket.height, bucket.width, self._shape))

    def _learned(self, bucket: Bucket, step: int, sample: int) -> int:
        """Latent values of one sample without the frames that the model is given."""
        frames = latent_grid(bucket.frames, bucket.height, bucket.width, self._shape)[0]
        given = 0 if self._given is None else self._given(step, sample, frames)
        return self._latents(bucket) * (frames - given) // frames


def open_batches(cfg: RunConfig, table: IndexedTable, plan: BatchPlan, mesh: Mesh, step: int) -> StepData:
    """What this process reads from update ``step`` on."""
    shape = autoencoder_shape(cfg.vae)
    return StepData(
        table,
        plan,
        cfg.data,
        mesh,
        shape,
        start_step=step,
        stop_step=cfg.train.steps,
        seed=cfg.seed,
        sharing=sharing(cfg, mesh),
        given=left_out(cfg),
        reduction=cfg.train.loss_reduction,
    )
