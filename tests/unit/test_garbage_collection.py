"""Collection by hand: off between borders, nothing unreachable survives one, and as it was afterwards."""

import gc
import weakref
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from opensora.train.garbage_collection import EVERYTHING_EVERY, GarbageCollection

MIB = 2**20


class Node:
    """Holds a tensor, and itself."""

    def __init__(self, size: int = MIB) -> None:
        self.tensor = torch.zeros(size, dtype=torch.uint8)
        self.me = self


def made_in_a_step() -> "weakref.ref[Tensor]":
    """A tensor that only a cycle holds, as at the end of a step."""
    return weakref.ref(Node().tensor)


@pytest.fixture
def garbage() -> Iterator[GarbageCollection]:
    assert gc.isenabled() and gc.get_freeze_count() == 0
    collection = GarbageCollection()
    yield collection
    collection.restore()
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_off_between_borders_and_as_it_was_afterwards(garbage: GarbageCollection) -> None:
    garbage.collect()
    assert not gc.isenabled() and gc.get_freeze_count() > 10_000
    gc.enable()  # as a library may
    garbage.collect()
    assert not gc.isenabled()
    garbage.restore()
    assert gc.isenabled() and gc.get_freeze_count() == 0
    garbage.restore()
    assert gc.isenabled()


@pytest.mark.parametrize("begun", [True, False])
def test_who_had_it_off_keeps_it_off(begun: bool) -> None:
    collection = GarbageCollection()
    gc.disable()
    try:
        if begun:
            collection.collect()
        collection.restore()
        assert not gc.isenabled() and gc.get_freeze_count() == 0
    finally:
        gc.enable()


def test_nothing_is_collected_between_borders(garbage: GarbageCollection) -> None:
    seen: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        seen.append(phase)

    garbage.collect()
    gc.callbacks.append(note)
    try:
        tensor = made_in_a_step()
        kept = [[number] for number in range(200_000)]  # a thousand automatic collections otherwise
        assert not seen and tensor() is not None and kept
        garbage.collect()
        assert seen == ["start", "stop"] and tensor() is None
    finally:
        gc.callbacks.remove(note)


def test_every_border_frees_the_cycles_of_its_step(garbage: GarbageCollection) -> None:
    """Many steps, each with tensors in cycles: at no border is one left. What the loop still held then is gone at the
    next, or, if it was frozen, at the next look at everything."""
    late: list[weakref.ref[Tensor]] = []
    for step in range(40):
        tensors = [made_in_a_step() for _ in range(5)]
        held = Node(10)  # as what a loop's variables hold at the border
        garbage.collect()
        assert all(tensor() is None for tensor in tensors), step
        assert all(tensor() is None or number in (0, 1, 2, 4, 8, 16, 32) for number, tensor in enumerate(late)), step
        late.append(weakref.ref(held.tensor))
        del held
    garbage.collect(everything=True)
    assert all(tensor() is None for tensor in late)


def test_memory_does_not_grow(garbage: GarbageCollection) -> None:
    """Steps over more than one look at everything, each with a new cycle that is alive at its border."""
    alive = weakref.WeakSet[Node]()
    most = 0
    for _ in range(2 * EVERYTHING_EVERY + 100):
        held = Node(1)
        alive.add(held)
        garbage.collect()
        most = max(most, len(alive))
    assert most <= 12  # the one that is held, the one before, and one frozen after 1, 2, 4, ... 512 steps
    assert held is not None and len(alive) <= 4


def test_what_is_frozen_and_dies_is_freed_by_the_next_look_at_everything(garbage: GarbageCollection) -> None:
    loader = Node()
    garbage.collect()  # the first: everything, and all of it is frozen
    late = weakref.ref(loader.tensor)
    del loader
    for _ in range(10):
        garbage.collect()
    assert late() is not None  # else a border would look at everything, which takes as long as a step
    garbage.collect(everything=True)
    assert late() is None


def test_a_border_looks_at_what_is_new_only(garbage: GarbageCollection) -> None:
    """Counted in objects, not in time: 0.2 s of a process full of libraries are a look at all of them."""
    garbage.collect()
    assert len(gc.get_objects()) < gc.get_freeze_count() / 100
    kept = [[number] for number in range(10_000)]  # as compiled blocks
    for _ in range(9):
        garbage.collect()
    assert len(gc.get_objects()) < len(kept) / 10


def test_every_process_does_the_same_at_the_same_borders(
    monkeypatch: pytest.MonkeyPatch, garbage: GarbageCollection
) -> None:
    """By the number of steps alone, so that none waits for another."""
    did: list[tuple[int, str]] = []
    for name in ("unfreeze", "freeze"):
        monkeypatch.setattr(gc, name, partial(lambda name: did.append((step, name)), name))
    monkeypatch.setattr(gc, "collect", lambda: None)
    step = 0
    while step < 2500:
        garbage.collect()
        step += 1
    powers = [2**n for n in range(12)]
    assert [at for at, name in did if name == "unfreeze"] == [0, 1000, 2000]
    assert [at for at, name in did if name == "freeze"] == sorted([0, 1000, 2000, *powers])
