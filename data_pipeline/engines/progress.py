"""How far a stage is: a bar, or a line every half minute, with the time that is left by the size of the sources."""

import threading
from collections.abc import Sequence

from data_pipeline.shard import ShardTask
from opensora.utils.console import BYTES, Progress


class StageProgress:
    """Of the outputs that one engine is asked for. May be told from several threads."""

    def __init__(self, stage: str, tasks: Sequence[ShardTask]) -> None:
        self._sources, self._done = sum(len(task.sources) for task in tasks), 0
        self._left, self._seen = sum(task.weight for task in tasks), 0
        self._bar = Progress(self._left, unit=BYTES, about=stage)
        self._guard = threading.Lock()

    def known(self, sources: int, weight: int) -> None:
        """These were done before this command, or by another one."""
        with self._guard:
            self._done += sources
            self._seen += weight
            self._bar.skip(weight)

    def add(self, sources: int, weight: int) -> None:
        """These are done now."""
        with self._guard:
            self._done += sources
            self._seen += weight
            self._bar.update_to(self._seen, text=f"{self._done} of {self._sources} sources")

    def close(self) -> None:
        """The bar stays as it is."""
        self._bar.close()
