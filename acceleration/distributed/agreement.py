"""A polite stop: some process was asked to, and all agree on it at a boundary."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from acceleration.distributed.comm_timer import WAITING


class Interrupted(Exception):
    """Asked to stop before the first step; what is on disk is the state."""


class StopRequest:
    """What every process was asked, known to all."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        """``asked``: whether this process was asked to stop; called at every boundary. Collective."""
        self._asked = asked
        # CPU tensors: agreeing must not wait for the GPU to finish the step.
        self._group = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None

    def agreed(self) -> bool:
        """True on every process as soon as one was asked. Collective."""
        flag = torch.tensor(int(self._asked()))
        with WAITING.on("agreement whether to stop"):
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def check(self) -> None:
        """A boundary before the first step. Collective.

        Raises:
            Interrupted: on every process, if one was asked to stop.
        """
        if self.agreed():
            raise Interrupted
