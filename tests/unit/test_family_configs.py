"""The configurations of the Open-Sora family in configs/: their values, and what they become here."""

import json
from pathlib import Path
from typing import Any

import pytest

from opensora.config.mmengine import read_python

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
FOLDERS = ("opensora", "dit", "latte", "pixart", "opensora-v1-1", "opensora-v1-2", "opensora-v1-3")
FILES = sorted(
    path.relative_to(CONFIGS).as_posix()
    for folder in FOLDERS
    for job in ("train", "inference")
    for path in (CONFIGS / folder / job).glob("*.py")
)


def published(golden: Path) -> dict[str, Any]:
    """File -> values, of the last release that changed it."""
    values: dict[str, Any] = {}
    for release in json.loads((golden / "v1/configs.json").read_text("utf-8")).values():
        values |= release["values"]
    return {
        name: value
        for name, value in values.items()
        if name.split("/")[0] in FOLDERS and name.split("/")[1] in ("train", "inference")
    }


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_every_file_of_the_family_is_here(golden: Path) -> None:
    assert set(published(golden)) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_values_are_the_published_ones(name: str, golden: Path) -> None:
    data, _ = read_python(CONFIGS / name)
    assert as_json(data) == published(golden)[name]
