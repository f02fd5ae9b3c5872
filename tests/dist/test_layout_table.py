"""Rows that ``python -m tests.layout_table`` prints: one of every kind, and a table that says what failed."""

from collections.abc import Callable, Iterator

import pytest

from tests import layout_table
from tests.layout_table import FP64_LIMITS, Row, Wanted

KINDS = (
    layout_table.mmdit_rows,
    layout_table.factored_rows,
    layout_table.chapter_rows,
    layout_table.stdit_rows,
    layout_table.job_rows,
    layout_table.sampling_rows,
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_row_of_every_kind(kind: layout_table.Kind) -> None:
    first, _ = next(kind(lambda name: True))
    _, compare = next(kind(lambda name: name == first))  # alone: what stands beside it would be computed with it
    differences, as_predicted = compare()
    assert differences and as_predicted is not False
    assert all(difference <= FP64_LIMITS[column] for column, difference in differences.items())


@pytest.mark.parametrize(
    ("row", "code"), [(({"loss": 1e-12}, True), 0), (({"loss": 1e-9}, True), 1), (({"loss": 0.0}, False), 1)]
)
def test_the_table_says_whether_all_are_near(
    row: Row, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one(wanted: Wanted) -> Iterator[tuple[str, dict[str, float], Callable[[], Row]]]:
        yield "a layout", FP64_LIMITS, lambda: row

    monkeypatch.setattr(layout_table, "rows", one)
    assert layout_table.main([]) == code
    assert f"SUM {1 - code} of 1" in capsys.readouterr().out
