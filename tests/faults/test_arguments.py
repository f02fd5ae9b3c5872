"""Every option of every command with values that cannot be: exit code 2, one line that names it, nothing written."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opensora.cli.main import run_cli
from opensora.utils.errors import UserError
from tests.conftest import ROOT
from tests.faults.conftest import Tally

sys.path.insert(0, str(ROOT / "launch"))

# module -> arguments that are right up to the configuration or folder, which is not there
COMMANDS = {
    "opensora.cli.forecast": ["nowhere.yaml", "--world", "8"],
    "opensora.cli.doctor": ["nowhere.yaml"],
    "opensora.cli.convert": ["nowhere.pt", "--to", "converted", "model.kind=dit"],
    "opensora.cli.download": ["open-sora-v2-dc-ae", "--to", "ckpts"],
    "opensora.cli.plot": ["nowhere"],
    "opensora.cli.preflight": ["nowhere.yaml"],
    "opensora.cli.calibrate": ["nowhere"],
    "opensora.cli.precompute": ["nowhere.yaml", "--out", "features"],
    "launch.submit": ["nowhere.yaml"],
    "launch.slurm.pipeline": ["nowhere.yaml", "--tasks", "5"],
    "data_pipeline.index": ["nowhere", "--out", "table.csv"],
    "data_pipeline.shapes.write": ["--out", "shapes", "--clips", "0", "--images", "0", "--heldout", "0"],
    "data_pipeline.shapes.judge": ["nowhere", "--table", "nowhere.csv"],
}
NO_NUMBER = [
    "nan",
    "-nan",
    "inf",
    "-inf",
    "1e999",
    "x",
    "",
    " ",
    "1_0",
    "٣",
    "²",
    "0x10",
    "--",
    "9" * 5000,
    "-1",
    "1e400",
]
NO_INTEGER = [*NO_NUMBER, "1.5", "1e3", "99999999999999999999", "-99999999999999999999"]
NO_PLACE = ["", "a\0b"]
NO_WORD = ["", "a\nb", "\x1b[31m", "\udcff\ud800"]
NO_TEXT = ["nowhere", "\x1b[31m", "1,,2", "", "-5", "5,1", "9" * 400, "٣x٣"]  # of --sizes, --durations, --device


class Seen(Exception):
    """What a command's parser is; raised instead of parsing."""


def main_of(module: str) -> Callable[[list[str]], int | None]:
    return importlib.import_module(module).main


def options_of(module: str, patch: pytest.MonkeyPatch) -> list[argparse.Action]:
    def give(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise Seen(parser)

    with patch.context() as inside:
        inside.setattr(argparse.ArgumentParser, "parse_known_args", give)
        with pytest.raises(Seen) as caught:
            main_of(module)([])
    (parser,) = caught.value.args
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def absurd(action: argparse.Action) -> list[str]:
    if action.nargs == 0:
        return []
    kind = getattr(action.type, "__qualname__", "")
    if kind.startswith("whole"):
        return NO_INTEGER
    if kind.startswith("number"):
        return [*NO_NUMBER, *([] if action.dest == "off_centre" else ["0"])]
    return {"place": NO_PLACE, "word": NO_WORD, "time_limit": [*NO_NUMBER, "4:00:00:00"]}.get(kind, NO_TEXT)


def said(module: str, argv: list[str], capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> str:
    """What the command says on stderr, or what is wrong with how it ends."""
    patch.setattr(sys, "argv", ["command", *argv])
    try:
        run_cli(main_of(module))
    except SystemExit as exit_:
        code = exit_.code
    except BaseException as error:
        return f"a traceback: {error!r}"
    err = capsys.readouterr().err
    return err if code == 2 and err.count("\n") == 1 and err.startswith("error: ") else f"exit code {code}: {err!r}"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize("module", COMMANDS)
def test_absurd_values(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    options = options_of(module, monkeypatch)
    assert options and all(
        action.type or action.nargs == 0 or action.choices
        for action in options
        if action.dest not in ("sizes", "durations", "radius", "travel", "config")
    )
    done, wrong = 0, []
    for action in options:
        for value in absurd(action):
            flag = action.option_strings[0] if action.option_strings else None
            argv = [*COMMANDS[module], f"{flag}={value}"] if flag else [value, *COMMANDS[module][1:]]
            line = said(module, argv, capsys, monkeypatch)
            done += 1
            if not line.startswith("error: ") or (flag and flag not in line) or not line.rstrip("\n").isprintable():
                wrong.append(f"{argv}: {line}")
    assert not wrong, "\n".join(wrong)
    assert os.listdir() == []
    tally("arguments of commands that cannot be: exit code 2, one line, the option", done, done)


@pytest.mark.parametrize("module", COMMANDS)
def test_an_option_that_is_there_twice(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one would win without a word. Those that collect values may be repeated."""
    for action in options_of(module, monkeypatch):
        if not action.option_strings or isinstance(action, argparse._AppendAction):
            continue
        flag, kind = action.option_strings[0], getattr(action.type, "__qualname__", "")
        value = (
            next(iter(action.choices))
            if action.choices
            else {"time_limit": "4:00:00", "place": "x", "number": "1"}.get(kind.partition(".")[0], "60")
        )
        once = [flag] if action.nargs == 0 else [flag, value]
        given = [] if flag in COMMANDS[module] else once
        line = said(module, [*COMMANDS[module], *given, *once], capsys, monkeypatch)
        assert line == f"error: {flag} is there twice; give it once\n", line
    assert os.listdir() == []


@pytest.mark.parametrize("module", COMMANDS)
@pytest.mark.parametrize("argv", [["--nosuch"], ["--"], [], ["\udcff"], ["--help=1"], ["\x1b[31m", "--out"]])
def test_arguments_that_are_none(
    module: str, argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = said(module, argv, capsys, monkeypatch)
    assert line.startswith("error: ") and line.rstrip("\n").isprintable(), line
    assert os.listdir() == []


def test_every_command_is_here() -> None:
    """A command with options of its own is in the table; the others take a configuration and overrides."""
    found = set()
    for folder in ("opensora/cli", "data_pipeline", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            if "add_argument(" in path.read_text(encoding="utf-8"):
                found.add(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert found - {"launch.attempts", "launch.demo"} == set(COMMANDS)  # those two are called by scripts


def test_a_number_that_is_one() -> None:
    from opensora.utils.command_line.arguments import number, whole

    assert [whole(0, 9)(text) for text in ("0", "+3", "9", "007")] == [0, 3, 9, 7]
    assert [number(0, 9)(text) for text in ("0", ".5", "1e-3", "9.", "+2")] == [0, 0.5, 1e-3, 9, 2]
    with pytest.raises(argparse.ArgumentTypeError, match="above 0"):
        number(0, 9, above=True)("0")


def test_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    for argv, message in (
        (["x.yaml", "--world", "0"], "--world=0: must be an integer from 1 to 4096"),
        (["x.yaml", "--world", "8", "--memory-gib", "nan"], "--memory-gib=nan: must be a number above 0"),
        (["x.yaml", "--world", "8", "--memory-gib", "0"], "--memory-gib=0: must be a number above 0"),
        (["x.yaml", "--world", "8", "--top", "0"], "--top=0: must be an integer from 1 to 1000"),
        (["x.yaml", "--world", "8", "--device", "h1000"], "--device: invalid choice"),
        (["x.yaml"], "the following arguments are required: --world"),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            main_of("opensora.cli.forecast")(argv)
