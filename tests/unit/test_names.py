"""Names of runs and of samples: one rule, which every common file system can hold and show as written."""

import string
from pathlib import Path

import pytest

from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.utils.errors import UserError
from opensora.utils.names import name_problem
from tests.unit.test_config import GOOD

WRONG = {
    "": "empty",
    "a/b": "not a path",
    "a\\b": "not a path",
    "..": "begin with a dot",
    ".": "begin with a dot",
    "...": "begin with a dot",
    ".hidden": "begin with a dot",
    "-rf": "dash",
    " x ": "space",
    "x ": "space",
    "\u00a0x": "space",
    "\u3000": "space",
    "a\tb": "control",
    "a\nb": "control",
    "a\x1b[31mb": "control",
    "a\u2028b": "control",
    "a\u202eb": "direction",
    "a\u2066b": "direction",
    "a\u200fb": "direction",
    "a\u061cb": "direction",
    "con": "Windows",
    "NUL": "Windows",
    "aux.tar": "Windows",
    "COM1": "Windows",
    "com¹": "Windows",
    "nul .x": "Windows",
    "conin$": "Windows",
    "x" * 300: "bytes",
    "é" * 130: "bytes",
}
RIGHT = [
    "x",
    "a b",
    "first-run_2",
    "Ünïcode",
    "日本語",
    "a.b",
    "x..y",
    "console",
    "com10",
    "lpt",
    "🙂" * 50,
    "עברית",
    "x" * 251,
]


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str) -> None:
    assert WRONG[name] in (name_problem(name) or "")


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_taken(name: str) -> None:
    assert name_problem(name) is None and name_problem(name, ".mp4") is None


def test_the_suffix_counts() -> None:
    """A file of a sample has one behind the name: a dot before it does no harm, a device stays one."""
    assert "end with a dot" in (name_problem("The end.") or "") and name_problem("The end.", ".mp4") is None
    assert "Windows" in (name_problem("con", ".mp4") or "")
    assert name_problem("x" * 252) is None and "at most 251 and its suffix" in (name_problem("x" * 252, ".mp4") or "")


def test_every_letter_and_digit() -> None:
    assert all(name_problem(letter) is None for letter in string.ascii_letters + string.digits + "_+=,@~!()[]{}")


@pytest.mark.parametrize("name", [name for name in WRONG if not set(name) & set("\t\n\x1b")])
def test_a_run_is_held_to_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(GOOD)
    with pytest.raises(UserError, match=r"^name=.*: must be the name of a folder; this one "):
        load_config(RunConfig, tmp_path / "run.yaml", [f"name={name}"])
