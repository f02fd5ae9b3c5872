"""docs/architecture.md and the README name places that are there, and families of models are known to tables only."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

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


FAMILY_WORDS = re.compile(
    r"mmdit|models.hunyuan_video|HunyuanVideo|double_block|single_block|context_in_dim|vec_in_dim|txt_ids|fused_qkv",
    re.IGNORECASE,
)
OWN = ("opensora/models/mmdit/", "opensora/models/hunyuan_video/")  # folders of the families with these words
# Tables, and the face of sampling that people's scripts call by the forward's own names.
KNOW_A_FAMILY = {
    "opensora/config/family/keys.py",
    "opensora/models/families.py",
    "opensora/sampling/denoisers.py",
    "opensora/inference/scripts/given_models.py",
    "opensora/inference/scripts/interface.py",
}


def words_of(path: Path) -> Iterator[str]:
    """Every name, attribute and text of a file, but for docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value
        for field in ("id", "attr", "name", "arg", "module", "asname"):
            if isinstance(word := getattr(node, field, None), str):
                yield word


@pytest.mark.parametrize("package", ["acceleration", "opensora"])
def test_only_tables_and_public_names_know_a_family(package: str) -> None:
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(OWN) and any(map(FAMILY_WORDS.search, words_of(path))):
            found.add(name)
    assert found <= KNOW_A_FAMILY


def test_what_a_family_is_called_would_be_found(tmp_path: Path) -> None:
    for code in (
        "from opensora.models.mmdit import x",
        "a.double_blocks",
        "f(vec_in_dim=1)",
        "x = HunyuanVideoConfig()",
    ):
        (tmp_path / "code.py").write_text(code)
        assert any(map(FAMILY_WORDS.search, words_of(tmp_path / "code.py"))), code
    (tmp_path / "code.py").write_text('"""As in an MMDiT."""\n')
    assert not any(map(FAMILY_WORDS.search, words_of(tmp_path / "code.py")))
