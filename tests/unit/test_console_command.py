"""The command ``opensora``: it lists what there is, and runs it as ``python -m`` would."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from opensora.cli.commands import COMMANDS
from tests.conftest import ROOT


def call(*argv: str, folder: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "opensora.cli.commands", *argv]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)


def test_every_command_that_there_is_has_a_line() -> None:
    done = call("--help")
    assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in COMMANDS)
    modules = {f"opensora.cli.{path.stem}" for path in (ROOT / "opensora/cli").glob("*.py")}
    named = {module for module, _ in COMMANDS.values()}
    assert modules - {f"opensora.cli.{name}" for name in ("__init__", "main", "commands")} <= named
    assert all(importlib.util.find_spec(module) for module, _ in COMMANDS.values())


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["trian"], "error: 'trian': unknown command; did you mean train?"),
        (["x" * 5000], f"error: '{'x' * 80}': unknown command; must be one of train, sample"),
        (["buckets", "nowhere.yaml"], "error: nowhere.yaml: cannot be read"),
        (["train", "nowhere.yaml"], "error: nowhere.yaml: cannot be read"),
        (["sample", "nowhere.yaml"], "error: nowhere.yaml: cannot be read"),
        (["index", "nowhere", "--out", "t.csv"], "error: nowhere: no such folder"),
    ],
    ids=lambda value: value[0][:9] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(argv: list[str], line: str, tmp_path: Path) -> None:
    done = call(*argv, folder=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(line) and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_no_command_is_the_list(tmp_path: Path) -> None:
    done = call(folder=tmp_path)
    assert done.returncode == 2 and "usage: opensora COMMAND" in done.stdout


def test_installing_gives_the_command() -> None:
    assert '[project.scripts]\nopensora = "opensora.cli.commands:main"\n' in (ROOT / "pyproject.toml").read_text()
