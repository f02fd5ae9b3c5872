"""What reading the data cost, and what could not be read: listed, counted, and too much when it is too much."""

import json
import os
from collections import deque
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from acceleration.distributed.mesh import SAMPLE_AXES, Mesh
from opensora.datasets.table.manifest import ClipTable
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.rng import derive_key

if TYPE_CHECKING:
    from opensora.datasets.loading.reader import Batch, PackedBatch

RECENT = 1000  # samples that ``data.max_bad_share`` is a share of
IN_A_ROW = 100  # unreadable samples after which something else is wrong than the samples


class DataHealth:
    """Watches the micro-batches of this process.

    ``folder/rank-00000.jsonl`` gets a line for every sample that could not be read: step, sample, path, why, and the
    sample read in its place. Every data-parallel place has a file of its own; the first process at it writes. Where
    groups of its processes have samples of their own, the first of those does, to a file of its own.
    """

    def __init__(self, folder: Path, table: ClipTable, mesh: Mesh, max_bad_share: float) -> None:
        part = f"-{mesh['ulysses'].rank}" * (not mesh.is_first_of_sample)
        self._file = folder / f"rank-{mesh.data_rank:05d}{part}.jsonl"
        self._table = table
        self._mesh = mesh
        self._share = max_bad_share
        self._recent: deque[bool] = deque(maxlen=RECENT)  # whether each sample was unreadable
        self._row = 0
        self._silent = False  # it was said that the list cannot be written
        self._since_record = [0.0, 0.0, 0.0]  # seconds, samples, replaced
        self._replaced = 0.0
        self._digests: dict[int | None, int] = {}  # of micro-batches, by how many processes cut their samples

    def note(self, batch: "Batch | PackedBatch", step: int) -> None:
        """Count a micro-batch of update ``step``.

        Raises:
            UserError: more than the allowed share of the last samples, or too many in a row, could not be read.
        """
        seconds, samples, replaced = self._since_record
        counts = self._mesh.submesh(batch.degree).is_first_of_sample  # else another process has them too
        if counts:
            self._since_record = [seconds + batch.read_s, samples + len(batch.sample_ids), replaced]
        seen = repr([(bad, other) for bad, other, _ in batch.replaced])
        self._digests[batch.degree] = derive_key(self._digests.get(batch.degree, 0), seen)
        if not batch.weight:
            return  # another process has it too
        self._since_record[2] += len(batch.replaced) * counts
        bad = {sample: (other, why) for sample, other, why in batch.replaced}
        if bad and counts:
            self._write({"step": step, "sample": s, "path": self._table.path(s), "why": why, "substitute": other}
                        for s, (other, why) in bad.items())  # fmt: skip
        for sample in batch.sample_ids:
            self._recent.append(sample in bad)
            self._row = self._row + 1 if sample in bad else 0
            if sum(self._recent) > ceil(self._share * RECENT) or self._row >= IN_A_ROW:
                self._stop(bad)

    def due(self) -> dict[str, float]:
        """Values for the record that is due, over all processes, since the last one. Collective.

        Raises:
            UserError: processes that work on the same samples did not read the same.
        """
        self.check_agreement()
        counts = torch.tensor(self._since_record, dtype=torch.float64)
        seconds, samples, replaced = _reduced(counts, self._mesh, None).tolist()
        self._since_record = [0.0, 0.0, 0.0]
        self._replaced += replaced
        return {"data/decode_ms": 1e3 * seconds / max(samples, 1.0), "data/replaced": int(self._replaced)}

    def check_agreement(self) -> None:
        """That processes with tokens of the same samples read the same samples: one of them may have had a storage
        error, or have run into a time limit, that its peers had not. Collective.

        Raises:
            UserError: they did not; what was trained since the last check is worth nothing.
        """
        differs = torch.zeros(1, dtype=torch.int64)
        for degree, digest in sorted(self._digests.items()):
            both = torch.tensor([digest, -digest], dtype=torch.int64)
            highest, lowest = _highest(both, self._mesh.submesh(degree)).tolist()
            differs += highest != -lowest
        if _highest(differs, self._mesh).item():
            raise UserError(
                "data: processes that share samples could not read the same ones (storage errors or "
                f"data.decode_timeout_s); see {self._file.parent} and start again from the last checkpoint"
            )

    def _write(self, records: Any) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666), "a") as file:
                file.write("".join(json.dumps(record) + "\n" for record in records))
        except OSError as error:  # the list is for people; a full disk or a folder in its place must not end the run
            if not self._silent:
                announce(f"{self._file}: samples that cannot be read are not listed ({error.strerror})")
            self._silent = True

    def _stop(self, bad: dict[int, tuple[int, str]]) -> None:
        last = next((why for _, why in bad.values()), "")
        much = f"{sum(self._recent)} of the last {len(self._recent)} samples"
        if self._row >= IN_A_ROW:
            much = f"{self._row} samples in a row"
        raise UserError(
            f"data.max_bad_share={self._share:g}: {much} could not be read ({last}); all are listed in {self._file}: "
            "repair the files, or take them out of the table"
        )


def _highest(values: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The largest over all processes that share samples: axis after axis, so that all of them know."""
    for axis in SAMPLE_AXES:
        if mesh[axis].degree > 1:
            values = _reduced(values, mesh, axis)
    return values


def _reduced(values: torch.Tensor, mesh: Mesh, axis: str | None) -> torch.Tensor:
    """The sum over all processes, or the largest along an axis."""
    values = values.to(torch.device(mesh.device_type))
    if axis is None:
        dist.all_reduce(values)
    else:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=mesh[axis].group)
    return values.cpu()
