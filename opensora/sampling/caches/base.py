"""A step cache: what one step of sampling leaves behind for the next ones to reuse."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol, TypeAlias

from torch import nn

from opensora.sampling.evaluation import Evaluation


class Decision(NamedTuple):
    """What one evaluation of the model did."""

    at: Evaluation
    part: str  # "blocks", or the name of an attention slot
    computed: bool  # False: what an earlier step computed was reused
    change: float | None  # that decided; None: no change did


OnDecision: TypeAlias = Callable[[Decision], None]


class StepCache(Protocol):
    """Nothing is shared between passes of guidance, and nothing outlives a clip (or batch of clips).

    A batch takes its decisions as one: changes are means over all of its clips.
    """

    def during(self, model: nn.Module) -> AbstractContextManager[None]:
        """Around the sampling of one clip, or batch of clips: empty at the start, gone from the model at the end."""

    def watch(self, at: Evaluation) -> AbstractContextManager[None]:
        """Around one evaluation of the model."""


class NoStepCache:
    """Everything is computed."""

    def during(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def watch(self, at: Evaluation) -> AbstractContextManager[None]:
        return nullcontext()
