"""Python's garbage collection between two steps, on every process at the same ones, and never within a step.

Left to itself the collector runs in the middle of a step whenever a process has made so many objects, so at another
moment on each. A look at all objects, some 400,000 once torch is imported, takes 0.2 s, and every process of a run
waits for the one that is at it, in the next exchange: on 512 processes somebody often is. Between steps all collect at
once, and look at what is new only (0.2 ms): the rest is frozen, which Python passes over.
"""

import gc

EVERYTHING_EVERY = 1000  # steps between two looks at what is frozen too


class GarbageCollection:
    """Automatic collection is off from the first ``collect`` to ``restore``."""

    def __init__(self) -> None:
        self._steps = 0  # borders between steps so far
        self._was_enabled: bool | None = None  # None: not begun, nothing to restore

    def collect(self, *, everything: bool = False) -> None:
        """Free unreachable cycles, and the tensors that hang on them. To be called between two steps.

        What is alive after 1, 2, 4, 8, ... steps is frozen: first steps make what later ones keep, as moments of the
        optimizer and compiled blocks. If it becomes garbage after all, it waits for the next look at everything, which
        is the first, that of every ``EVERYTHING_EVERY`` steps, and those that are asked for.

        Args:
            everything: look at what is frozen too.
        """
        if self._was_enabled is None:
            self._was_enabled = gc.isenabled()
        gc.disable()  # every time: a library may have turned it on again
        everything = everything or self._steps % EVERYTHING_EVERY == 0
        if everything:
            gc.unfreeze()
        gc.collect()
        if everything or self._steps & (self._steps - 1) == 0:
            gc.freeze()
        self._steps += 1

    def restore(self) -> None:
        """Leave collection as it was found."""
        if self._was_enabled is None:
            return
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()
        self._was_enabled = None
