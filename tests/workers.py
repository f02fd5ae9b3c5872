"""Which tests one worker of pytest-xdist runs one after another, and with which the workers begin.

Tests that measure time, or wait for something with a limit, are one group: there are never two of them at once. They
come first, with tests of one process beside them, and then what keeps several processes busy and waits for nobody.
Everything else is a group per file, so that the fixtures of a module are made once.
"""

import re
from functools import cache
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parent.parent
IN_TURN = ("faults", "hosts", "gpu")  # folders whose tests wait for processes, or share one device
BUSY = ("integration", "device", "dist")  # folders whose tests keep two cores busy
TAKES_TIME = re.compile(r"^import time$", re.MULTILINE)  # a file of any folder that goes with IN_TURN
MOST = 4  # workers; each imports torch and collects every test, which takes a gigabyte and 15 s


@cache
def place(file: str) -> tuple[int, str]:
    """(when it comes, its group) of a test file, such as "tests/unit/test_rope.py"."""
    folder = file.split("/")[1]
    if folder in IN_TURN or TAKES_TIME.search((ROOT / file).read_text(encoding="utf-8")):
        return 0, "in turn"
    return (2 if folder in BUSY else 1), file


class Scheduling(LoadScopeScheduling):
    """Gives the next group to the worker that has nothing to do, in the order of the collection.

    Not by marks and ``--dist loadgroup``, which xdist 3.8.0 does not find with pytest 9.2.
    """

    def __init__(self, config: pytest.Config, log: object) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # else by the number of tests

    def _split_scope(self, nodeid: str) -> str:
        return place(nodeid.partition("::")[0])[1]
