"""Which exchange this process is in, and how long it has been in exchanges so far.

One account per process, as a process is in one exchange at a time: whoever exchanges says so here, the watchdog and
the record of a step's times read it. On a GPU an exchange is only started here, so its time is not waited for.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Waiting:
    """Time in exchanges, and the name of the current one."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.note: Callable[[str], None] = lambda text: None  # told the exchange that begins, "" when it is over

    @contextmanager
    def on(self, exchange: str) -> Iterator[None]:
        """``exchange``: what the process waits in, such as ``all_gather over pieces``."""
        started = time.monotonic()
        self.note(exchange)
        yield  # an exchange that raises leaves its name: it is where the run ends
        self.note("")
        self.seconds += time.monotonic() - started


WAITING = Waiting()
