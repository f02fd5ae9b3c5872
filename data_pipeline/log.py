"""What a process did: OUT/log/<host>-<pid>.jsonl, one line per source and stage."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass
class LogEntry:
    """One source in one stage."""

    error: str = ""


class RunLog:
    """Lines are appended whole; what a crash cuts off is one line. A log that cannot be written stops nothing."""

    def __init__(self, out: Path) -> None:
        self._path = out / "log" / f"{socket.gethostname()}-{os.getpid()}.jsonl"
        self._guard = threading.Lock()
        self._file: IO[str] | None = None

    @contextlib.contextmanager
    def timed(self, stage: str, source: str) -> Iterator[LogEntry]:
        """The block is the work on one source."""
        entry, start = LogEntry(), time.perf_counter()
        try:
            yield entry
        finally:
            seconds = round(time.perf_counter() - start, 4)
            line = {"time": round(time.time(), 3), "stage": stage, "source": source, "seconds": seconds}
            self._write(line | ({"error": entry.error} if entry.error else {}))

    def _write(self, line: dict) -> None:
        with self._guard, contextlib.suppress(OSError):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._path, "a", buffering=1)  # noqa: SIM115  (as long as the process)
            self._file.write(json.dumps(line) + "\n")
