"""What a step cache asks of other processes; who knows processes implements it (``opensora.assembly.step_caches``)."""

from typing import Protocol

from torch import Tensor, nn


class Together(Protocol):
    """The processes that hold tokens of the same clips, and those that share the model's weights."""

    def total(self, values: Tensor) -> Tensor:
        """Sums (n,) over the processes that share the tokens of a clip; the same bits on all of them. Collective."""

    def anyone(self, computes: bool) -> bool:
        """Whether a process that this one gathers weights with computes, or this one. Collective over these."""

    def gather(self, block: nn.Module) -> None:
        """Have a block's weights whole. Collective where they are sharded."""

    def let_go(self, block: nn.Module) -> None:
        """Free what ``gather`` made, where a forward of the block would."""


class Alone:
    """One process that keeps all weights whole."""

    def total(self, values: Tensor) -> Tensor:
        return values

    def anyone(self, computes: bool) -> bool:
        return computes

    def gather(self, block: nn.Module) -> None:
        pass

    def let_go(self, block: nn.Module) -> None:
        pass
