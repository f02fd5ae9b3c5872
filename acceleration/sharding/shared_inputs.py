"""One exchange for all cut layers of a block that read the same input (f of Megatron, arXiv:1909.08053).

Each process uses what it reads for its own outputs, so that the gradient of an input is the sum over all processes.
Separate projections of queries, keys and values read one tensor: the gradients of all three are added up on each
process, and their sum is exchanged.

The same input is the same tensor, to which nobody has written in between; tensors of equal values are two inputs. What
all blocks read, as text, is an input of each block: sharding gives every block a tensor of its own for it.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from acceleration.distributed import collectives
from acceleration.distributed.mesh import Axis

T = TypeVar("T")


class Reads(Generic[T]):
    """What was made for each of the tensors that were read, as long as the tensor lives."""

    def __init__(self) -> None:
        self._made = WeakTensorKeyDictionary()  # tensor -> (its version when it was read, what was made for it)

    def of(self, x: Tensor, make: Callable[[], T]) -> T:
        """``make()``, or what it gave when ``x`` was read before. It must not hold ``x`` itself."""
        version, made = self._made.get(x, (None, None))
        if version != x._version:
            made = make()
            self._made[x] = x._version, made
        return made


class SharedInputs:
    """The inputs of the cut layers of one block, or of those outside of blocks."""

    def __init__(self, axis: Axis) -> None:
        self._axis, self._shared = axis, Reads[Tensor]()

    @torch.compiler.disable  # see compile.py
    def __call__(self, x: Tensor) -> Tensor:
        """``x``, whose gradient is the sum over the axis of those of all who asked for it."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        return self._shared.of(x, lambda: collectives.share_out(x, self._axis))
