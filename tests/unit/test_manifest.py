"""Reading clip tables: values, paths, and one clear line per mistake."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as papq
import pytest

from opensora.datasets.table.manifest import read_table
from opensora.utils.errors import UserError

ROWS = {
    "path": ["a.mp4", "/abs/b.mp4", "sub/c.png"],
    "text": ["a red circle, moving", 'say "hi"\nand more', "ein Übergang"],
    "num_frames": [33, 129, 1],
    "height": [480, 720, 512],
    "width": [640, 1280, 384],
    "aspect_ratio": [0.75, 0.5625, 1.3333],
    "resolution": [307200, 921600, 196608],
    "fps": [24.0, 29.97, None],
}


def write(table_path: Path, /, **changes: list | None) -> str:
    columns = {name: values for name, values in (ROWS | changes).items() if values is not None}
    table = pa.table(columns)
    if table_path.suffix == ".csv":
        pacsv.write_csv(table, table_path)
    else:
        papq.write_table(table, table_path)
    return str(table_path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_values_and_paths(tmp_path: Path, suffix: str) -> None:
    table = read_table(write(tmp_path / f"t{suffix}"))
    assert len(table) == 3
    assert table.num_frames.tolist() == [33, 129, 1] and table.num_frames.dtype == np.int32
    assert table.fps[:2].tolist() == [24.0, 29.97] and np.isnan(table.fps[2])
    assert table.is_image.tolist() == [False, False, True]
    assert table.resolution.tolist() == ROWS["resolution"]
    assert [table.caption(i) for i in range(3)] == ROWS["text"]
    assert table.path(0) == str(tmp_path / "a.mp4")
    assert table.path(1) == "/abs/b.mp4"
    assert np.isnan(table.motion_score).all()


def test_root_and_optional_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", aspect_ratio=None, resolution=None, motion_score=[1.5, None, None])
    table = read_table(path, root="/data")
    assert table.path(2) == "/data/sub/c.png"
    assert table.aspect_ratio.tolist() == pytest.approx([0.75, 0.5625, 512 / 384])
    assert table.motion_score[0] == 1.5 and np.isnan(table.motion_score[1])


def test_several_files_are_one_table_each_with_its_folder(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "t.parquet")
    by_glob = read_table(str(tmp_path / "*" / "t.parquet"))
    by_list = read_table([str(tmp_path / "x" / "t.parquet"), str(tmp_path / "y" / "t.parquet")])
    for table in (by_glob, by_list):
        assert len(table) == 6
        assert table.path(0) == str(tmp_path / "x" / "a.mp4")
        assert table.path(3) == str(tmp_path / "y" / "a.mp4")


def test_a_glob_passes_over_what_was_left_out(tmp_path: Path) -> None:
    """``data_pipeline.index --out a.csv`` writes a.csv.left_out.csv beside it."""
    header, row = "path,text,num_frames,height,width,fps\n", "a.mp4,a cat,20,96,128,24\n"
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text(header + row)
        (tmp_path / f"{name}.left_out.csv").write_text("path,reason,detail\n")
    assert len(read_table(str(tmp_path / "*.csv"))) == 2


@pytest.mark.parametrize(
    "row", ["a.mp4,a cat, sits,20,96,128,24\n", 'a.mp4,"a cat,20,96,128,24\n' + "a.mp4,b,20,9,9,24\n"]
)
def test_rows_of_other_lengths_say_what_to_do(row: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"path,text,num_frames,height,width,fps\n{row}")
    with pytest.raises(UserError, match="put text that holds a comma or a quote in quotes"):
        read_table(str(tmp_path / "t.csv"))


def test_counts_written_as_floats_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("path,text,num_frames,height,width,fps\na.mp4,hello,33.0,480,640,24\n", encoding="utf-8-sig")
    assert read_table(str(path)).num_frames.tolist() == [33]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_frames": None, "frames": [1, 2, 3]}, ["'num_frames' is missing", "frames", "rename 'frames'"]),
        ({"text": None}, ["'text' is missing", "path, num_frames", "add 'text'"]),
        ({"text": ["a", None, "c"]}, ["row 2", "text is empty", "caption"]),
        ({"text": ["a", "b", "nan"]}, ["row 3", "caption"]),
        ({"height": [480, 0, 512]}, ["row 2", "height is", "integer >= 1"]),
        ({"width": [480.5, 1, 512]}, ["row 1", "width is", "integer >= 1"]),
        ({"num_frames": [33, None, 1]}, ["row 2", "num_frames is empty"]),
        ({"fps": [24.0, None, None]}, ["row 2", "fps is empty", "only for images"]),
        ({"fps": [24.0, 0.0, None]}, ["row 2", "fps is"]),
        ({"path": [], "text": [], "num_frames": [], "height": [], "width": [], "fps": []}, ["no rows"]),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_mistakes_name_file_column_and_row(tmp_path: Path, suffix: str, changes: dict, words: list[str]) -> None:
    if changes.get("path") == []:
        changes = changes | {"aspect_ratio": None, "resolution": None}
    path = write(tmp_path / f"t{suffix}", **changes)
    with pytest.raises(UserError) as error:
        read_table(path)
    message = str(error.value)
    assert path in message and "\n" not in message
    for word in words:
        assert word in message


def test_a_word_where_a_number_belongs(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", height=["480", "tall", "512"])
    with pytest.raises(UserError, match="row 2: height is 'tall'"):
        read_table(path)
    path = write(tmp_path / "t.parquet", height=[[1], [2], [3]])
    with pytest.raises(UserError, match="'height' holds list"):
        read_table(path)


def test_files_that_are_not_there_or_not_tables(tmp_path: Path) -> None:
    write(tmp_path / "train.csv")
    with pytest.raises(UserError, match=r"no such file, did you mean .*train\.csv"):
        read_table(str(tmp_path / "trian.csv"))
    with pytest.raises(UserError, match="no folder"):
        read_table(str(tmp_path / "nowhere" / "t.csv"))
    with pytest.raises(UserError, match=rf"^data\.table={tmp_path}: is a folder; give a csv or parquet file in it"):
        read_table(str(tmp_path))
    with pytest.raises(UserError, match=r"^data\.table=/dev/null: is a pipe or device; give"):
        read_table("/dev/null")
    with pytest.raises(UserError, match=r"data\.table is empty"):
        read_table("")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UserError, match="the file is empty"):
        read_table(str(tmp_path / "empty.csv"))
    (tmp_path / "t.parquet").write_text("not parquet")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read_table(str(tmp_path / "t.parquet"))
    (tmp_path / "wide.csv").write_bytes((tmp_path / "train.csv").read_text().encode("utf-16"))
    with pytest.raises(UserError, match=r"wide\.csv"):
        read_table(str(tmp_path / "wide.csv"))
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(UserError, match=r"must be \.csv and \.parquet"):
        read_table(str(tmp_path / "t.txt"))


def test_reading_tables_and_clips_does_not_load_torch() -> None:
    code = (
        "import sys, opensora.datasets.table.manifest, opensora.datasets.decode.api; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_parquet_whose_texts_are_not_utf8(tmp_path: Path) -> None:
    columns = {"path": ["abcd.mp4"], "text": ["x"], "num_frames": [9], "height": [32], "width": [32], "fps": [8.0]}
    papq.write_table(pa.table(columns), tmp_path / "t.parquet", compression="none", use_dictionary=False)
    raw = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(raw.replace(b"abcd.mp4", b"ab\xf0d.mp4"))
    with pytest.raises(UserError, match=r"t\.parquet: cannot be read as parquet \(.*UTF8.*\), save it again as UTF-8"):
        read_table(str(tmp_path / "t.parquet"))


def test_captions_of_several_lines_and_quotes_are_rows_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = 'a.mp4,"a cat,\non a ""mat""",9,32,32,8\r\n\r\nb.mp4,a 5" disk,9,32,32,8'
    path.write_text(f"path,text,num_frames,height,width,fps\n{rows}", newline="")
    table = read_table(str(path))
    assert [table.caption(i) for i in range(2)] == ['a cat,\non a "mat"', 'a 5" disk']
