"""Rows of a clip table that are not kept are passed over, and words about the camera reach prompts."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as papq
import pytest

from opensora.datasets.config import DataConfig
from opensora.datasets.loading.reader import BatchReader
from opensora.datasets.table.index import IndexedTable, open_table
from opensora.datasets.table.manifest import ClipTable, read_table
from opensora.inference.prompts import final_prompt
from opensora.sampling.options import SamplingOption
from opensora.utils.errors import UserError
from opensora.utils.prompt_suffix import published_suffix, with_suffix

NUMBERS = list(range(30))
KEPT = [number for number in NUMBERS if number % 3 != 1]


def rows(**more: list) -> dict[str, list]:
    """Of the rows that are not kept everything else is null or senseless."""
    keep = [number in KEPT for number in NUMBERS]
    return {
        "path": [f"{number}.mp4" if kept else None for number, kept in zip(NUMBERS, keep, strict=True)],
        "text": [f"Text {number}" if kept else "" for number, kept in zip(NUMBERS, keep, strict=True)],
        "num_frames": [10 + number if kept else None for number, kept in zip(NUMBERS, keep, strict=True)],
        "height": [64 if kept else -1 for kept in keep],
        "width": [96 if kept else 0 for kept in keep],
        "fps": [24.0 if kept else None for kept in keep],
        "motion_score": [float(number) for number in NUMBERS],
        "camera_motion": ["pan left" if number % 2 else None for number in NUMBERS],
        "keep": keep,
        **more,
    }


def write(folder: Path, kind: str, **more: list) -> Path:
    path = folder / f"clips.{kind}"
    table = pa.table(rows(**more))
    if kind == "csv":
        pacsv.write_csv(table, path)
    else:
        papq.write_table(table, path, row_group_size=7)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("indexed", [True, False])
def test_sample_ids_count_what_is_kept(tmp_path: Path, kind: str, indexed: bool) -> None:
    path = write(tmp_path, kind)
    table: ClipTable = open_table(str(path)) if indexed else read_table(str(path))
    assert len(table) == len(KEPT)
    assert table.num_frames.tolist() == [10 + number for number in KEPT]
    assert table.motion_score.tolist() == [float(number) for number in KEPT]
    for sample_id, number in enumerate(KEPT):
        assert table.path(sample_id) == str(tmp_path / f"{number}.mp4")
        assert table.caption(sample_id) == f"Text {number}"
        assert table.camera_motion(sample_id) == ("pan left" if number % 2 else "")


def content(path: Path) -> str:
    table = open_table(str(path))
    assert isinstance(table, IndexedTable)
    return table.content


def test_a_table_is_what_is_kept_of_it(tmp_path: Path) -> None:
    """Whether a row is there and not kept, or not there, is the same to a run; and rows of several files count on."""
    table = pa.table(rows())
    kept = table.filter(table["keep"])
    places = {name: tmp_path / name for name in ("all", "kept", "plain", "camera")}
    for name, part in {
        "all": table,
        "kept": kept,
        "plain": kept.drop_columns(["keep", "camera_motion"]),
        "camera": kept.drop_columns(["keep"]),
    }.items():
        places[name].mkdir()
        papq.write_table(part, places[name] / "clips.parquet")
    found = {name: content(place / "clips.parquet") for name, place in places.items()}
    assert found["all"] == found["kept"] == found["camera"] != found["plain"]
    files = [str(places[name] / "clips.parquet") for name in ("all", "plain")]
    both = open_table(files, index=str(tmp_path))
    assert len(both) == 2 * len(KEPT) and both.path(len(KEPT)) == str(places["plain"] / "0.mp4")
    assert both.camera_motion(KEPT.index(3)) == "pan left" and both.camera_motion(len(KEPT) + KEPT.index(3)) == ""
    joined = read_table(files)
    assert [joined.camera_motion(i) for i in range(len(joined))] == [both.camera_motion(i) for i in range(len(both))]


def test_a_table_without_the_columns_is_hashed_as_it_always_was(tmp_path: Path) -> None:
    """Runs that are resumed know their table by this."""
    columns = {"path": ["a.mp4", "b.mp4"], "text": ["A", "B"], "num_frames": [8, 9], "height": [64, 64]}
    columns |= {"width": [96, 96], "fps": [24.0, 12.5]}
    papq.write_table(pa.table(columns), tmp_path / "clips.parquet")
    assert content(tmp_path / "clips.parquet") == "1e5208e08377b0b1a85d16cf16e6e3a0"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_faults_name_the_row_of_the_file(tmp_path: Path, kind: str) -> None:
    frames = rows()["num_frames"]
    frames[26] = 0
    path = write(tmp_path, kind, num_frames=frames)
    for read in (open_table, read_table):
        with pytest.raises(UserError, match=r"row 27: num_frames is '?0'?, it must be an integer >= 1"):
            read(str(path))


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["true", "False", " TRUE "], [0, 2]),
        (["1", "0", "1"], [0, 2]),
        ([1, 0, 0], [0]),
        ([True, True, False], [0, 1]),
    ],
)
def test_how_keep_may_be_written(tmp_path: Path, words: list, kept: list[int]) -> None:
    table = {name: values[:3] for name, values in rows(path=["a", "b", "c"], text=["A", "B", "C"]).items()}
    table |= {"num_frames": [8] * 3, "height": [8] * 3, "width": [8] * 3, "fps": [8.0] * 3, "keep": words}
    papq.write_table(pa.table(table), tmp_path / "t.parquet")
    found = read_table(str(tmp_path / "t.parquet"))
    assert [found.caption(i) for i in range(len(found))] == ["ABC"[number] for number in kept]


@pytest.mark.parametrize("words", [["yes", "no", "yes"], [1, 2, 0], [True, None, True], [1.0, 0.0, 1.0]])
def test_what_keep_may_not_be(tmp_path: Path, words: list) -> None:
    table = {name: values[:3] for name, values in rows(keep=words * 10).items()}
    papq.write_table(pa.table(table), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="keep"):
        read_table(str(tmp_path / "t.parquet"))


def test_a_table_of_which_nothing_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", keep=[False] * len(NUMBERS))
    for read in (open_table, read_table):
        with pytest.raises(UserError, match="the table has no rows, put at least one clip in it"):
            read(str(path))


def test_prompts_of_training_say_how_the_camera_moves(tmp_path: Path) -> None:
    table = open_table(str(write(tmp_path, "parquet")))
    for told in (True, False):
        reader: Any = object.__new__(BatchReader)
        reader._table, reader._cfg = table, DataConfig(table="x", prompt_suffix=told)
        prompts = [reader._prompt(KEPT.index(number), 24.0) for number in (2, 3)]
        if told:
            assert prompts == [
                "Text 2 24 FPS. 2 motion score.",
                "Text 3 24 FPS. 3 motion score. camera motion: pan left.",
            ]
        else:
            assert prompts == ["Text 2", "Text 3"]


def test_prompts_of_sampling_say_the_same() -> None:
    option = SamplingOption(fps=24.0, motion_score=3, camera_motion="pan left")
    assert final_prompt("Text", option, suffix=True) == with_suffix("Text", 24.0, 3, "pan left")
    assert final_prompt("Text", option, suffix=False) == "Text"
    assert final_prompt("Text", SamplingOption(fps=24.0), suffix=True) == "Text 24 FPS. 4 motion score."
    assert published_suffix("A cat", 24, 4, "tilt up") == "A cat. 24 FPS. 4 motion score. camera motion: tilt up."
    assert with_suffix("A cat", None, None, "") == "A cat"
    with pytest.raises(ValueError, match="camera_motion=' ': must be a text, or null"):
        SamplingOption(camera_motion=" ")
