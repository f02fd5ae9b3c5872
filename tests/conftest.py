"""What every test shares."""

import os
import signal
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.postgres_server import Server
    from tests.queue_place import QueuePlace

# For this process before it imports torch, and for all that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # tests have file calls fail one by one, and list what is in folders
import torch

from opensora.utils import signal_handler

torch.set_num_threads(1)
# A shell ignores these for what it starts in the background, and what tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
_ROWS = pytest.StashKey[dict[str, tuple[int, int]]]()


@pytest.fixture(autouse=True)
def nothing_listens_to_signals() -> Iterator[None]:
    """After a test that trained in this process: what listened for the run would end the tests at the next signal."""
    yield
    signal_handler.uninstall()


@pytest.fixture(scope="session")
def shared_media() -> Path:
    """A folder of real clips (clips/, captions.csv, images/, edge_cases/), which the repository does not hold."""
    folder = Path(os.environ.get("OPENSORA_MEDIA", ROOT.parent / "shared" / "media"))
    if not (folder / "captions.csv").is_file():
        pytest.skip(f"no real clips at {folder}; set OPENSORA_MEDIA to a folder with captions.csv and clips/")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """A folder of tensors that the families' published code has computed, which the repository does not hold."""
    folder = Path(os.environ.get("OPENSORA_GOLDEN", ROOT.parent / "shared" / "golden"))
    if not (folder / "README_v2.md").is_file():
        pytest.skip(f"no golden tensors at {folder}; set OPENSORA_GOLDEN to a folder with README_v2.md beside them")
    return folder


@pytest.fixture(scope="session")
def stills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip table of rendered stills."""
    from data_pipeline.shapes.__main__ import main

    folder = tmp_path_factory.mktemp("stills")
    main(["--out", str(folder), "--clips", "0", "--images", "24", "--durations", "5", "--processes", "1"])
    return folder / "train.csv"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator["Server"]:
    """A PostgreSQL of the system's packages, started for these tests."""
    from tests.postgres_server import Missing, server

    try:
        with server() as running:
            yield running
    except Missing as missing:
        pytest.skip(str(missing))


@pytest.fixture(params=["sqlite", "postgres"])
def make_queue(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator["QueuePlace"]:
    """Opens queues on one new database of each kind."""
    from tests.queue_place import QueuePlace

    server = request.getfixturevalue("postgres_server") if request.param == "postgres" else None
    with QueuePlace(tmp_path / "serve", server) as place:
        yield place


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """What processes of a test are forked from is there before the test's time begins."""
    if uses_processes(item):
        _warm_up()
    return (yield)


def uses_processes(item: pytest.Item) -> bool:
    """Whether a test, one of its fixtures, or a function that these call, calls ``run_distributed``."""
    fixtures = getattr(item, "_fixtureinfo", None)
    made = [] if fixtures is None else [one.func for found in fixtures.name2fixturedefs.values() for one in found]
    return any(_reaches(function, set()) for function in [getattr(item, "function", None), *made])


def _reaches(function: Any, seen: set[Callable[..., Any]]) -> bool:
    if not isinstance(function, FunctionType) or function in seen:
        return False
    seen.add(function)
    names = function.__code__.co_names
    return "run_distributed" in names or any(_reaches(function.__globals__.get(name), seen) for name in names)


@cache
def _warm_up() -> None:
    from tests.dist.harness import warm_up

    warm_up()


def add_rows(config: pytest.Config, more: Mapping[str, tuple[int, int]]) -> None:
    """Adds {row: (passed, of)} to the table at the end: what fault tests tried, and how often it was so."""
    rows = config.stash.setdefault(_ROWS, {})
    for row, (passed, of) in more.items():
        before = rows.get(row, (0, 0))
        rows[row] = (before[0] + passed, before[1] + of)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(_ROWS, {})
    if rows:
        terminalreporter.section("faults")
        width = max(map(len, rows))
        for row, (passed, of) in rows.items():
            terminalreporter.line(f"{row:{width}}  {passed:>5} of {of}")


# What follows is for pytest-xdist: pytest knows its hooks only where it is installed. Without -n there is one process.


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Of ``-n auto``: a worker per core, and none where the terminal is the test's (-s, --trace; xdist knows --pdb)."""
    from tests.workers import MOST

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    alone = cores == 1 or config.getoption("capture") == "no" or config.getoption("trace")
    return 0 if alone else min(cores, MOST)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Unless --dist asks for another one."""
    from tests.workers import Scheduling

    return Scheduling(config, log) if config.getoption("dist") == "load" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A worker has its tests in the order in which the groups come."""
    if hasattr(config, "workerinput"):
        from tests.workers import place

        items.sort(key=lambda item: place(item.path.relative_to(ROOT).as_posix())[0])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands over its part of the table."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tally"] = session.config.stash.get(_ROWS, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The main process takes it; a worker that died has none."""
    add_rows(node.config, getattr(node, "workeroutput", {}).get("tally", {}))
