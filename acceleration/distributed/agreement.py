"""What all processes have to agree on: what the main one says, and a graceful stop that some process was asked for."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from acceleration.distributed.comm_timer import WAITING


def from_main(value: Any, group: dist.ProcessGroup | None, what: str) -> Any:
    """The main process's ``value``, on all. Collective.

    Args:
        group: of CPU tensors; None where the default one is.
        what: is waited for, as a report of a hang calls it.
    """
    box = [value]
    with WAITING.on(what):
        dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def cpu_group() -> dist.ProcessGroup | None:
    """A group of all processes for CPU tensors, so that talking does not wait for the GPU; None where the default one
    is such a group. Collective."""
    return dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None


class Interrupted(Exception):
    """Asked to stop before the first step; what is on disk is the state."""


class StopRequest:
    """What every process was asked, known to all."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        """``asked``: whether this process was asked to stop; called at every boundary. Collective."""
        self._asked = asked
        self._group = cpu_group()

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
