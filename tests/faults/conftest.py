"""One table at the end: what the fault tests asked for, and how often it was so."""

from collections.abc import Callable

import pytest

Tally = Callable[[str, int, int], None]
_ROWS = pytest.StashKey[dict[str, tuple[int, int]]]()


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """``tally(row, passed, of)`` adds to a row of the table."""
    rows = request.config.stash.setdefault(_ROWS, {})

    def add(row: str, passed: int, of: int) -> None:
        before = rows.get(row, (0, 0))
        rows[row] = (before[0] + passed, before[1] + of)

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(_ROWS, {})
    if rows:
        terminalreporter.section("faults")
        width = max(map(len, rows))
        for row, (passed, of) in rows.items():
            terminalreporter.line(f"{row:{width}}  {passed:>5} of {of}")
