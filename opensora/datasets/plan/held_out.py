"""Samples of a held-out table: which, in which bucket, and who computes which, for a loss that runs and layouts share.

What is chosen depends on the table, the buckets and the seed alone: not on the number of processes, nor on what is
trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from opensora.datasets.buckets.bucket import Bucket
from opensora.datasets.config import DataConfig
from opensora.datasets.plan.batch_plan import BatchPlan, MicroBatch
from opensora.datasets.plan.counter_rng import permuted
from opensora.datasets.table.index import IndexedTable
from opensora.utils.rng import derive_key


@dataclass(frozen=True)
class HeldOut:
    """A held-out table and what is used of it."""

    table: IndexedTable
    plan: BatchPlan
    data: DataConfig
    micro_batches: tuple[MicroBatch, ...]  # every chosen sample once

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Those that have a sample."""
        return tuple(dict.fromkeys(micro_batch.bucket for micro_batch in self.micro_batches))

    @property
    def sample_ids(self) -> tuple[int, ...]:
        """Rows of the table."""
        return tuple(sample for micro_batch in self.micro_batches for sample in micro_batch.sample_ids)

    def assign(self, dp_rank: int, dp_degree: int) -> tuple[MicroBatch, ...]:
        """A rank's micro-batches, equally many on every rank: one that would have fewer repeats the last uncounted."""
        turns = -(-len(self.micro_batches) // dp_degree)
        mine = self.micro_batches[dp_rank::dp_degree]
        return mine + (self.micro_batches[-1].uncounted(),) * (turns - len(mine))


def held_out_data(cfg: DataConfig, table: Any, root: str) -> DataConfig:
    """How a held-out table is read: into the buckets of training, from files, at the centre of every frame."""
    return replace(
        cfg,
        table=table,
        root=root,
        features="",
        unused_rows="report",
        crop="center",
        micro_batches=1,
        balance_group=1,
        tokens_per_sequence=0,
    )


def choose(plan: BatchPlan, samples: int, seed: int) -> tuple[MicroBatch, ...]:
    """At most ``samples`` samples of epoch 0, bucket by bucket; equally many of each, as far as it has them."""
    members = {bucket: plan.members(MicroBatch(bucket, (), 0)) for bucket, _ in plan.report().per_bucket}
    quotas = even_shares([len(ids) for ids in members.values()], samples)
    found = []
    for (bucket, ids), quota in zip(members.items(), quotas, strict=True):
        key = derive_key(seed, "held out", str(bucket))
        chosen = sorted(int(ids[place]) for place in permuted(np.arange(quota), len(ids), key))
        size = bucket.batch_size
        parts = (tuple(chosen[first : first + size]) for first in range(0, quota, size))
        found += [MicroBatch(bucket, part, 0) for part in parts]
    return tuple(found)


def even_shares(counts: Sequence[int], total: int) -> list[int]:
    """At most ``total`` in all, of each at most its count, and otherwise as even as can be.

    >>> even_shares([2, 10, 10], 12)
    [2, 5, 5]
    """
    shares = [0] * len(counts)
    left = total
    order = sorted(range(len(counts)), key=lambda place: (counts[place], -place))
    for done, place in enumerate(order):
        shares[place] = min(counts[place], left // (len(counts) - done))
        left -= shares[place]
    return shares
