"""User text: any encoding that names itself, nothing replaced; outputs whole or not at all."""

import errno
import os
import random
from pathlib import Path
from typing import IO

import pytest

from opensora.utils.errors import UserError
from opensora.utils.files.user_files import MAX_FIELD, read_csv, read_text, try_output, write_whole, written_whole

TEXT = "a red circle moves left, Köln, 東京, 🎬\nsecond line\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_that_name_themselves(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding=encoding)
    assert read_text(tmp_path / "a.txt") == TEXT


@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("width", ["16", "32"])
def test_both_byte_orders(order: str, width: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(("\ufeff" + TEXT).encode(f"utf-{width}-{order}"))
    assert read_text(tmp_path / "a.txt") == TEXT


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_others_are_refused_with_the_line(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("plain\nKöln\n".encode(encoding))
    with pytest.raises(UserError, match=r"a\.txt line [12]: .*save it again as UTF-8$"):
        read_text(tmp_path / "a.txt")


def test_noise_is_text_or_refused(tmp_path: Path) -> None:
    draw = random.Random(0)
    for _ in range(2000):
        raw = bytearray(
            TEXT.encode(
                draw.choice(
                    ["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1"],
                ),
                "ignore",
            )
        )
        for _ in range(draw.randrange(4)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        (tmp_path / "a.txt").write_bytes(raw)
        try:
            text = read_text(tmp_path / "a.txt")
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert "\0" not in text


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "none", Path("a\0b"), tmp_path / ("x" * 300)):
        with pytest.raises(UserError) as error:
            read_text(path)
        assert "\n" not in str(error.value)


def table(tmp_path: Path, text: str) -> list[tuple[int, dict[str, str]]]:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    return list(read_csv(tmp_path / "t.csv", ["path", "text"]))


def test_rows_with_their_lines(tmp_path: Path) -> None:
    rows = table(tmp_path, 'path,text,more\na.mp4,"two\nlines",x\n\nb.mp4\n')
    assert rows == [
        (3, {"path": "a.mp4", "text": "two\nlines", "more": "x"}),
        (5, {"path": "b.mp4", "text": "", "more": ""}),
    ]
    assert len(table(tmp_path, f"path,text\na,{'x' * MAX_FIELD}\n")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column 'path' is missing; it has none"),
        ("path,txt\n", "column 'text' is missing; it has path, txt"),
        ("path,text,text\n", "column 'text' is there twice"),
        ("path,text\na,b\nc,d,e\n", "t.csv line 3: 3 fields, the header has 2"),
        (f"path,text\na,{'x' * (MAX_FIELD + 1)}\n", "t.csv line 2: a field of more than 1048576 characters"),
        ('path,text\na,b\nc,"a red circle\nd,e\n', "t.csv line 3: a quote is opened and not closed"),
        ('path,text\na,"a"b"c\n', "t.csv line 2: text behind a closing quote"),
    ],
)
def test_refused_tables(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        table(tmp_path, text)
    assert message in str(error.value)


def test_written_whole_or_not(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_whole(path, lambda file: file.write("old"))

    def fails(file: IO[str]) -> None:
        file.write("new")
        file.write("\udcff")

    with pytest.raises(UserError, match=r"t\.csv: cannot be written"):
        write_whole(path, fails)
    with pytest.raises(ZeroDivisionError):
        write_whole(path, lambda file: 1 / 0)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["t.csv"]
    for place in (tmp_path, tmp_path / "none" / "t.csv"):
        with pytest.raises(UserError):
            write_whole(place, lambda file: file.write("x"))


def test_outputs_are_tried_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    try_output(tmp_path / "a" / "t.csv", "--out")
    try_output(tmp_path / "b", "save_dir", folder=True)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "file"] and not os.listdir(tmp_path / "a")
    bad = [tmp_path / "file" / "t.csv", tmp_path, Path(""), tmp_path / ("x" * 300) / "t.csv", Path("/proc/t.csv")]
    for path in bad:
        with pytest.raises(UserError, match=r"^--out="):
            try_output(path, "--out")
    with pytest.raises(UserError, match=r"^save_dir="):
        try_output(tmp_path / "file", "save_dir", folder=True)


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_may_not_be_replaced(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hard links and on file systems that have none."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "not permitted")))
    path = tmp_path / "made/clip.mp4"
    with written_whole(path, replace=False) as aside:
        assert aside.suffix == ".mp4" and aside.parent == path.parent and not path.exists()
        aside.write_bytes(b"first")
    with pytest.raises(FileExistsError), written_whole(path, replace=False) as aside:
        aside.write_bytes(b"second")
    assert path.read_bytes() == b"first" and list(path.parent.iterdir()) == [path]
    with written_whole(path) as aside:
        aside.write_bytes(b"third")
    assert path.read_bytes() == b"third" and list(path.parent.iterdir()) == [path]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    for error, expected in ((OSError(errno.ENOSPC, "No space left on device"), UserError), (KeyError("x"), KeyError)):
        with pytest.raises(expected), written_whole(path) as aside:
            aside.write_bytes(b"half")
            raise error
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match=r"Not a directory|File exists"), written_whole(path / "below.mp4"):
        pass
