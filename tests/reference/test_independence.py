"""The reference shares no code with what it is compared with."""

from pathlib import Path

from tests.test_imports import OURS, imported_names

FOLDER = Path(__file__).parent
# What may import the project: the tests themselves, and what compares the project's text features with the formulas.
COMPARE = ("checked.py",)


def outsiders(source: str) -> list[str]:
    """Imports of the project, or of tests outside this folder."""
    names = [name for _, name in imported_names(source, "tests.reference.x", is_package=False)]
    ours = [name for name in names if name.split(".")[0] in OURS]
    return [name for name in ours if name != "tests.reference" and not name.startswith("tests.reference.")]


def test_the_reference_imports_nothing_of_the_project() -> None:
    parts = [path for path in sorted(FOLDER.glob("*.py")) if not path.name.startswith("test_")]
    assert len(parts) >= 8
    for path in parts:
        if path.name not in COMPARE:
            assert outsiders(path.read_text()) == [], path.name
            assert "tests.reference.checked" not in path.read_text(), path.name


def test_an_import_is_found() -> None:
    for line in (
        "import opensora.train.preparation",
        "from acceleration import optim",
        "from tests.dist import problem",
    ):
        assert len(outsiders(line)) == 1, line
    assert len(outsiders("def f():\n    from opensora.utils import rng")) == 1
