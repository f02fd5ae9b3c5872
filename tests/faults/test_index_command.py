"""``data_pipeline.index`` on folders as people have them: odd texts, names, links and arguments, and files that harm.

Whatever is in a folder: no traceback, a table that can be read, or one line; rows and what is left out are all files.
"""

import csv
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import time
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
import pytest
from PIL import Image

from data_pipeline import index as command
from data_pipeline.index import TIMEOUT_S, main
from opensora.datasets.decode import process
from opensora.datasets.table.manifest import read_table
from opensora.utils.errors import UserError
from tests.conftest import ROOT
from tests.faults.conftest import Tally
from tests.unit.test_decode import encode


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    encode(path, 5)
    return path.read_bytes()


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("still") / "a.png"
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(path)
    return path.read_bytes()


class Run:
    """What a call of the command came to."""

    def __init__(self, folder: Path, out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> None:
        self.code = main([str(folder), "--out", str(out), "--workers", "2", *more])
        self.said, self.error = capsys.readouterr()
        self.rows: dict[str, str] = {}
        self.paths: list[str] = []
        if self.code == 0:
            table = read_table(str(out))
            self.paths = [table.path(i) for i in range(len(table))]
            self.rows = {Path(table.path(i)).name: table.caption(i) for i in range(len(table))}
            for text in (out.read_text(encoding="utf-8"), *self.rows.values()):
                assert "\0" not in text and "\ufffd" not in text
        else:
            assert self.code == 2 and self.error.count("\n") == 1 and self.error.startswith("error: "), self.error
        listed = out.with_name(f"{out.name}.left_out.csv")
        self.left_out: list[dict[str, str]] = []
        if listed.is_file():
            with listed.open(encoding="utf-8", newline="") as file:
                self.left_out = list(csv.DictReader(file))
        if self.code == 0:
            counted = Counter(row["reason"] for row in self.left_out)
            assert all(f"left out {number}: {reason} (" in self.said for reason, number in counted.items())
            assert f"{len(self.paths)} rows of {len(self.paths) + len(self.left_out)} files" in self.said

    def why(self, name: str) -> tuple[str, str]:
        """(reason, detail) of a file."""
        (row,) = (row for row in self.left_out if Path(row["path"]).name == name)
        return row["reason"], row["detail"]


def test_texts_beside_clips(tmp_path: Path, clip: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    texts = {
        "utf16": "a red circle moves left".encode("utf-16"),
        "bom": "Köln, 東京, 🎬".encode("utf-8-sig"),
        "cp1252": "first\ncaf\xe9".encode("cp1252"),
        "nul": "a b".encode("utf-16-le"),
        "lost": "caf\ufffd".encode(),
        "empty": b" \n",
        "nan": b"NaN",
        "long": b"x" * (2**20 + 1),
        "limit": b"y" * 2**20,
    }
    for name, text in texts.items():
        (folder / f"{name}.mp4").write_bytes(clip)
        (folder / f"{name}.txt").write_bytes(text)
    (folder / "upper.MP4").write_bytes(clip)
    (folder / "upper.TXT").write_text("shouted")
    (folder / "folder.mp4").write_bytes(clip)
    (folder / "folder.txt").mkdir()
    run = Run(folder, tmp_path / "t.csv", capsys)
    assert run.rows == {
        "utf16.mp4": "a red circle moves left",
        "bom.mp4": "Köln, 東京, 🎬",
        "limit.mp4": "y" * 2**20,
        "upper.MP4": "shouted",
    }
    assert run.why("cp1252.mp4") == (
        "caption cannot be read", "cp1252.txt line 2: not UTF-8 text (byte 0xe9); save it again as UTF-8",
    )  # fmt: skip
    assert run.why("nul.mp4")[1].startswith("nul.txt line 1: holds a NUL character")
    assert run.why("lost.mp4")[1].startswith("lost.txt holds U+FFFD")
    assert run.why("empty.mp4") == ("no caption", "empty.txt is empty")
    assert run.why("nan.mp4") == ("no caption", "nan.txt says 'NaN', which tables write for no value")
    assert run.why("long.mp4") == ("caption too long", "long.txt has 1048577 bytes, a caption may have at most 1048576")
    assert run.why("folder.mp4") == ("no caption", "not in a captions file, and no text file beside it")


@pytest.mark.parametrize(("on_disk", "in_table"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_written_in_two_ways_are_one_name(
    on_disk: Literal["NFC", "NFD"],
    in_table: Literal["NFC", "NFD"],
    tmp_path: Path,
    clip: bytes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a folder of a Mac and a table typed elsewhere; names that differ in nothing else are told apart."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("é.mp4", "ü.mp4"):
        (folder / unicodedata.normalize(on_disk, name)).write_bytes(clip + name.encode())
    other = unicodedata.normalize(in_table, "ü.mp4")
    (folder / other).write_bytes(clip + b"another")
    rows = [f"{unicodedata.normalize(in_table, name)},{name[0]}\n" for name in ("é.mp4", "ü.mp4")]
    (folder / "captions.csv").write_text("path,text\n" + "".join(rows) + "nowhere.mp4,x\n", encoding="utf-8")
    run = Run(folder, tmp_path / "t.csv", capsys)
    assert run.rows[unicodedata.normalize(on_disk, "é.mp4")] == "é" and run.rows[other] == "ü"
    assert run.why(unicodedata.normalize(on_disk, "ü.mp4"))[0] == "no caption"  # the row is the other's
    assert "nowhere.mp4" in run.said and "é.mp4" not in run.said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,text\na.mp4,x\n,a note without a path\n", "captions.csv line 3 has no path"),
        ('text,path\na clip,a.mp4\n"a note without a path"\n', "captions.csv line 3 has no path"),
        ("path,text\na.mp4,x\na.mp4,y\n", "captions.csv line 3: 'a.mp4' has another text in line 2"),
        ("path,text\na.mp4,x\n./a.mp4,y\n", "captions.csv line 3: './a.mp4' has another text in line 2"),
        (f"path,text\na.mp4,{'x' * (2**20 + 1)}\n", "captions.csv line 2: a field of more than 1048576 characters"),
        ("path,text\na.mp4,x,y\n", "captions.csv line 2: 3 fields, the header has 2"),
        ("path,text\na.mp4,caf\xe9\n".encode("cp1252"), "captions.csv line 2: not UTF-8 text (byte 0xe9); save it"),
        ("path,text\na.mp4,x\n".encode("utf-16-le"), "captions.csv line 1: holds a NUL character"),
        ("path,text\nb.mp4,x\n", "1 rows of the captions file are of no file here: b.mp4"),
    ],
)
def test_captions_files_that_are_refused(
    text: str | bytes, words: str, tmp_path: Path, clip: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(clip)
    (folder / "captions.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    run = Run(folder, tmp_path / "t.csv", capsys)
    assert run.code == 2 and words in run.error and not (tmp_path / "t.csv").exists()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_captions_files_that_are_read(
    encoding: str, tmp_path: Path, clip: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(clip)
    long = "wörd " * 30_000
    text = f"path,text\na.mp4,{long}\na.mp4,{long}\nold1.mp4,x\nold2.mp4,x\nold3.mp4,x\nold4.mp4,x\n\n"
    (folder / "captions.csv").write_bytes(text.encode(encoding))
    run = Run(folder, tmp_path / "t.csv", capsys)
    assert run.rows == {"a.mp4": long.strip()}
    assert "4 rows of the captions file are of no file here: old1.mp4, old2.mp4, old3.mp4 and 1 more" in run.said


def test_names(tmp_path: Path, clip: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    names = [b"ok.mp4", b"\xc4\xe3.mp4", b"two\nlines.mp4", b"re\rturn.mp4", b'quo"te,.mp4', b" .mp4", b"nan"]
    names += [b"a#b.mp4", "東京.mp4".encode(), b"x" * 240 + b".mp4"]
    for name in names:
        path = os.path.join(os.fsencode(folder), name)
        Path(os.fsdecode(path)).write_bytes(clip)
        Path(os.fsdecode(path)).with_suffix(".txt").write_text("a caption")
    run = Run(folder, folder / "t.csv", capsys)  # the table lies beside them, so that paths are names alone
    assert {os.fsencode(name) for name in run.rows} == {name for name in names if name != b"\xc4\xe3.mp4"}
    assert [row["reason"] for row in run.left_out] == ["file name is not UTF-8"]
    assert r"\udcc4\udce3.mp4" in run.left_out[0]["path"]
    table = read_table(str(folder / "t.csv"))
    assert all(Path(table.path(i)).is_file() for i in range(len(table)))


def test_links_and_what_is_no_media(
    tmp_path: Path, clip: bytes, still: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    (folder / "sub").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    for place in (folder / "a.mp4", folder / "sub" / "b.mp4", elsewhere / "c.mp4", elsewhere / "deep" / "d.mp4"):
        place.write_bytes(clip)
        place.with_suffix(".txt").write_text(place.stem)
    (folder / "part1").symlink_to(elsewhere)
    (folder / "part2").symlink_to(elsewhere)  # the same once more
    (folder / "sub" / "up").symlink_to(folder)
    (elsewhere / "self").symlink_to(".")
    (folder / "loop").symlink_to("loop")
    (folder / "gone.mp4").symlink_to("nowhere.mp4")
    (folder / "again.mp4").symlink_to("a.mp4")
    os.link(folder / "a.mp4", folder / "hard.mp4")
    (folder / "hard.txt").write_text("another name")
    os.mkfifo(folder / "pipe.mp4")
    (folder / ".hidden.mp4").write_bytes(clip)
    (folder / ".git").mkdir()
    (folder / ".clip_index").mkdir()
    (folder / "readme.md").write_text("# words")
    (folder / "orphan.txt").write_text("beside nothing")
    (folder / "readme.txt").write_text("beside a text")
    (folder / "page.jpg").write_text("<!DOCTYPE html><html>")
    (folder / "nosuffix").write_bytes(still)
    (folder / "nosuffix.txt").write_text("by content")
    (folder / "broken.mp4").write_bytes(clip[:300])
    with zipfile.ZipFile(folder / "clips.zip", "w") as archive:
        archive.writestr("a.mp4", clip)
    with tarfile.open(folder / "shard.tar", "w") as tar:
        tar.add(folder / "a.mp4", "a.mp4")
    run = Run(folder, folder / "t.csv", capsys)
    assert run.rows == {"a.mp4": "a", "b.mp4": "b", "c.mp4": "c", "d.mp4": "d", "nosuffix": "by content"}
    reasons = {Path(row["path"]).name: row["reason"] for row in run.left_out}
    assert reasons == {
        "part2": "folder reached twice",
        "up": "folder reached twice",
        "self": "folder reached twice",
        "loop": "cannot be read",
        "gone.mp4": "cannot be read",
        "again.mp4": "file reached twice",
        "hard.mp4": "file reached twice",
        "pipe.mp4": "not a regular file",
        ".hidden.mp4": "hidden",
        ".git": "hidden",
        "readme.md": "no video or image",
        "readme.txt": "no video or image",
        "orphan.txt": "no video or image",
        "page.jpg": "no video or image",
        "broken.mp4": "cannot be read",
        "clips.zip": "archive",
        "shard.tar": "archive",
    }
    assert run.why("gone.mp4")[1] == "a link to nothing"
    assert "web page" in run.why("page.jpg")[1] and "#MEMBER" in run.why("shard.tar")[1]
    again = Run(folder, folder / "t.csv", capsys)  # its own table is no file of the folder
    assert again.rows == run.rows and again.left_out == run.left_out


def test_a_folder_that_may_not_be_read(
    tmp_path: Path, clip: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in" / "locked").mkdir(parents=True)
    (tmp_path / "in" / "a.mp4").write_bytes(clip)
    (tmp_path / "in" / "a.txt").write_text("a")
    real = os.scandir

    def scandir(path: object) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return real(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", scandir)
    run = Run(tmp_path / "in", tmp_path / "t.csv", capsys)
    assert run.why("locked") == ("folder cannot be read", "Permission denied") and len(run.rows) == 1


def test_bad_arguments_before_any_work(
    tmp_path: Path, clip: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "in", str(tmp_path / "t.csv")
    folder.mkdir()
    (folder / "captions.csv").write_text("path,text\na.mp4,x\n")
    (tmp_path / "d.csv").mkdir()
    (tmp_path / "e.csv.left_out.csv").mkdir()
    os.mkfifo(tmp_path / "p.csv")

    def too_late(*_: object) -> None:
        raise AssertionError("work before the arguments were judged")

    monkeypatch.setattr(command, "walk", too_late)
    cases = [
        ([], "--out"),
        (["--out", ""], "--out=''"),
        (["--out", str(tmp_path / "d.csv")], "is a folder"),
        (["--out", str(tmp_path / "e.csv")], "e.csv.left_out.csv: is a folder"),
        (["--out", str(tmp_path / "p.csv")], "not a regular file"),
        (["--out", "/proc/t.csv"], "cannot be written"),
        (["--out", str(tmp_path / "d.csv" / "captions.csv" / "t.csv"), "--timeout", "0"], "--timeout=0"),
        (["--out", str(tmp_path / ("x" * 300 + ".csv"))], "cannot be written"),
        (["--out", str(tmp_path / "t.parquet")], "let its name end in .csv"),
        (["--out", str(folder / "captions.csv")], "is the captions file"),
        (["--out", out, "--out", out], "--out is there twice"),
        (["--out", out, "--workers", "-1"], "--workers=-1"),
        (["--out", out, "--workers", "0"], "--workers=0"),
        (["--out", out, "--workers", "x"], "--workers"),
        (["--out", out, "--workers", "100000"], "--workers=100000"),
        (["--out", out, "--timeout", "nan"], "--timeout=nan"),
        (["--out", out, "--timeout", "-3"], "--timeout=-3"),
        (["--out", out, "--captions", ""], "--captions=''"),
        (["--out", out, "--captions", str(folder)], "not a regular file"),
        (["--out", out, "--captions", str(tmp_path / "none.csv")], "no such captions file"),
        (["--out", out, "--work", "2"], "unrecognized arguments"),
        (["more", "--out", out], "unrecognized arguments"),
    ]
    for argv, words in cases:
        assert main([str(folder), *argv]) == 2, argv
        said = capsys.readouterr()
        assert words in said.err and said.err.count("\n") == 1 and not said.out, (argv, said)
    for where in ("", "  "):
        assert main([where, "--out", out]) == 2 and "must be the path" in capsys.readouterr().err
    assert not Path(out).exists()


HARM = {
    "hang": ("time.sleep(600)", r"the decoding process \(pid \d+\) hung for 2 s and was killed"),
    "die": ("os.kill(os.getpid(), 11)", r"the decoding process \(pid \d+\) was killed by SIGSEGV"),
    "grow": ("b = [bytes(1 << 28) for _ in range(100)]", "it asks for more than 1900 MiB of memory"),
}


def harmful(folder: Path, code: str) -> None:
    """A decoding process does this when it probes a file called bad.mp4."""
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'opensora.datasets.decode.worker' in sys.orig_argv:\n"
        "    import os, time, opensora.datasets.decode.api as d\n"
        "    real = d.probe\n"
        "    def probe(path, **k):\n"
        f"        if path.endswith('bad.mp4'): {code}\n"
        "        return real(path, **k)\n"
        "    d.probe = probe\n"
    )


@pytest.mark.parametrize("how", HARM)
def test_a_file_that_hangs_kills_or_floods_its_reader_costs_itself(
    how: str, tmp_path: Path, clip: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, reason = HARM[how]
    harmful(tmp_path, code)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(process, "PATIENCE_S", 0.8)
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "bad", "c", "d"):
        (folder / f"{name}.mp4").write_bytes(clip)
        (folder / f"{name}.txt").write_text(name)
    timeout = "1" if how == "hang" else "60"
    run = Run(folder, tmp_path / "t.csv", capsys, "--timeout", timeout)
    assert run.rows == {"a.mp4": "a", "c.mp4": "c", "d.mp4": "d"}
    listed = run.why("bad.mp4")
    assert listed[0] == "cannot be read"
    assert re.fullmatch(reason + r"( \(out of memory\?\))?", listed[1]), listed


def test_a_small_file_that_counts_sixty_million_frames(
    tmp_path: Path, clip: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFmpeg makes a list of them before the first packet: more memory than a decoding process may have."""
    frames, raw = 60_000_000, bytearray(clip)
    for box, entry in ((b"stsz", (1, frames)), (b"stts", (1, frames, 512)), (b"stsc", (1, 1, frames, 1))):
        at = raw.index(box) + 8
        raw[at : at + 4 * len(entry)] = struct.pack(f">{len(entry)}I", *entry)
    for box in (b"stss", b"ctts"):
        raw = bytearray(bytes(raw).replace(box, b"free"))
    folder = tmp_path / "in"
    folder.mkdir()
    for name, content in (("a", clip), ("claims", bytes(raw))):
        (folder / f"{name}.mp4").write_bytes(content)
        (folder / f"{name}.txt").write_text("x")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    run = Run(folder, tmp_path / "t.csv", capsys)
    assert run.rows == {"a.mp4": "x"} and run.why("claims.mp4")[0] == "cannot be read"
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert most == before or most < 2 << 20  # KiB


def test_the_limits_are_those_of_training() -> None:
    from opensora.datasets import DataConfig

    assert DataConfig().decode_timeout_s == TIMEOUT_S


def test_ctrl_c_is_one_line(tmp_path: Path, clip: bytes) -> None:
    harmful(tmp_path, "open(os.environ['STARTED'], 'w').close(); time.sleep(600)")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "bad.mp4").write_bytes(clip)
    (folder / "bad.txt").write_text("x")
    (tmp_path / "t.csv").write_text("as it was")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "STARTED": str(tmp_path / "started")}
    argv = [sys.executable, "-m", "data_pipeline.index", str(folder), "--out", str(tmp_path / "t.csv")]
    run = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    waited = time.monotonic()
    while not (tmp_path / "started").exists() and time.monotonic() < waited + 60:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    said, error = run.communicate(timeout=60)
    assert run.returncode == 130 and error == "interrupted: the clip table was not written\n" and not said
    assert (tmp_path / "t.csv").read_text() == "as it was"
    assert sorted(os.listdir(tmp_path)) == ["in", "sitecustomize.py", "started", "t.csv"]


def noise(draw: random.Random) -> str:
    """A caption, a field or a name."""
    pieces = ["a red circle", "Köln", "東京", "🎬", ",", '"', "\n", "\r", ";", "'", "#", "=1+1", "nan", "\t", "\u2028"]
    return "".join(draw.choice(pieces) for _ in range(draw.randrange(1, 6)))


def grow(draw: random.Random, folder: Path, contents: list[bytes], depth: int = 0) -> None:
    """Files, folders and links at random."""
    folder.mkdir(exist_ok=True)
    for number in range(draw.randrange(1, 6)):
        stem = draw.choice([f"f{number}", noise(draw).replace("/", "")[:60].strip(".") or "x", f".h{number}"])
        path = folder / (stem + draw.choice([".mp4", ".png", ".txt", ".md", ".csv", ".TXT", ""]))
        kind = draw.randrange(10)
        if os.path.lexists(path) or path.name in (".", ".."):
            continue
        if kind < 6:
            content = draw.choice(contents) if draw.random() < 0.6 else noise(draw).encode(draw.choice(ENCODINGS))
            path.write_bytes(content)
            if draw.random() < 0.6 and not os.path.lexists(path.with_suffix(".txt")):
                path.with_suffix(".txt").write_bytes(noise(draw).encode(draw.choice(ENCODINGS), "ignore"))
        elif kind < 8 and depth < 3:
            grow(draw, folder / f"d{number}", contents, depth + 1)
        else:
            up = ".." if depth else "."  # never out of the folder that is indexed
            path.symlink_to(draw.choice([up, ".", "nowhere", f"d{number}", "f0.mp4", path.name]))


ENCODINGS = ("utf-8", "utf-8", "utf-16", "utf-8-sig")


def things_in(folder: Path) -> int:
    """Files, and what else is listed, by another way of counting: paths below, real folders aside."""
    count = 0
    for root, folders, files in os.walk(folder):
        hidden = [name for name in folders if name.startswith(".")]
        linked = [name for name in folders if os.path.islink(os.path.join(root, name)) and name not in hidden]
        count += len(hidden) + len(linked) + len(files)
        folders[:] = [name for name in folders if name not in hidden and name not in linked]
    return count


def add_up(draw: random.Random, folder: Path, contents: list[bytes], capsys: pytest.CaptureFixture[str]) -> bool:
    """Index a random folder; whether there was a table. Links lead within it only, so each path is seen once."""
    grow(draw, folder, contents)
    out = folder.parent / f"{folder.name}.csv"
    run = Run(folder, out, capsys)
    texts = [path for path in folder.rglob("*") if path.suffix.lower() == ".txt" and not path.name.startswith(".")]
    listed = {row["path"] for row in run.left_out}
    used = [path for path in texts if str(path) not in listed and os.path.abspath(path) not in run.paths]
    if run.code == 0 or listed:
        assert len(run.paths) + len(run.left_out) + len(used) == things_in(folder)
    return run.code == 0


def fuzz_tables(draw: random.Random, folder: Path, count: int) -> Counter[str]:
    """Clip tables with noise in them are read, or refused in one line."""
    found: Counter[str] = Counter()
    columns = {"path": ["a.mp4", "b.mp4"], "text": ["one", "two"], "num_frames": [9, 9], "height": [32, 32]}
    columns |= {"width": [32, 32], "fps": [8.0, 24.0]}
    papq.write_table(pa.table(columns), folder / "whole.parquet")
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    lines = "".join(",".join(map(str, row)) + "\n" for row in rows)
    for number in range(count):
        suffix = ".parquet" if number % 2 else ".csv"
        encoding = draw.choice(["utf-8", "utf-16", "utf-8-sig", "cp1252", "utf-16-le"])
        raw = bytearray((folder / "whole.parquet").read_bytes() if number % 2 else lines.encode(encoding))
        for _ in range(draw.randrange(1, 5)):
            at = draw.randrange(len(raw))
            how = draw.randrange(4)
            if how == 0:
                raw[at] ^= 1 << draw.randrange(8)
            elif how == 1:
                raw[at : at + draw.randrange(8)] = b""
            elif how == 2:
                raw[at:at] = noise(draw).encode()
            else:
                raw[at:at] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9)))
            raw = raw or bytearray(b"x")
        path = folder / f"t{suffix}"
        path.write_bytes(raw)
        began = time.monotonic()
        try:
            table = read_table(str(path))
            for row in range(len(table)):
                assert "\0" not in table.caption(row) + table.path(row)
            found["read"] += 1
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error), error
            found["refused"] += 1
        assert time.monotonic() - began < 10
    return found


def fuzz_folders(
    draw: random.Random, folder: Path, count: int, capsys: pytest.CaptureFixture[str], media: list[bytes]
) -> Counter[str]:
    found: Counter[str] = Counter()
    for number in range(count):
        found["table" if add_up(draw, folder / f"in{number}", media, capsys) else "one line"] += 1
    return found


def test_folders_of_all_sorts_add_up(
    tmp_path: Path, clip: bytes, still: bytes, capsys: pytest.CaptureFixture[str], tally: Tally
) -> None:
    found = fuzz_folders(random.Random(0), tmp_path, 12, capsys, [clip, still, clip[:200], b""])
    tally("index: random folders: rows and what is left out are all files", sum(found.values()), 12)
    assert found["table"] > 2


def test_noise_in_clip_tables(tmp_path: Path, tally: Tally) -> None:
    found = fuzz_tables(random.Random(0), tmp_path, 400)
    tally("clip tables with noise in them: read, or one line", sum(found.values()), 400)
    assert found["refused"] > 100


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_folders_and_tables(
    tmp_path: Path, clip: bytes, still: bytes, capsys: pytest.CaptureFixture[str], tally: Tally
) -> None:
    draw = random.Random(1)
    found = fuzz_folders(draw, tmp_path, 100, capsys, [clip, still, clip[:200], b""])
    tally("index: random folders: rows and what is left out are all files", sum(found.values()), 100)
    found = fuzz_tables(draw, tmp_path, 10_000)
    tally("clip tables with noise in them: read, or one line", sum(found.values()), 10_000)
