"""How tests are shared out among workers, and what of them is said at the end."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest
from tests.conftest import ROOT

workers = pytest.importorskip("tests.workers", reason="pytest-xdist is not installed")


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("tests/faults/test_signals.py", (0, "in turn")),
        ("tests/hosts/test_lab.py", (0, "in turn")),
        ("tests/gpu/test_cuda.py", (0, "in turn")),
        ("tests/unit/test_member.py", (0, "in turn")),  # it imports time
        ("tests/unit/test_rope.py", (1, "tests/unit/test_rope.py")),
        ("tests/test_imports.py", (1, "tests/test_imports.py")),
        ("tests/dist/test_ring.py", (2, "tests/dist/test_ring.py")),
    ],
)
def test_places(file: str, wanted: tuple[int, str]) -> None:
    assert (ROOT / file).is_file() and workers.place(file) == wanted


class Worker:
    """Takes what it is told to run."""

    shutting_down = False
    gateway = SimpleNamespace(id="gw")

    def __init__(self) -> None:
        self.given: list[int] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.given += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def test_no_two_workers_wait_at_once_and_every_test_is_run_once(pytestconfig: pytest.Config) -> None:
    """Whatever the number of tests in a group is, and whoever is the first to be done."""
    slow = [f"tests/{file}.py::test_{i}" for file in ("faults/test_hangs", "unit/test_member") for i in range(3)]
    quick = [f"tests/unit/test_{file}.py::test_{i}" for file in ("rope", "share", "tokens") for i in range(9)]
    busy = [f"tests/dist/test_ring.py::test_{i}" for i in range(20)]
    collection = [*slow, *quick, *busy]
    options = SimpleNamespace(loadscopereorder=True)
    config = SimpleNamespace(option=options, getvalue=lambda name: ["2*popen"], rootpath=pytestconfig.rootpath)
    sharing = workers.Scheduling(config, None)
    one, other = Worker(), Worker()
    for worker in (one, other):
        sharing.add_node(worker)
        sharing.add_node_collection(worker, collection)
    sharing.schedule()
    done: dict[Any, int] = {one: 0, other: 0}
    while any(done[worker] < len(worker.given) for worker in done):
        # The other one is thrice as fast.
        for worker in (one, other, other, other):
            if done[worker] < len(worker.given):
                sharing.mark_test_complete(worker, worker.given[done[worker]])
                done[worker] += 1
    assert one.given[:6] == list(range(6))  # in turn, on one
    assert sorted(one.given + other.given) == list(range(len(collection)))
    for file in {nodeid.partition("::")[0] for nodeid in [*quick, *busy]}:
        ran = [worker for worker in (one, other) if any(collection[i].startswith(file) for i in worker.given)]
        assert len(ran) == 1, file


def test_the_tables_of_workers_become_one() -> None:
    config: Any = SimpleNamespace(stash=pytest.Stash())
    for tried in ({"killed": (2, 2), "hung": (1, 2)}, {"killed": (3, 4)}):
        worker: Any = SimpleNamespace(config=SimpleNamespace(stash=pytest.Stash(), workeroutput={}))
        conftest.add_rows(worker.config, tried)
        conftest.pytest_sessionfinish(worker)
        conftest.pytest_testnodedown(SimpleNamespace(config=config, workeroutput=worker.config.workeroutput))
    conftest.pytest_testnodedown(SimpleNamespace(config=config))  # one that died
    lines: list[str] = []
    conftest.pytest_terminal_summary(SimpleNamespace(section=lines.append, line=lines.append), config)
    assert lines == ["faults", "killed      5 of 6", "hung        1 of 2"]


@pytest.mark.parametrize(
    ("cores", "given", "wanted"),
    [(2, {}, 2), (64, {}, 4), (1, {}, 0), (8, {"capture": "no"}, 0), (8, {"trace": True}, 0)],
)
def test_how_many_workers(cores: int, given: dict[str, Any], wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    config: Any = SimpleNamespace(getoption={"capture": "fd", "trace": False, **given}.get)
    assert conftest.pytest_xdist_auto_num_workers(config) == wanted
