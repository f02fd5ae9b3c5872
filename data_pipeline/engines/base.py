"""What an engine is asked: make these outputs of one stage, somewhere, each at least once."""

from collections.abc import Sequence
from typing import Protocol

from data_pipeline.shard import ShardTask


class Engine(Protocol):
    """Outputs are files that are there or not, so an engine keeps no state that matters, and may be killed."""

    def run(self, stage: str, tasks: Sequence[ShardTask]) -> None:
        """Returns when every task was worked on; one that another process works on, or whose input turned out to be
        damaged, is passed over, and asked for again.

        Raises:
            UserError, OSError: an output cannot be written.
        """

    def close(self) -> None:
        """End its processes."""
