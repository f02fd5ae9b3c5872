"""Paths that lead nowhere, to every command that takes one: one short line with the option, the path and the reason."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from opensora.cli.main import run_cli
from opensora.config.load import load_config
from opensora.config.run import RunConfig, SampleConfig
from opensora.inference.find import find_source
from opensora.train.state.resume import check_paths
from opensora.utils.errors import MAX_LINE, MAX_WORD, UserError, one_line
from opensora.utils.files.untrusted import short
from tests.conftest import ROOT
from tests.faults.conftest import Tally
from tests.unit.test_config import GOOD

sys.path.insert(0, str(ROOT / "launch"))


def loop(folder: Path) -> str:
    (folder / "loop").symlink_to(folder / "pool")
    (folder / "pool").symlink_to(folder / "loop")
    return str(folder / "loop")


def nothing(folder: Path) -> str:
    (folder / "link").symlink_to(folder / "gone")
    return str(folder / "link")


def below_a_file(folder: Path) -> str:
    (folder / "file").write_text("x")
    return str(folder / "file" / "below")


KINDS: dict[str, tuple[Callable[[Path], str], str]] = {
    "a loop of links": (loop, "symbolic links"),
    "a name of 300 characters": (lambda folder: str(folder / ("n" * 300)), "too long"),
    "a path of 5000 characters": (lambda folder: f"{folder}/{'folder/' * 700}x", "too long|no such"),
    "a file as a folder": (below_a_file, "[Nn]ot a directory"),
    "a link to nothing": (nothing, "no such|link to nothing|No such"),
    "nothing": (lambda folder: str(folder / "gone"), "no such|No such|no folder"),
}
# What takes a path: the module of the command, and its words with the path as {}.
READS = {
    "index DIR": ("data_pipeline.index", ["{}", "--out", "t.csv"]),
    "index --captions": ("data_pipeline.index", [".", "--out", "t.csv", "--captions", "{}"]),
    "plot RUN": ("opensora.cli.plot", ["{}"]),
    "calibrate RUN": ("opensora.cli.calibrate", ["{}"]),
    "plan CONFIG": ("opensora.cli.forecast", ["{}", "--world", "2"]),
    "buckets CONFIG": ("opensora.cli.buckets", ["{}"]),
    "buckets data.table": ("opensora.cli.buckets", ["run.yaml", "data.table={}"]),
    "train CONFIG": ("opensora.cli.train", ["{}"]),
    "train data.table": ("opensora.cli.train", ["run.yaml", "data.table={}"]),
    "train train.init_from": ("opensora.cli.train", ["run.yaml", "train.init_from={}"]),
    "train train.resume": ("opensora.cli.train", ["run.yaml", "train.resume={}"]),
    "train include": ("opensora.cli.train", ["include.yaml"]),
    "sample weights": ("opensora.cli.sample", ["sample.yaml", "weights={}"]),
    "judge --table": ("data_pipeline.shapes.judge", [".", "--table", "{}"]),
    "submit CONFIG": ("launch.submit", ["{}"]),
}
SAMPLE = "weights: nowhere\nprompt: a cat\nsampling: {resolution: 256px}\n"


def said(module: str, argv: list[str], capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> str:
    main = __import__(module, fromlist=["main"]).main
    patch.setattr(sys, "argv", ["command", *argv])
    with pytest.raises(SystemExit) as caught:
        run_cli(main)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", READS)
def test_what_is_read(
    where: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: "/bin/true")
    make, reason = KINDS[kind]
    path = make(tmp_path)
    (tmp_path / "run.yaml").write_text(GOOD)
    (tmp_path / "include.yaml").write_text(f"include: {path}\n")
    (tmp_path / "sample.yaml").write_text(SAMPLE)
    module, words = READS[where]
    line = said(module, [word.replace("{}", path) for word in words], capsys, monkeypatch)
    shown = one_line(path)
    assert (shown[:40] in line or path[:40] in line) and len(line) < MAX_LINE, line
    if where != "train include":  # which names what is in the file
        assert any(part in line for part in reason.split("|")) or "ot a directory" in line, line
    tally("paths that lead nowhere: one short line, the path, the reason", 1, 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_what_is_forbidden(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "closed").mkdir(mode=0)
    line = said(
        "data_pipeline.index", [".", "--out", "t.csv", "--captions", "closed/captions.csv"], capsys, monkeypatch
    )
    assert "closed/captions.csv: " in line and "ermission denied" in line


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/step-00000008"])
def test_a_place_inside_a_run(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was meant is named: the folder of the run for sampling, its export for training from it."""
    monkeypatch.chdir(tmp_path)
    step = tmp_path / "runs/first/checkpoints/step-00000008"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    (step / "shard-00000.safetensors").write_bytes(b"x")
    for given in (str(tmp_path / "runs/first" / where), f"runs/first/{where}".rstrip("/")):
        cfg = load_config(SampleConfig, {"weights": given, "prompt": "x", "sampling": {"resolution": "256px"}})
        with pytest.raises(UserError) as caught:
            find_source(cfg)
        assert where == "" or f"give the run's folder, weights={tmp_path / 'runs/first'}, " in str(caught.value)
        other = {"weights": str(tmp_path), "prompt": "x", "sampling": {"resolution": "256px"}, "lora": given}
        with pytest.raises(UserError, match=r"^lora=.*; give lora=.*runs/first/exported, or weights=.*runs/first$"):
            find_source(load_config(SampleConfig, other))
        (tmp_path / "run.yaml").write_text(GOOD)
        with pytest.raises(UserError, match=r"give .*runs/first/exported, or go on with it by train.resume"):
            check_paths(load_config(RunConfig, tmp_path / "run.yaml", [f"train.init_from={given}"]))


def test_values_are_shortened_in_one_place() -> None:
    assert short("a" * 80) == "a" * 80 and len(short("a" * 81)) == 80 and len(short("a" * 10**6, 40)) == 40
    assert short("begin" + "x" * 500 + "end").startswith("begin") and short("begin" + "x" * 500 + "end").endswith("end")
    assert short(10**100) == "10000000... (101 digits)" and short(10**5000).endswith("digits")
    assert short(123) == "123" and short("b" * 64) == "b" * 64  # a checksum is no number
    path = "/" + "/".join(["folder"] * 1000)
    assert len(one_line(f"{path}: cannot be read")) < MAX_WORD + 20
    assert one_line(f"{path}: cannot be read").endswith("cannot be read")
    assert len(one_line("word " * 10**5)) < MAX_LINE + 10
    ordinary = "/" + "/".join(["folder"] * 40)
    assert one_line(ordinary) == ordinary
    assert one_line(f"value={'7' * 300}") == "value=77777777... (300 digits)"


NUMBERS = ["1e99", "-1e99", "1e308", "12345678901234567890123456789.0", "1.5", "9" * 30, "0x" + "f" * 60, "1e15"]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "key", ["sampling.motion_score", "sampling.seed", "sampling.num_steps", "sampling.guidance", "prompt", "num_sample"]
)
def test_numbers_in_messages_are_short(key: str, number: str) -> None:
    base = {"weights": "w", "prompt": "x", "sampling": {"resolution": "256px"}}
    try:
        load_config(SampleConfig, base, [f"{key}={number}"])
    except UserError as error:
        assert len(str(error)) < 250 and not any(len(word) > 80 for word in str(error).split()), error


def test_a_long_row_is_not_repeated_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions.csv").write_text(f"path,text\n{'a' * 5000},one\n{'a' * 5000},two\n")
    line = said("data_pipeline.index", [".", "--out", "t.csv"], capsys, monkeypatch)
    assert "has another text in line 2" in line and len(line) < 500


def test_a_number_that_no_file_can_hold_is_not_suggested() -> None:
    base = {"weights": "w", "prompt": "x", "sampling": {"resolution": "256px"}}
    for text, said in (
        ("1e99", "1e+99: must be a whole number of at most 64 bits"),
        ("4.0", "4.0: must be a whole number"),
    ):
        with pytest.raises(UserError) as caught:
            load_config(SampleConfig, base, [f"sampling.motion_score={text}"])
        assert str(caught.value).startswith(f"sampling.motion_score={said}")
        assert ("write 4 " in str(caught.value)) == (text == "4.0")
