"""Labs of hosts, and the reason where there can be none."""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.dist.harness import run_distributed
from tests.faults.conftest import CONFIG
from tests.faults.runs import run_with
from tests.hosts.lab import Lab, LabUnavailable
from tests.hosts.training import OVERRIDES, STEPS

MakeLab = Callable[..., Lab]


@pytest.fixture
def make_lab() -> Iterator[MakeLab]:
    """``make_lab(hosts=2, names="loopback", ...)``: a ``Lab`` that ends with the test."""
    with ExitStack() as labs:
        yield lambda **more: labs.enter_context(Lab(**more))


@pytest.fixture
def config(stills: Path, tmp_path: Path) -> Path:
    """Of a run in tmp_path/run."""
    path = tmp_path / "train.yaml"
    path.write_text(CONFIG.format(output=tmp_path, table=stills))
    return path


@pytest.fixture(scope="session")
def truth(stills: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run of one process."""
    folder = tmp_path_factory.mktemp("truth")
    config = folder / "train.yaml"
    config.write_text(CONFIG.format(output=folder, table=stills))
    overrides = [f"train.steps={STEPS}", *OVERRIDES]
    (outcome,) = run_distributed(run_with, 1, config, overrides, init=False)
    assert outcome.end == "finished"
    return folder / "run"


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
