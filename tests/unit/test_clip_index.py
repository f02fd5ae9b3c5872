"""The index on disk: the same values as the table, built once, by any number of threads and processes."""

import multiprocessing
import multiprocessing.synchronize
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as papq
import pytest

from opensora.datasets import DataConfig
from opensora.datasets.buckets.bucket import BucketTable
from opensora.datasets.buckets.shape_class_index import index_shape_classes
from opensora.datasets.plan.batch_plan import BatchPlan
from opensora.datasets.table import index
from opensora.datasets.table.build_once import build_once
from opensora.datasets.table.index import index_of, open_index, open_table
from opensora.datasets.table.manifest import COLUMNS, ClipTable, read_table
from opensora.utils.errors import UserError
from tests.unit.test_bucket import BUCKETS


def make_tables(folder: Path, rows: int = 500, files: int = 3) -> list[Path]:
    """A csv, and parquet files with several row groups; captions of all sorts."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(files):
        image = rng.random(rows) < 0.2
        columns = {
            "path": [f"{number}/{i}.mp4" for i in range(rows)],
            "text": [f'clip {i}, "quoted"\nänd {"long " * (i % 7)}' for i in range(rows)],
            "num_frames": np.where(image, 1, rng.integers(2, 300, rows)),
            "height": rng.integers(100, 1200, rows),
            "width": rng.integers(100, 1200, rows),
            "fps": pa.array(np.where(image, np.nan, rng.choice([24.0, 29.97, 60.0], rows)), from_pandas=True),
            "motion_score": pa.array(np.where(rng.random(rows) < 0.5, np.nan, rng.random(rows)), from_pandas=True),
        }
        sub = folder / f"shard{number}"
        sub.mkdir(parents=True)
        if number == 0:
            pacsv.write_csv(pa.table(columns), sub / "t.csv")
            paths.append(sub / "t.csv")
        else:
            papq.write_table(pa.table(columns), sub / "t.parquet", row_group_size=97)
            paths.append(sub / "t.parquet")
    return paths


def same(a: ClipTable, b: ClipTable) -> bool:
    return (
        len(a) == len(b)
        and all(np.array_equal(getattr(a, name), getattr(b, name), equal_nan=True) for name in COLUMNS)
        and all(a.path(i) == b.path(i) and a.caption(i) == b.caption(i) for i in range(len(a)))
    )


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files this small are cut into parts, and texts into batches, as large ones are."""
    monkeypatch.setattr(index, "_PART_BYTES", 1 << 12)
    monkeypatch.setattr(index, "BATCH_ROWS", 64)


def test_an_index_is_the_table(tmp_path: Path) -> None:
    paths = make_tables(tmp_path)
    table = open_table([str(path) for path in paths])
    assert same(table, read_table([str(path) for path in paths]))
    assert table.path(0) == str(tmp_path / "shard0" / "0" / "0.mp4")
    assert table.path(1499) == str(tmp_path / "shard2" / "2" / "499.mp4")
    assert open_table([str(path) for path in paths], root="/data").path(1499) == "/data/2/499.mp4"
    assert len(list(table.index.glob("text-*.arrow"))) > 3  # the build really had parts
    assert sum((table.index / f"{name}.bin").stat().st_size for name in COLUMNS) == 20 * 1500
    assert isinstance(table.num_frames, np.memmap)
    for row in (-1, 1500):
        with pytest.raises(IndexError):
            table.caption(row)


def test_the_content_hash_is_that_of_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_tables(tmp_path)
    content = open_index(index_of(paths, tmp_path / "one", threads=1)).content
    assert open_index(index_of(paths, tmp_path / "many", threads=5)).content == content
    monkeypatch.setattr(index, "_PART_BYTES", 1 << 26)
    assert open_index(index_of(paths, tmp_path / "whole")).content == content
    os.utime(paths[0])  # looks new, is not
    assert open_index(index_of(paths, tmp_path / "touched")).content == content
    text = paths[0].read_text(encoding="utf-8")
    for change in (text.replace("clip 7,", "clip 8,", 1), text.replace("29.97", "29.98", 1)):
        paths[0].write_text(change, encoding="utf-8")
        assert open_index(index_of(paths, tmp_path / "changed")).content != content
    paths[0].write_text(text, encoding="utf-8")
    assert open_index(index_of(paths[::-1], tmp_path / "order")).content != content


def test_it_is_built_once_and_anew_when_the_table_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(make_tables(tmp_path, files=1)[0])
    builds: list[Path] = []
    real = index._build
    monkeypatch.setattr(index, "_build", lambda *args: builds.append(args[0]) or real(*args))
    first = open_table(path)
    open_index.cache_clear()
    assert same(open_table(path), first) and len(builds) == 1
    with Path(path).open("a", encoding="utf-8") as file:
        file.write('new.mp4,"more",9,480,640,24,\n')
    second = open_table(path)
    assert len(builds) == 2 and len(second) == len(first) + 1 and second.caption(500) == "more"
    assert first.caption(499) == second.caption(499)  # who has the old one open keeps it
    left = {entry.name for entry in first.index.parent.iterdir() if not entry.name.endswith(".lock")}
    assert left == {first.index.name, second.index.name}


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = make_tables(tmp_path, files=2)[1]
    rows = papq.read_table(path)
    bad = rows.set_column(rows.schema.get_field_index("height"), "height", pa.array([480] * 400 + [0] * 100))
    papq.write_table(bad, path, row_group_size=97)
    with pytest.raises(UserError, match=r"row 401 and \d+ more rows: height is 0"):
        open_table(str(path))
    assert all(entry.name.endswith(".lock") for entry in (path.parent / index.FOLDER).iterdir())
    papq.write_table(rows.slice(0, 0), path)
    with pytest.raises(UserError, match="the table has no rows"):
        open_table(str(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    path = make_tables(tmp_path, files=1)[0]
    path.parent.chmod(0o555)
    with pytest.raises(UserError, match=r"data\.index"):
        open_table(str(path))
    assert len(open_table(str(path), index=str(tmp_path / "elsewhere"))) == 500


def _build_in_turn(target: Path, log: Path, start: "multiprocessing.synchronize.Event") -> None:
    def build(folder: Path) -> None:
        with log.open("a") as file:
            file.write("built\n")
        (folder / "done").touch()

    start.wait()
    assert (build_once(target, build) / "done").exists()


def test_of_many_processes_one_builds(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Event()
    target, log = tmp_path / "folder" / "built", tmp_path / "log"
    processes = [context.Process(target=_build_in_turn, args=(target, log, start)) for _ in range(6)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert log.read_text() == "built\n"


def test_workers_get_the_files_not_the_values(tmp_path: Path) -> None:
    table = open_table([str(path) for path in make_tables(tmp_path)])
    plan = BatchPlan(table, DataConfig(buckets=BUCKETS, micro_batches=2, unused_rows="report"), 16, 0)
    sent = pickle.dumps((table, plan))
    assert len(sent) < 2000
    open_index.cache_clear()
    other_table, other_plan = pickle.loads(sent)
    assert same(other_table, table)
    assert [other_plan.step(s) for s in range(20)] == [plan.step(s) for s in range(20)]


def test_an_indexed_table_has_the_plan_of_the_same_table_in_memory(tmp_path: Path) -> None:
    paths = [str(path) for path in make_tables(tmp_path)]
    cfg = DataConfig(buckets=BUCKETS, micro_batches=2, unused_rows="report")
    plans = [BatchPlan(table, cfg, 16, 0) for table in (open_table(paths), read_table(paths))]
    assert [plans[0].step(s) for s in range(30)] == [plans[1].step(s) for s in range(30)]


def test_rows_are_grouped_by_kind_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = open_table([str(path) for path in make_tables(tmp_path)])
    buckets = BucketTable(DataConfig(buckets=BUCKETS), 16)
    monkeypatch.setattr("opensora.datasets.buckets.shape_class_index._CHUNK", 101)
    groups = index_shape_classes(table, buckets)
    kind = buckets.shape_class_of(table)
    assert groups.ids.tolist() == np.argsort(kind, kind="stable").tolist()
    assert (np.diff(groups.start) == np.bincount(kind, minlength=buckets.num_shape_classes)).all()
    # Neither probabilities nor batch sizes make other kinds, other shapes do.
    keys = {
        BucketTable(DataConfig(buckets={"256px": {33: value}}), 16).shape_class_key
        for value in ([1.0, 1], [[0.5, 0.5], 7])
    }
    assert len(keys) == 1
    assert BucketTable(DataConfig(buckets={"256px": {29: [1.0, 1]}}), 16).shape_class_key not in keys
