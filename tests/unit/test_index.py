"""A folder becomes a table that ``read_table`` accepts; what is left out is listed."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.index import index_folder, main
from opensora.datasets.table.manifest import read_table
from opensora.utils.errors import UserError
from tests.unit.test_decode import MEDIA, encode, needs_media


def make_folder(folder: Path) -> None:
    (folder / "sub").mkdir(parents=True)
    encode(folder / "a.mp4", 9)
    encode(folder / "sub" / "b.mkv", 13, size=(64, 48))
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(folder / "c.png")
    encode(folder / "silent.mp4", 5)
    (folder / "broken.mp4").write_bytes(b"nothing")
    (folder / "captions.csv").write_text('path,text\na.mp4,"one, two"\nbroken.mp4,text\n', encoding="utf-8")
    (folder / "sub" / "b.txt").write_text("beside\n")
    (folder / "c.png.txt").write_text("a still")


def test_rows_captions_and_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "media")
    out = tmp_path / "table.csv"
    assert main([str(tmp_path / "media"), "--out", str(out), "--workers", "2"]) == 0
    table = read_table(str(out))
    rows = {
        Path(table.path(i)).name: (
            table.caption(i),
            *(int(c[i]) for c in (table.num_frames, table.height, table.width)),
        )
        for i in range(len(table))
    }
    assert rows == {"a.mp4": ("one, two", 9, 48, 64), "b.mkv": ("beside", 13, 64, 48), "c.png": ("a still", 1, 30, 40)}
    assert all(Path(table.path(i)).is_file() for i in range(3))
    assert table.fps[:1].tolist() == [24.0]
    with (tmp_path / "table.csv.left_out.csv").open() as file:
        left = {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}
    assert left == {"broken.mp4": "cannot be read", "silent.mp4": "no caption"}
    shown = capsys.readouterr().out
    assert "3 rows" in shown and "left out 1: cannot be read" in shown and "left out 1: no caption" in shown


def test_paths_outside_the_tables_folder_are_absolute(tmp_path: Path) -> None:
    make_folder(tmp_path / "media")
    index_folder(tmp_path / "media", tmp_path / "tables" / "t.csv", workers=1)
    first = (tmp_path / "tables" / "t.csv").read_text().splitlines()[1]
    assert first.startswith(str(tmp_path / "media" / "a.mp4"))


def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "media")
    (tmp_path / "bad.csv").write_text("file,caption\n")
    out = str(tmp_path / "t.csv")
    cases = {
        "no such folder": [str(tmp_path / "none"), "--out", out],
        "no such captions file": [str(tmp_path / "media"), "--out", out, "--captions", str(tmp_path / "none.csv")],
        "column 'path' is missing": [str(tmp_path / "media"), "--out", out, "--captions", str(tmp_path / "bad.csv")],
    }
    for words, argv in cases.items():
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no video or image"):
        index_folder(tmp_path / "empty", tmp_path / "t.csv")
    encode(tmp_path / "empty" / "a.mp4", 3)
    with pytest.raises(UserError, match=r"none of 1 files can be used \(1 no caption\)"):
        index_folder(tmp_path / "empty", tmp_path / "t.csv")


@needs_media
def test_real_clips(tmp_path: Path) -> None:
    count, left_out = index_folder(MEDIA / "clips", tmp_path / "t.csv", workers=2)
    assert (count, sum(left_out.values())) == (21, 0)
    table = read_table(str(tmp_path / "t.csv"))
    names = [Path(table.path(i)).name for i in range(21)]
    sintel = names.index("sintel_trailer_30s.mp4")
    columns = (table.num_frames, table.height, table.width, table.fps)
    assert [column[sintel] for column in columns] == [720, 480, 854, 24]
