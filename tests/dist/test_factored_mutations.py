"""The tests of the factored model can fail: each of these mistakes, made on purpose, is found by them."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from acceleration.accounting import rank_layout
from acceleration.sequence import axis_switch, layout
from tests.dist.factored import Run, on_one_process, on_this_layout
from tests.dist.harness import run_distributed
from tests.dist.parity import Outcome, worst_error
from tests.factored_family import ToyFactored

FOUND = 1e-6  # every mistake is far above the tolerance of 1e-10
Patch = Any


def join_frames_in_another_order() -> Patch:
    """Those of the last process come first on the way back."""
    right = axis_switch.exchange

    def wrong(x: Tensor, cut: int, outgoing: Any, joined: int, incoming: Any, axis: Any) -> Tensor:
        out = right(x, cut, outgoing, joined, incoming, axis)
        return torch.cat(out.split(incoming, dim=1)[::-1], dim=1) if joined == 1 else out

    return mock.patch.object(axis_switch, "exchange", wrong)


def forget_the_way_back() -> Patch:
    """Values are exchanged, their gradients end."""
    right = axis_switch.exchange

    def wrong(x: Tensor, *sizes: Any) -> Tensor:
        out = right(x.detach(), *sizes)
        return out + 0 * x.sum() if x.is_floating_point() else out

    return mock.patch.object(axis_switch, "exchange", wrong)


def count_the_text_twice() -> Patch:
    """What every process holds whole has gradients that are shares: not each the whole."""
    right = ToyFactored.forward

    def wrong(self: ToyFactored, *args: Any, **inputs: Any) -> Tensor:
        with self.text_in.register_forward_hook(lambda module, args, out: out + (out - out.detach())):
            return right(self, *args, **inputs)

    return mock.patch.object(ToyFactored, "forward", wrong)


def take_masks_for_numbers() -> Patch:
    return mock.patch.object(
        rank_layout.TokenShares, "itemsize", lambda self, dtype=None: self.place.itemsize("compute")
    )


def exchange_few_frames_too() -> Patch:
    """The numbers are right all the same, as some processes have no frame; but nobody expects these bytes."""
    return mock.patch.object(layout, "exchanges_axes", lambda frames, heads, degree: degree > 1)


NUMBERS: dict[str, Callable[[], Patch]] = {
    "frames joined in another order": join_frames_in_another_order,
    "no gradient through a switch": forget_the_way_back,
    "text counted twice": count_the_text_twice,
}
BYTES: dict[str, Callable[[], Patch]] = {
    "a mask taken for numbers": take_masks_for_numbers,
    "few frames exchanged": exchange_few_frames_too,
}


def with_mistakes() -> dict[str, Outcome]:
    """Runs in every process: a run with each."""
    found = {}
    for name, mistake in (NUMBERS | BYTES).items():
        with mistake():
            found[name] = on_this_layout(Run(2, {"ulysses": 2}))
    return found


@pytest.fixture(scope="module")
def truth() -> Outcome:
    return on_one_process()


@pytest.fixture(scope="module")
def found() -> list[dict[str, Outcome]]:
    return run_distributed(with_mistakes, 2, timeout=110)


@pytest.mark.parametrize("name", NUMBERS)
def test_the_mistake_is_found(truth: Outcome, found: list[dict[str, Outcome]], name: str) -> None:
    assert max(worst_error(by_name[name], truth) for by_name in found) > FOUND


@pytest.mark.parametrize("name", BYTES)
def test_the_mistake_is_counted(truth: Outcome, found: list[dict[str, Outcome]], name: str) -> None:
    for by_name in found:
        assert worst_error(by_name[name], truth) <= 1e-10
        assert all(counted != formula for counted, formula in by_name[name].traffic)
