"""Figures in the text format of Prometheus: queue, workers, requests. Label values come from tables alone."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from opensora.serve.jobs import STATES, State

# What a worker tells beside its models and whether it is ready -> (name, what it is)
_TOLD = {
    "seconds_per_step": ("opensora_step_seconds", "Seconds of a denoising step, of the last job"),
    "mfu": ("opensora_mfu", "Share of the device's peak that the last job's steps reached"),
    "memory_bytes": ("opensora_worker_memory_bytes", "Most memory that a process of the worker has taken"),
}
OTHER = "other"  # route of what is none


class Requests:
    """Counts what was answered, since this process began; called in the event loop alone."""

    def __init__(self) -> None:
        self.started = time.time()
        self.open = 0
        self.mistakes = 0  # of this program
        self._counts: Counter[tuple[str, str, int]] = Counter()
        self._seconds: Counter[str] = Counter()

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        self._counts[method, route, status] += 1
        self._seconds[route] += seconds  # type: ignore[assignment]

    def lines(self) -> Iterable[str]:
        counts = [
            (({"method": method, "route": route, "status": str(status)}), count)
            for (method, route, status), count in sorted(self._counts.items())
        ]
        yield from _metric("opensora_requests_total", "counter", "Requests by route and status", counts)
        seconds = [({"route": route}, value) for route, value in sorted(self._seconds.items())]
        yield from _metric("opensora_request_seconds_total", "counter", "Seconds until requests were answered", seconds)
        yield from _metric("opensora_requests_open", "gauge", "Requests that are being answered", [({}, self.open)])
        yield from _metric("opensora_mistakes_total", "counter", "Mistakes of the web process", [({}, self.mistakes)])
        yield from _metric("opensora_start_time_seconds", "gauge", "When the web process began", [({}, self.started)])


def text(
    requests: Requests,
    jobs: Mapping[tuple[str, State], int],
    models: Iterable[str],
    workers: Mapping[str, Mapping[str, Any]],
    disk: Mapping[str, int],
) -> str:
    """All figures.

    Args:
        jobs: how many, by model and state.
        workers: what living ones told.
        disk: bytes, "free" and "used".
    """
    lines: list[str] = []
    shown = [
        ({"model": model, "state": state}, jobs.get((model, state), 0))
        for model in sorted({*models, *(model for model, _ in jobs)})
        for state in STATES
    ]
    lines += _metric("opensora_jobs", "gauge", "Jobs by model and state", shown)
    lines += _metric("opensora_workers", "gauge", "Workers that live", [({}, len(workers))])
    ready = sum(bool(told.get("ready")) for told in workers.values())
    lines += _metric("opensora_workers_ready", "gauge", "Workers that are ready to sample", [({}, ready)])
    for key, (name, about) in _TOLD.items():
        values = [
            ({"worker": str(number)}, float(told[key]))
            for number, (_, told) in enumerate(sorted(workers.items()))
            if isinstance(told.get(key), (int, float))
        ]
        lines += _metric(name, "gauge", about, values)
    for place, count in disk.items():
        lines += _metric(f"opensora_disk_{place}_bytes", "gauge", f"Bytes of the disk that are {place}", [({}, count)])
    return "\n".join([*lines, *requests.lines(), ""])


def _metric(name: str, kind: str, about: str, values: Iterable[tuple[Mapping[str, str], float]]) -> Iterable[str]:
    yield f"# HELP {name} {about}"
    yield f"# TYPE {name} {kind}"
    for labels, value in values:
        inside = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
        yield f"{name}{{{inside}}} {value}" if inside else f"{name} {value}"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
