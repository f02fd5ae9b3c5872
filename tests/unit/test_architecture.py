"""docs/architecture.md and the README name places that are there."""

import re

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize(
    "document", ["CONTRIBUTING.md", "README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_every_path_that_is_named_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = re.findall(r"`((?:acceleration|opensora|data_pipeline|configs|launch|tests|scripts|docs)/[\w/.-]*)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_tree_has_every_folder() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for package in ("acceleration", "opensora"):
        folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        assert folders and {folder for folder in folders if f"{folder}/" not in text} == set()
