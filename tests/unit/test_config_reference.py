import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from opensora.cli import config_reference
from opensora.utils.errors import UserError
from tests.conftest import ROOT


def test_the_document_is_up_to_date() -> None:
    """By a process of its own: tests that add a family to the table leave it there."""
    command = [sys.executable, "-m", "opensora.cli.config_reference", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_an_outdated_document_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_reference, "TARGET", tmp_path / "docs" / "configuration.md")
    with pytest.raises(UserError, match=r"^docs/configuration\.md: not up to date"):
        config_reference.main(["--check"])
    config_reference.main([])
    config_reference.main(["--check"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """For the test below."""

    a: int = 1  # beside it
    b: tuple[int, ...] = (
        1,
        2,
    )  # at the end of it
    c: int = 2
    # below it
    # in two lines
    d: int = 3
    e: int = 4  # beside it
    # about what follows


def test_the_meaning_is_the_comment_of_the_field() -> None:
    assert config_reference.field_comments(Example) == {
        "a": "beside it",
        "b": "at the end of it",
        "c": "below it in two lines",
        "d": "",
        "e": "beside it",
    }
