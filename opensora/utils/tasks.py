"""Independent pieces of work, listed by those who know them and run by those who know processes.

A denoiser lists the passes of a step, an autoencoder the tiles of a clip. Both hand them to a ``RunAll``, which gives
back all results, in order: ``one_by_one``, or ``SharedWork`` of acceleration/distributed/tasks.py on several processes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor


class Work(NamedTuple):
    """One piece; it does not depend on the results of others."""

    run: Callable[[], Tensor]
    shape: tuple[int, ...]  # of the result, known beforehand: others need not ask for it


RunAll: TypeAlias = Callable[[Sequence[Work]], list[Tensor]]


def one_by_one(work: Sequence[Work]) -> list[Tensor]:
    """The results of all pieces, in order."""
    return [piece.run() for piece in work]
