"""What a run says about itself: a record every few steps, over all processes when it is due and not before."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any

from acceleration.diagnostics.memory_usage import peak_gib
from acceleration.distributed.mesh import Mesh
from opensora.utils.console import progress
from opensora.utils.metrics_log import MetricsLogger

if TYPE_CHECKING:
    from opensora.datasets.buckets.bucket import Bucket
    from opensora.train.health.anomaly_guard import Update
    from opensora.train.run import Run


class Metrics:
    """Collects updates; every ``every`` steps writes one record on rank 0."""

    def __init__(self, logger: MetricsLogger | None, *, every: int, start_step: int, total_steps: int) -> None:
        """``logger``: where records go; None on processes that do not write."""
        self._logger = logger
        self._every = every
        self._bar = progress(total_steps, initial=start_step) if logger else None
        self._updates: list[Update] = []
        self._tokens = 0
        self._buckets: Counter[Bucket] = Counter()  # samples consumed
        self._since = time.monotonic()
        self._waited_s = 0.0
        self._sent: Counter[str] = Counter()  # bytes by axis that are not of the steps since the last record
        self._predicted: Counter[str] = Counter()
        self._aside: dict[str, float] = {}

    def record(self, run: "Run", update: "Update", *, last: bool) -> None:
        """Note the update just made or left out (``run.step`` counts it). Collective when due."""
        self._updates.append(update)
        self._buckets += run.data.bucket_samples(run.step - 1)
        self._tokens += run.tokens(run.step - 1)
        if self._logger and run.traffic:
            self._predicted.update(run.traffic.of_step(run.step - 1))
        if run.step % self._every and not last:
            return
        made = [update for update in self._updates if update.bad is None] or self._updates
        seconds = time.monotonic() - self._since
        steps = len(self._updates)
        values = {
            "loss": fmean(update.loss for update in made),
            "grad_norm": fmean(update.grad_norm for update in made),
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
        values |= run.phases.due(run.mesh, steps, run.step)
        values["guard/left_out"] = run.guard.left_out
        values |= {f"samples/{bucket}": count for bucket, count in self._buckets.items()}
        values |= self._aside
        self._aside.clear()
        self._begin(run)
        if self._logger and self._bar is not None:
            self._logger.log(run.step, values)
            self._bar.update_to(run.step, values)

    def rewind(self, run: "Run") -> None:
        """Forget the steps after ``run.step``, which will be made again."""
        self._begin(run)
        if self._logger:
            self._logger.rewind(run.step)

    def _begin(self, run: "Run") -> None:
        self._updates.clear()
        self._tokens = 0
        self._sent = run.mesh.bytes_sent()
        self._predicted.clear()
        self._buckets.clear()
        self._since, self._waited_s = time.monotonic(), run.data.waited_s

    @contextmanager
    def aside(self, name: str, mesh: Mesh) -> Iterator[None]:
        """Time and traffic of what is done here are not the steps'; the next record has ``time/{name}_s``."""
        started, sent = time.monotonic(), mesh.bytes_sent()
        yield
        self._sent += mesh.bytes_sent() - sent
        seconds = time.monotonic() - started
        self._since += seconds
        self._aside[f"time/{name}_s"] = self._aside.get(f"time/{name}_s", 0.0) + seconds

    def note(self, event: str, step: int, **values: Any) -> None:
        """Put an event between the records."""
        if self._logger:
            self._logger.note(event, step, **values)

    def close(self) -> None:
        """Flush the writers."""
        if self._logger and self._bar is not None:
            self._bar.close()
            self._logger.close()
