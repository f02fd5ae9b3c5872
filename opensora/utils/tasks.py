"""Independent pieces of work, listed by those who know them and run by those who know processes.

A denoiser lists the passes of a step, an autoencoder the tiles of a clip. Both hand them to a ``TaskRunner``, which
gives back all results, in order: ``one_by_one``, or ``DistributedRunner`` of acceleration on several processes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor


class Task(NamedTuple):
    """One piece; it does not depend on the results of others."""

    run: Callable[[], Tensor]
    shape: tuple[int, ...]  # of the result, known beforehand: others need not ask for it


TaskRunner: TypeAlias = Callable[[Sequence[Task]], list[Tensor]]


def one_by_one(work: Sequence[Task]) -> list[Tensor]:
    """The results of all pieces, in order."""
    return [piece.run() for piece in work]
