"""docs/architecture.md and the README name places that are there, and families of models are known to tables only."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from opensora.models.families import FAMILIES
from tests.conftest import ROOT
from tests.model_lines import folder_of, lines_elsewhere, words_in


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
    "opensora/utils/files/published_files.py",
    "opensora/inference/scripts/given_models.py",
    "opensora/inference/scripts/interface.py",
}


def words_of(path: Path) -> Iterator[str]:
    """Every name, attribute and text of a file, but for docstrings."""
    return (word for _, word in words_in(path.read_text(encoding="utf-8")))


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


@pytest.mark.parametrize("kind", ["wan", "hunyuan_video"])
def test_a_model_costs_one_line_of_a_table_outside_its_folder(kind: str) -> None:
    """One line of the table and its import; tables by model say how step caches rescale changes, and what to fetch."""
    found = lines_elsewhere(kind)
    assert len(found.pop("opensora/models/families.py")) == 2
    assert set(found) <= {"opensora/sampling/cache_config.py", "opensora/utils/files/published_files.py"}


def test_every_line_that_knows_a_model_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = [
        "x.kind == 'wan'",
        "WanConfig()",
        "from opensora.models.wan.layers import a",
        "is_wan = 1",
        "f(wan_heads=2)",
    ]
    prose = ["'wanted'", "swan = 1", '"""Wan\'s."""', "Wanted()"]
    (tmp_path / "opensora").mkdir()
    (tmp_path / "opensora/code.py").write_text("\n".join([*code, *prose]))
    monkeypatch.setattr("tests.model_lines.ROOT", tmp_path)
    assert lines_elsewhere("wan") == {"opensora/code.py": [1, 2, 3, 4, 5]}


def test_every_kind_is_looked_for_in_its_own_folder() -> None:
    kinds = [kind for kind in FAMILIES if ROOT / "opensora" in folder_of(kind).parents]  # not those that tests register
    assert len(kinds) >= 11
    for kind in kinds:
        assert "opensora/models/families.py" in lines_elsewhere(kind)
