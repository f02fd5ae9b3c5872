"""What a run says about itself: a record every few steps, over all processes when it is due and not before."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from acceleration.diagnostics.interface_bytes import bytes_sent
from acceleration.distributed.mesh import Mesh
from opensora.datasets.buckets.bucket import Bucket
from opensora.train.health.anomaly_guard import Update
from opensora.utils.console import progress
from opensora.utils.metrics_log import Clip, MetricsLogger


class Metrics:
    """Adds up updates; every ``every`` steps there is one record, on rank 0. ``Run.record`` puts it together."""

    def __init__(
        self, logger: MetricsLogger | None, *, every: int, start_step: int, total_steps: int, interface: str = ""
    ) -> None:
        """
        Args:
            logger: where records go; None on processes that do not write.
            interface: by which this process's host reaches the others, whose bytes are then in the records; empty where
                there are none.
        """
        self._interface = interface
        self._logger = logger
        self._every = every
        self._bar = progress(total_steps, initial=start_step) if logger else None
        self._updates: list[Update] = []
        self._tokens = 0
        self._buckets: Counter[Bucket] = Counter()  # samples consumed
        self._since = time.monotonic()
        self._waited_s = 0.0
        self._sent = self._host_sent()  # bytes that are not of the steps since the last record
        self._predicted: Counter[str] = Counter()
        self._excluded: dict[str, float] = {}

    def add(self, update: Update, samples: Counter[Bucket], tokens: int, predicted: Mapping[str, int]) -> None:
        """One more update, made or left out.

        Args:
            samples: consumed of each bucket, by all processes together.
            tokens: image tokens, of all processes together.
            predicted: axis -> bytes that this process should have sent.
        """
        self._updates.append(update)
        self._buckets += samples
        self._tokens += tokens
        self._predicted.update(predicted)

    @property
    def steps(self) -> int:
        """Updates since the last record."""
        return len(self._updates)

    def is_due(self, step: int) -> bool:
        """Whether a record is to be written after ``step`` updates."""
        return step % self._every == 0

    def values(self, mesh: Mesh, waited_s: float) -> dict[str, Any]:
        """What the updates since the last record amount to, on this process.

        Args:
            waited_s: that the loop has waited for data since the run was started.
        """
        made = [update for update in self._updates if update.bad is None] or self._updates
        seconds, steps = time.monotonic() - self._since, len(self._updates)
        sent = self._bytes_sent(mesh) - self._sent
        values: dict[str, Any] = {
            "loss": fmean(update.loss for update in made),
            "grad_norm": fmean(update.grad_norm for update in made),
            "time/step_s": seconds / steps,
            "data/wait_s": (waited_s - self._waited_s) / steps,
            "rate/samples_per_s": self._buckets.total() / seconds,
            "rate/tokens_per_s": self._tokens / seconds,
        }
        values |= {f"comm/{name}_gib": count / steps / 2**30 for name, count in sent.items()}
        values |= {f"comm/{name}_predicted_gib": count / steps / 2**30 for name, count in self._predicted.items()}
        values |= {f"samples/{bucket}": count for bucket, count in self._buckets.items()}
        values |= self._excluded
        self._excluded.clear()
        return values

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """The record of ``step``, on the process that writes."""
        if self._logger and self._bar is not None:
            self._logger.log(step, values)
            self._bar.update_to(step, values)

    def rewind(self, step: int) -> None:
        """Remove what was written about the steps after ``step``, which will be made again."""
        if self._logger:
            self._logger.rewind(step)

    def begin(self, mesh: Mesh, waited_s: float) -> None:
        """The next record counts from here."""
        self._updates.clear()
        self._tokens = 0
        self._sent = self._bytes_sent(mesh)
        self._predicted.clear()
        self._buckets.clear()
        self._since, self._waited_s = time.monotonic(), waited_s

    @contextmanager
    def excluded(self, name: str, mesh: Mesh) -> Iterator[None]:
        """Time and traffic of what is done here are not the steps'; the next record has ``time/{name}_s``."""
        started, sent = time.monotonic(), self._bytes_sent(mesh)
        yield
        self._sent += self._bytes_sent(mesh) - sent
        seconds = time.monotonic() - started
        self._since += seconds
        self._excluded[f"time/{name}_s"] = self._excluded.get(f"time/{name}_s", 0.0) + seconds

    def _bytes_sent(self, mesh: Mesh) -> Counter[str]:
        """Bytes so far, of this process by axis, and of its host."""
        return mesh.bytes_sent() + self._host_sent()

    def _host_sent(self) -> Counter[str]:
        sent = bytes_sent(self._interface) if self._interface else None
        return Counter() if sent is None else Counter(hosts=sent)

    def log_event(self, event: str, step: int, **values: Any) -> None:
        """Put an event between the records."""
        if self._logger:
            self._logger.log_event(event, step, **values)

    @property
    def shows_clips(self) -> bool:
        """Whether this process writes to something that shows videos."""
        return self._logger is not None and self._logger.shows_clips

    def log_validation(self, step: int, values: Mapping[str, Any], clips: Mapping[str, Clip]) -> None:
        """Put the numbers of a complete round between the records, and show its clips."""
        if self._logger:
            self._logger.log_validation(step, values)
            self._logger.show_clips(step, clips)

    def was_validated(self, step: int) -> bool:
        """Whether the round of ``step`` is complete, on the process that writes."""
        return self._logger is not None and self._logger.was_validated(step)

    def close(self) -> None:
        """Flush the writers."""
        if self._logger and self._bar is not None:
            self._bar.close()
            self._logger.close()
