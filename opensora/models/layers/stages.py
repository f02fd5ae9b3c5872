"""The loop over a model's blocks, as data: which blocks run on which streams of tokens, and how one runs.

A model states its stages and hands them to its ``run_stages``, which is ``run_in_order`` unless somebody has put
another loop there, as step caches do while they sample: what a block adds in one step may then stand for the next.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor, nn

Streams: TypeAlias = tuple[Tensor, ...]  # what blocks hand on, (B, ..., D) each: image tokens, or image and text


class Stage(NamedTuple):
    """Blocks that run one after the other on the same streams. Every block is residual: it adds to its streams."""

    blocks: Iterable[nn.Module]
    run: Callable[[nn.Module, Streams], Streams]  # calls a block
    image: Callable[[Streams], Tensor]  # the image tokens in the streams, (B, ..., D)
    enter: Callable[[Streams], Streams] | None = None  # from the streams of the stage before to these; linear
    modulated: Callable[[nn.Module, Streams], Tensor] | None = None  # the normalised, modulated image tokens that a
    # block starts from; None: not stated


class RunStages(Protocol):
    """A loop over all blocks."""

    def __call__(self, stages: Sequence[Stage], streams: Streams) -> Tensor:
        """The image tokens behind the last block, of the streams before the first one."""


def run_in_order(stages: Sequence[Stage], streams: Streams) -> Tensor:
    """Every block of every stage."""
    for stage in stages:
        streams = stage.enter(streams) if stage.enter else streams
        for block in stage.blocks:
            streams = stage.run(block, streams)
    return stages[-1].image(streams)
