"""What the processes of a group tell one another: what to do next, and at every border whether to go on.

Over a group of CPU tensors of its own, so that nobody waits for a GPU. Words travel as JSON.
"""

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.distributed.comm_timer import WAITING
from acceleration.distributed.mesh import Mesh
from opensora.utils.console import announce
from opensora.utils.errors import UserError

T = TypeVar("T")


class Flag(IntEnum):
    """What a process finds at a border; of several the greatest counts."""

    GO = 0
    CANCELLED = 1  # nobody wants what is being made
    PUT_BACK = 2  # the group was asked to stop, and its time is over
    FAILED = 3  # an error, of the job or of the program
    NO_MEMORY = 4


class GroupLost(Exception):
    """A process did not come to a border: the others can agree on nothing, and are to leave."""


class Left(Exception):
    """All processes leave what they do at the same border."""

    def __init__(self, flag: Flag) -> None:
        super().__init__(flag.name)
        self.flag = flag


@dataclass(frozen=True)
class Outcome:
    """How a piece of work ended, the same on all processes."""

    flag: Flag = Flag.GO
    error: str = ""  # one line, of the first process that had one


class Peers:
    """One process's view of its group."""

    def __init__(self, timeout_s: float) -> None:
        """Collective. ``timeout_s``: longest wait for another process."""
        self._timeout = timedelta(seconds=timeout_s)
        self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def tell(self, words: Any = None, source: int = 0) -> Any:
        """What process ``source`` says, on all. Collective.

        Raises:
            GroupLost: one of them is gone.
        """
        data = json.dumps(words).encode() if self.rank == source else b""
        size = torch.tensor(len(data))
        self._wait(lambda: dist.broadcast(size, source, self._group, async_op=True), "the word of another process")
        told = torch.zeros(int(size), dtype=torch.uint8)
        if self.rank == source:
            told.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self._wait(lambda: dist.broadcast(told, source, self._group, async_op=True), "the word of another process")
        return json.loads(told.numpy().tobytes())

    def agree(self, flag: Flag = Flag.GO) -> Flag:
        """A border: the greatest flag of all. Collective.

        Raises:
            GroupLost: one of them is gone, or stands still in an exchange with this one.
        """
        return Flag(self._most(int(flag)))

    def all_say(self, yes: bool) -> bool:
        """Whether it is so on all processes. Collective."""
        return not self._most(int(not yes))

    def border(self, flag: Flag = Flag.GO) -> None:
        """A border inside of ``attempt``.

        Raises:
            Left: some process found a reason not to go on.
        """
        if (found := self.agree(flag)) != Flag.GO:
            raise Left(found)

    def attempt(self, work: Callable[[], None]) -> Outcome:
        """Work with a border behind it, and as many inside as it likes; no error of it leaves this. Collective.

        Raises:
            GroupLost.
        """
        error = ""
        try:
            work()
            flag = self.agree()
        except Left as left:
            flag = left.flag
        except GroupLost:
            raise
        except Exception as reason:
            error = described(reason)
            if not isinstance(reason, UserError):
                announce(traceback.format_exc().rstrip(), every_rank=True)
            flag = self.agree(kind_of(reason))
        return Outcome(flag, self._first(error) if flag >= Flag.FAILED else "")

    def _first(self, error: str) -> str:
        """The error of the first process that has one."""
        source = self.size - 1 - self._most(self.size - 1 - self.rank if error else -1)
        told: str = self.tell(error, source) if source < self.size else ""
        return told

    def _most(self, value: int) -> int:
        box = torch.tensor(value)
        self._wait(lambda: dist.all_reduce(box, dist.ReduceOp.MAX, self._group, async_op=True), "agreement at a border")
        return int(box)

    def _wait(self, begin: Callable[[], Any], what: str) -> None:
        try:
            with WAITING.on(what):
                begin().wait()
        except RuntimeError as reason:  # what gloo raises for a peer that is gone, and for one that does not come
            raise GroupLost(f"{what}: {described(reason)}") from reason

    def to_first(self, clips: Tensor, shares: list[int], mesh: Mesh) -> Tensor:
        """(b, T, H, W, 3) uint8 of this process's share of a batch -> of the whole batch, on rank 0. Collective.

        Args:
            shares: clips of every data-parallel group, in order.
        """
        if len(shares) == 1:
            return clips
        members, parts = self.size // len(shares), [clips]
        for index, count in enumerate(shares[1:], start=1):
            if count and self.rank == index * members:
                dist.send(clips[:count].contiguous(), 0, self._group)
            elif count and self.rank == 0:
                part = torch.empty((count, *clips.shape[1:]), dtype=torch.uint8)
                dist.recv(part, index * members, self._group)
                parts.append(part)
        return torch.cat([part[:count] for part, count in zip(parts, (s for s in shares if s), strict=False)])


def kind_of(error: BaseException) -> Flag:
    """What an error is to the others."""
    text = str(error)
    full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
    )
    return Flag.NO_MEMORY if full else Flag.FAILED


def described(error: BaseException) -> str:
    """An error in one line, without where it arose."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}" if lines else text
