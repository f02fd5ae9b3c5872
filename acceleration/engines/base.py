"""The contract of an engine: what the loop asks of native, DeepSpeed or ColossalAI alike."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

from torch import Tensor, nn

Weights = Literal["live", "ema"]
Accept = Callable[[Tensor], bool]  # asked with the gradient norm whether to make an update; answers alike everywhere


class Engine(Protocol):
    """Owns the model, its optimizer and its moving average on one mesh."""

    model: nn.Module

    def backward(self, loss_share: Tensor, *, last_microbatch: bool) -> None:
        """Accumulate gradients. ``loss_share`` is this process's share of the global mean: gradients are summed.

        After the last micro-batch they are those of the whole step, cut as the weights are.
        """

    def step(self, step: int, accept: Accept | None = None) -> Tensor:
        """One update of weights and average, as update number ``step`` (from 0); gradients are cleared.

        If ``accept`` says no, gradients are cleared and nothing else changes. A vendor's engine that knows the norm
        only after its update does not ask.

        Returns:
            The global gradient norm before clipping, a scalar on the device, equal on every process.
        """

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next update."""

    def master_params(self) -> Iterator[tuple[str, Tensor]]:
        """(name, master weight) of all that is trained, as this process holds it."""

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """(name, plain tensor) of all that updates change, as this process holds it: equal wherever it is a copy."""

    def full_weights(self, which: Weights = "live") -> Iterator[tuple[str, Tensor]]:
        """(name, whole weight on the CPU) of all that is trained, one at a time; collective."""

    def averaged(self) -> AbstractContextManager[bool]:
        """Within it the model computes with the moving average; afterwards all is as it was, to the bit.

        Gives whether it does: not without an average, and not where an engine cannot put one in.
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything that a checkpoint holds: weights, optimizer state, average; sharded, names as in the model.

        Frozen weights are not part of it: whoever builds the model knows where they come from.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave, filled by a checkpoint of any layout."""
