"""Which of the evaluations of the model is at hand, for what looks on or remembers."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeAlias


class Evaluation(NamedTuple):
    """One pass of guidance in one step of a clip (or of a batch of clips)."""

    number: int  # of the pass: 0 knows prompt and references, 1 no prompt, 2 nothing (guidance.py)
    step: int  # from 0
    steps: int  # of the clip
    time: float  # of the step; 1 is pure noise


Watch: TypeAlias = Callable[[Evaluation], AbstractContextManager[None]]  # entered around an evaluation


def unwatched(evaluation: Evaluation) -> AbstractContextManager[None]:
    """Nobody looks on."""
    return nullcontext()
