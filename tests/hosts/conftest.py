"""Labs of hosts, and the reason where there can be none."""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.hosts.lab import Lab, LabUnavailable

MakeLab = Callable[..., Lab]


@pytest.fixture
def make_lab() -> Iterator[MakeLab]:
    """``make_lab(hosts=2, names="loopback", ...)``: a ``Lab`` that ends with the test."""
    with ExitStack() as labs:
        yield lambda **more: labs.enter_context(Lab(**more))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    """A test whose lab cannot be made is skipped, with the reason."""
    return (yield from _skipping())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """The same, where the test makes it."""
    return (yield from _skipping())


def _skipping() -> Generator[None, Any, Any]:
    try:
        return (yield)
    except LabUnavailable as error:
        pytest.skip(str(error))
