"""How commands end: what inputs, outputs, disks and terminals do to them is one line; mistakes of ours stay loud."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opensora.cli.main import run_cli
from opensora.config.load import load_config, save
from opensora.config.run import RunConfig
from opensora.utils.command_line import command
from opensora.utils.command_line.command import ending_of
from opensora.utils.errors import UserError, one_line
from tests.conftest import ROOT
from tests.faults.conftest import Tally

LINES = (
    (UserError("key=1:\n  must be one of 2"), "error: key=1: must be one of 2", 2),
    (OSError(28, "No space left on device", "out/a.png"), "error: out/a.png: No space left on device", 1),
    (PermissionError(13, "Permission denied", b"out/\xff"), "error: out/\\xff: Permission denied", 1),
    (FileNotFoundError(2, "No such file or directory", "a\x1b[31m\nb"), "error: a\\x1b[31m b: No such file", 1),
    (OSError(30, "Read-only file system"), "error: test_commands.py:", 1),
    (OSError("w.safetensors: disk full (x)"), "error: w.safetensors: disk full (x)", 1),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "error: 'utf-8' codec can't decode", 2),
    (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), "error: 'utf-8' codec can't encode", 2),
    (csv.Error("field larger than field limit (131072)"), "error: field larger than field limit", 2),
    (KeyboardInterrupt(), "stopped by SIGINT", 130),
)
LOUD = (
    TypeError("x"),
    KeyError("x"),
    AssertionError(),
    RuntimeError("x"),
    ValueError("x"),
    ConnectionRefusedError(111, "Connection refused"),
    BrokenPipeError(32, "Broken pipe"),  # of a pipe to a process of ours: standard output has its reader
    TimeoutError(110, "x"),
    OSError(9, "Bad file descriptor"),
    ChildProcessError(10, "No child processes"),
    RecursionError(),
)


@pytest.mark.parametrize(("error", "line", "code"), LINES, ids=[type(error).__name__ for error, *_ in LINES])
def test_one_line(
    error: BaseException, line: str, code: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)

    def main(_: list[str]) -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_cli(main)
    said = capfd.readouterr()
    assert caught.value.code == code and said.err.startswith(line) and said.err.count("\n") == 1 and not said.out
    assert command.call(main, []) == code
    assert capfd.readouterr().err == said.err


@pytest.mark.parametrize("error", LOUD, ids=[type(error).__name__ for error in LOUD])
def test_mistakes_of_ours_stay_loud(error: Exception) -> None:
    def main(_: list[str]) -> None:
        raise error

    for run in (run_cli, lambda main: command.call(main, [])):
        with pytest.raises(type(error)):
            run(main)
    assert ending_of(error) is None


def test_any_text_is_one_printable_line() -> None:
    assert one_line("a\r\nb\tc\x1b[2J\x00\u202e\ud800\udcff\u2028d") == "a b c\\x1b[2J\\x00\\u202e\\ud800\\xff d"
    assert len(one_line("x" * 10**6)) < 2100 and one_line("ä 猫 😀") == "ä 猫 😀"


def start(program: str, **options: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


PRINTING = """
from opensora.cli.main import run_cli
def main(argv):
    for i in range(200_000):
        print(i)
run_cli(main)
"""


def test_the_reader_of_the_output_is_gone() -> None:
    process = start(PRINTING, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 141


@pytest.mark.parametrize("count", ["200_000", "2"])
def test_a_full_disk_behind_the_output(count: str, tmp_path: Path) -> None:
    (tmp_path / "printing.py").write_text(PRINTING.replace("200_000", count))
    with open("/dev/full", "w") as full:
        process = start(f"import sys; sys.path.append({str(tmp_path)!r}); import printing", stdout=full)
        _, err = process.communicate(timeout=60)
    assert err == "error: standard output: No space left on device\n" and process.returncode == 1


def test_an_output_that_cannot_be_said() -> None:
    program = "from opensora.cli.main import run_cli\nrun_cli(lambda _: print('a\\udcffb'))"
    process = start(program, stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == ("a\\udcffb\n", "", 0)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_standard_streams_that_are_closed(closed: str, tmp_path: Path) -> None:
    """The command works and ends as ever, and what it says is in none of the files that it opens."""
    said = tmp_path / "said"
    (tmp_path / "program.py").write_text(
        "import os, sys\n"
        "from opensora.cli.main import run_cli\n"
        "def main(_):\n"
        f"    with open({str(said)!r}, 'w') as file:\n"
        "        print('out'); print('err', file=sys.stderr, flush=True); sys.stdout.flush()\n"
        "        assert file.fileno() > 2 and os.system('echo child; echo child >&2') == 0\n"
        "run_cli(main)\n"
    )
    command = f"exec {sys.executable} {tmp_path / 'program.py'} {closed}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, shell=True, env=environment, capture_output=True, timeout=60).returncode == 0
    assert said.read_text() == ""


def test_ctrl_c() -> None:
    program = (
        "from opensora.cli.main import run_cli\nimport time\nrun_cli(lambda _: print(1, flush=True) or time.sleep(60))"
    )
    process = start(program, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (err, process.returncode) == ("stopped by SIGINT\n", 130)
    assert ending_of(KeyboardInterrupt()) == ("stopped by SIGINT", 130)


@pytest.mark.parametrize("name", ["buckets", "precompute", "train", "submit"])
def test_what_is_refused_leaves_no_folder(
    name: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/bin/true")
    main, argv, _ = commands(run_folder, tmp_path / "new")[name]
    before = sorted(tmp_path.rglob("*"))
    assert ends(main, [*argv, "data.table=nowhere.csv"], monkeypatch) == 2
    assert "data.table=nowhere.csv: no such file" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"optim.lr=1e-3 'name=a\n", "No closing quotation in the line"),
        (b"\xff\xfe\x00", "--array=lines.txt line 1: not UTF-16"),
        (b"caf\xe9", "--array=lines.txt line 1: not UTF-8"),
        (b"optim.lr=1e-3\0", "--array=lines.txt line 1: holds a NUL"),
        (b"optim.lrr=1", "optim.lrr: unknown key"),
        (b"\n# nothing\n", "--array=lines.txt: no lines"),
        (b"name=a\nname=a\n", "two runs in"),
    ],
)
def test_a_file_of_overrides_that_is_none(
    content: bytes, said: str, run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("lines.txt").write_bytes(content)
    main, argv, _ = commands(run_folder, run_folder.parent)["submit"]
    assert ends(main, [*argv, "--array", "lines.txt", "--no-check"], monkeypatch) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


# Places that cannot be written: a disk that is full, and one that is read-only.


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    folder, made = tmp_path_factory.mktemp("disks"), []
    try:
        for name in ("full", "readonly"):
            (folder / name).mkdir()
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder / name)], check=False)
            if done.returncode:
                pytest.skip("a small disk cannot be mounted here")
            made.append(folder / name)
        yield {name: folder / name for name in ("full", "readonly")}
    finally:
        for place in made:
            subprocess.run(["umount", "-l", str(place)], check=False)


@pytest.fixture
def run_folder(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with metrics, of ``train.yaml`` two folders above."""
    cfg = load_config(RunConfig, config)
    save(cfg, cfg.folder / "config.yaml")
    records = ({"step": step, "loss": 1.0, "time/step_s": 1.0, "data/wait_s": 0.0} for step in range(1, 30))
    (cfg.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return cfg.folder


def commands(run: Path, disk: Path) -> dict[str, tuple[Callable[[list[str]], int | None], list[str], str]]:
    """Command -> its main, arguments that write to the disk, and the option that the line names."""
    from data_pipeline.index import main as index
    from data_pipeline.shapes.write import main as shapes
    from launch.submit import main as submit
    from opensora.cli import buckets, config_reference, plot, precompute, train

    config = str(run.parent.parent / "train.yaml")
    return {
        "buckets": (buckets.main, [config, f"output={disk}"], "output"),
        "plot": (plot.main, [str(run), "--out", str(disk / "loss.png")], "--out"),
        "precompute": (precompute.main, [config, "--out", str(disk / "features")], "--out"),
        "config_reference": (config_reference.main, [], "docs"),
        "shapes": (shapes, ["--out", str(disk / "s"), "--clips", "1", "--images", "1", "--processes", "1"], "--out"),
        "index": (index, [str(run), "--out", str(disk / "t.csv")], "--out"),
        "submit": (submit, [config, f"output={disk}", "--gpus-per-node", "0"], "output"),
        "train": (train.main, [config, f"output={disk}"], "output"),
    }


NAMES = ["buckets", "plot", "precompute", "config_reference", "shapes", "submit", "train"]


def ends(main: Callable[[list[str]], int | None], argv: list[str], patch: pytest.MonkeyPatch) -> object:
    patch.setattr(sys, "argv", ["command", *argv])
    try:
        run_cli(main)
    except SystemExit as exit_:
        return exit_.code


@pytest.fixture(params=NAMES)
def end_on(
    request: pytest.FixtureRequest,
    run_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Path], tuple[object, str, str, str]]:
    """``end_on(disk)``: exit code, what is said on stdout and stderr, and the key of the output, of a command whose
    output is to be there."""

    def end(disk: Path) -> tuple[object, str, str, str]:
        monkeypatch.setattr("opensora.cli.config_reference.TARGET", disk / "configuration.md")
        monkeypatch.setattr("shutil.which", lambda name: "/bin/true")
        main, argv, key = commands(run_folder, disk)[request.param]
        code = ends(main, argv, monkeypatch)
        return (code, *capsys.readouterr(), key)

    return end


def test_a_read_only_disk_is_refused_before_the_work(
    end_on: Callable[[Path], tuple[object, str, str, str]], disks: dict[str, Path], tally: Tally
) -> None:
    disk = disks["readonly"]
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    code, out, err, key = end_on(disk)
    assert code == 2 and err.count("\n") == 1 and out == "", (out, err)
    assert err.startswith(f"error: {key}") and str(disk) in err and "Read-only" in err
    tally("outputs that cannot be written: one line, before the work", 1, 1)


def test_a_full_disk_is_one_line(
    end_on: Callable[[Path], tuple[object, str, str, str]], disks: dict[str, Path], tally: Tally
) -> None:
    disk = disks["full"]
    with (disk / "filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            pass
    code, _, said, _ = end_on(disk)
    err = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code in (1, 2) and len(err) == 1 and str(disk) in err[0], err
    assert "space" in err[0] or "disk has" in err[0] or "disk full" in err[0]
    tally("a full disk under a command: one line, exit code not 0", 1, 1)
