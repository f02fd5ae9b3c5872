"""What a run says about itself: a record every few steps, summed over processes when it is due and not before."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.memory import peak_gib
from acceleration.mesh import Mesh
from opensora.utils.logging import MetricsLogger, progress

if TYPE_CHECKING:
    from opensora.datasets.bucket import Bucket
    from opensora.train.setup import Run


class Metrics:
    """Collects losses on the device; every ``every`` steps reduces them and writes one record on rank 0."""

    def __init__(self, logger: MetricsLogger | None, *, every: int, start_step: int, total_steps: int) -> None:
        """``logger``: where records go; None on processes that do not write."""
        self._logger = logger
        self._every = every
        self._bar = progress(total_steps, initial=start_step) if logger else None
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._tokens = 0
        self._buckets: Counter[Bucket] = Counter()  # samples consumed
        self._since = time.monotonic()
        self._waited_s = 0.0
        self._sent: Counter[str] = Counter()  # bytes by axis that are not of the steps since the last record
        self._predicted: Counter[str] = Counter()
        self._aside: dict[str, float] = {}

    def record(self, run: "Run", loss: Tensor, grad_norm: Tensor, *, last: bool) -> None:
        """Note the update just made (``run.step`` counts it); ``loss`` is this process's share. Collective when due."""
        self._losses.append(loss)
        self._norms.append(grad_norm.detach())
        self._buckets += run.data.bucket_samples(run.step - 1)
        self._tokens += run.tokens(run.step - 1)
        if self._logger and run.traffic:
            self._predicted.update(run.traffic.of_step(run.step - 1))
        if run.step % self._every and not last:
            return
        # Processes along the tensor axis hold the same share: one of them counts.
        losses = torch.stack(self._losses) * (run.mesh["tensor"].rank == 0)
        dist.all_reduce(losses)
        seconds = time.monotonic() - self._since
        steps = len(self._losses)
        values = {
            "loss": losses.mean().item(),
            "grad_norm": torch.stack(self._norms).mean().item(),
            "lr": run.lr_at(run.step - 1),
            "epoch": run.data.plan.epoch_of(run.step - 1),
            "time/step_s": seconds / steps,
            "data/wait_s": (run.data.waited_s - self._waited_s) / steps,
            "rate/samples_per_s": self._buckets.total() / seconds,
            "rate/tokens_per_s": self._tokens / seconds,
            "mem/peak_gib": peak_gib(run.runtime.device),
        }
        for name, sent in (run.mesh.bytes_sent() - self._sent).items():
            values[f"comm/{name}_gib"] = sent / steps / 2**30
        values |= {f"comm/{name}_predicted_gib": sent / steps / 2**30 for name, sent in self._predicted.items()}
        values |= run.reads.due()
        values |= {f"samples/{bucket}": count for bucket, count in self._buckets.items()}
        values |= self._aside
        self._aside.clear()
        self._losses.clear()
        self._norms.clear()
        self._tokens = 0
        self._sent = run.mesh.bytes_sent()
        self._predicted.clear()
        self._buckets.clear()
        self._since, self._waited_s = time.monotonic(), run.data.waited_s
        if self._logger and self._bar is not None:
            self._logger.log(run.step, values)
            self._bar.update_to(run.step, values)

    @contextmanager
    def aside(self, name: str, mesh: Mesh) -> Iterator[None]:
        """Time and traffic of what is done here are not the steps'; the next record has ``time/{name}_s``."""
        started, sent = time.monotonic(), mesh.bytes_sent()
        yield
        self._sent += mesh.bytes_sent() - sent
        seconds = time.monotonic() - started
        self._since += seconds
        self._aside[f"time/{name}_s"] = self._aside.get(f"time/{name}_s", 0.0) + seconds

    def note(self, event: str, step: int) -> None:
        """Put an event between the records."""
        if self._logger:
            self._logger.note(event, step)

    def close(self) -> None:
        """Flush the writers."""
        if self._logger and self._bar is not None:
            self._bar.close()
            self._logger.close()
