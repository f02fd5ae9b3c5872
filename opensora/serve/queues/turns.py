"""Where a job stands in the order of claims: priority, then owners in turn, then age."""

from collections.abc import Sequence
from typing import NamedTuple


class Head(NamedTuple):
    """The jobs of one owner that wait with one priority, by the first of them; or the place of one of them."""

    priority: int
    owner: str
    turn: int  # number of the owner's last claim, 0: none yet
    created_at: float
    id: str
    waiting: int
    place: int  # of this job among those, from 1


def before(heads: Sequence[Head], id: str) -> int | None:
    """How many are claimed before it; None: it does not wait. ``heads``: the first of every owner and priority, and it.

    Owners are asked in the order of their last claims, and one that was asked goes to the end: as long as all of them
    have jobs that order stays. Jobs of a higher priority change it first.
    """
    wanted = next((head for head in heads if head.id == id), None)
    if wanted is None:
        return None
    last: dict[str, tuple[int, int, int]] = {}  # owner -> when it was asked last; later is greater
    claimed = 0
    for round_, priority in enumerate(sorted({head.priority for head in heads}, reverse=True), 1):
        level = [head for head in heads if head.priority == priority and head.place == 1]
        level.sort(key=lambda head: (last.get(head.owner, (0, head.turn, 0)), head.created_at, head.id))
        if priority == wanted.priority:
            return claimed + _within(level, wanted)
        claimed += sum(head.waiting for head in level)
        last |= {head.owner: (round_, head.waiting, index) for index, head in enumerate(level)}
    raise AssertionError("its own priority is among them")


def _within(level: Sequence[Head], wanted: Head) -> int:
    """Of those with the same priority: owners that are asked earlier are so once more in its round."""
    mine = next(index for index, head in enumerate(level) if head.owner == wanted.owner)
    rounds = wanted.place - 1
    others = ((index, head) for index, head in enumerate(level) if index != mine)
    return rounds + sum(min(head.waiting, rounds + (index < mine)) for index, head in others)
