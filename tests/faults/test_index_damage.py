"""A damaged index of a clip table is noticed, built anew with one line, and never used; a place that cannot be written
is one line. Damage of checkpoints is the matter of test_damage.py."""

import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from opensora.datasets import DataConfig
from opensora.datasets.buckets import shape_class_index
from opensora.datasets.buckets.bucket import Bucket, BucketTable
from opensora.datasets.buckets.shape_class_index import index_shape_classes
from opensora.datasets.loading import feature_store
from opensora.datasets.plan.batch_plan import BatchPlan, MicroBatch
from opensora.datasets.table import index
from opensora.datasets.table.checksums import Damaged, Sealed
from opensora.datasets.table.index import IndexedTable, open_index, open_table
from opensora.datasets.table.manifest import ClipTable, read_table
from opensora.utils.errors import UserError
from tests.faults.conftest import Tally
from tests.faults.test_bad_config import TABLE, config, line_of
from tests.unit.test_bucket import BUCKETS
from tests.unit.test_clip_index import make_tables, same

__all__ = ["config"]  # a fixture
CFG = DataConfig(buckets=BUCKETS, micro_batches=2, unused_rows="report")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_PART_BYTES", 1 << 12)
    monkeypatch.setattr(index, "BATCH_ROWS", 64)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was announced about damage."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "damaged" in record.getMessage():
                lines.append(record.getMessage())

    handler = Handler()
    logger = logging.getLogger("opensora")
    logger.addHandler(handler)
    monkeypatch.setattr(logger, "level", logging.INFO)
    yield lines
    logger.removeHandler(handler)


class Lab:
    """An index of 360 rows in several parts, sorted into buckets; what it should hold, and what it does."""

    def __init__(self, folder: Path) -> None:
        self.paths = [str(path) for path in make_tables(folder, rows=120)]
        self.truth = read_table(self.paths)
        self.steps = self.use(self.truth)
        self.index = self.open().index
        index_shape_classes(self.open(), BucketTable(CFG, 16))
        self.files = sorted(file for file in self.index.rglob("*") if file.is_file() and file.suffix != ".lock")
        self.whole = {file: file.read_bytes() for file in self.files}

    def open(self) -> IndexedTable:
        open_index.cache_clear()
        return open_table(self.paths)

    @staticmethod
    def use(table: ClipTable) -> list[object]:
        """All samples of an epoch, in no order."""
        plan = BatchPlan(table, CFG, 16, 0)
        first = plan.step(0)
        return [*first, *plan._epoch(0).assigned().tolist()]

    def check(self, table: IndexedTable) -> None:
        """Raises: AssertionError: a value is not that of the table; Damaged: it was noticed."""
        assert self.use(table) == self.steps
        table.check(0, len(table))
        assert same(table, self.truth)

    def restore(self) -> None:
        shutil.rmtree(self.index)
        for file, content in self.whole.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


def flip(draw: random.Random) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        raw = bytearray(file.read_bytes())
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        file.write_bytes(raw)

    return change


def flips(lab: Lab, said: list[str], draw: random.Random, count: int) -> tuple[int, list[str]]:
    """(noticed, what was wrong) of flipped bits, files in turn; every one has to be announced once and mended."""
    noticed, wrong = 0, []
    for number in range(count):
        file = lab.files[number % len(lab.files)]
        flip(draw)(file)
        said.clear()
        lab.check(lab.open())
        noticed += len(said) == 1
        if len(said) != 1 or f"damaged ({file.name}" not in said[0] or "\n" in said[0]:
            wrong.append(f"{file.name}: {said}")
        if number % 2:  # what was built anew is as good to damage as what was there
            lab.restore()
    return noticed, wrong


def test_flipped_bits_are_noticed_when_a_table_is_opened(tmp_path: Path, said: list[str], tally: Tally) -> None:
    lab = Lab(tmp_path)
    assert len(lab.files) > 12 and not said
    count = 40
    noticed, wrong = flips(lab, said, random.Random(0), count)
    tally("clip index: a flipped bit is noticed, and the index built anew with one line", noticed, count)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_flipped_bits(tmp_path: Path, said: list[str], tally: Tally) -> None:
    noticed, wrong = flips(Lab(tmp_path), said, random.Random(1), 250)
    tally("clip index: a flipped bit is noticed, and the index built anew with one line", noticed, 250)
    assert not wrong, "\n".join(wrong)


def test_flipped_bits_are_noticed_in_use_where_an_index_is_too_large_to_be_read_first(
    tmp_path: Path, said: list[str], tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "VERIFIED_BYTES", 0)
    monkeypatch.setattr(shape_class_index, "VERIFIED_BYTES", 0)
    lab, draw, noticed, count = Lab(tmp_path), random.Random(2), 0, 40
    for number in range(count):
        file = lab.files[number % len(lab.files)]
        flip(draw)(file)
        said.clear()
        try:
            lab.check(lab.open())
        except Damaged as error:  # while it is used: the next run builds it anew
            assert "start again" in str(error) and "\n" not in str(error)
            assert file.name in str(error)
            lab.check(lab.open())
        noticed += len(said) == 1
        lab.restore()
    tally("clip index: a flipped bit is noticed before a value of it is used", noticed, count)
    assert noticed == count


def remove(file: Path) -> None:
    file.unlink()


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def shorter(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def longer(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"\0")


def zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def words(text: str) -> Callable[[Path], None]:
    return lambda file: file.write_text(text) and None


DAMAGES = (remove, folder, pipe, dangling, shorter, longer, zeros, empty, words("{}"), words("[" * 5000), words('"x"'))


@pytest.mark.parametrize("change", DAMAGES)
def test_every_file_and_every_damage(
    change: Callable[[Path], None], tmp_path: Path, said: list[str], tally: Tally
) -> None:
    lab = Lab(tmp_path)
    chosen = [*lab.index.glob("*.json"), *lab.index.glob("*.bin"), lab.index / "text-00000.arrow"]
    chosen += lab.index.glob("kinds-*/*.*")
    for file in chosen:
        change(file)
        said.clear()
        lab.check(lab.open())
        assert len(said) == 1 and "building it anew" in said[0] and "\n" not in said[0], (file, said)
        lab.restore()
    row = "clip index: files missing, cut, emptied, replaced by folders, pipes, links or other text"
    tally(row, len(chosen), len(chosen))


def test_an_index_of_another_format_or_a_file_in_its_place(tmp_path: Path, said: list[str]) -> None:
    lab = Lab(tmp_path)
    for content in ('{"format": 1, "sources": []}', '{"format": 3}'):
        (lab.index / "index.json").write_text(content)
        said.clear()
        lab.check(lab.open())
        assert len(said) == 1
    shutil.rmtree(lab.index)
    lab.index.write_text("a file")
    lab.check(lab.open())
    assert len(said) == 2 and "not a regular file" not in said[1]


def test_a_description_of_two_gigabytes_is_not_read(tmp_path: Path, said: list[str]) -> None:
    """Holes at its end cost no space and, whole in memory, 2 GB and ten seconds."""
    lab = Lab(tmp_path)
    os.truncate(lab.index / "index.json", 2**31)
    lab.check(lab.open())
    assert "index.json: more than 268435456 bytes" in said[-1]


def test_who_has_it_open_keeps_it(tmp_path: Path, said: list[str]) -> None:
    lab = Lab(tmp_path)
    before = lab.open()
    empty(lab.index / "index.json")
    lab.check(lab.open())
    assert len(said) == 1
    lab.check(before)


def test_a_value_that_is_damaged_later_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits may flip after a run has begun, also in a large index that was not read whole."""
    monkeypatch.setattr(index, "VERIFIED_BYTES", 0)
    lab = Lab(tmp_path)
    table = lab.open()
    with (lab.index / "num_frames.bin").open("r+b") as file:
        file.write(b"\xff")
    assert np.array_equal(table.num_frames[1:], lab.truth.num_frames[1:])  # nobody has looked
    with pytest.raises(Damaged, match=r"num_frames\.bin: bytes 0 to .* are not those that were written; start again"):
        table.check(0, 1)
    with pytest.raises(Damaged):
        Sealed(lab.index)


def test_a_table_in_a_place_that_cannot_be_written(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    place = config.parent / "d"
    place.mkdir()
    (place / "t.csv").write_text(TABLE)
    real = Path.mkdir

    def mkdir(path: Path, *args: object, **options: object) -> None:
        if path.name == index.FOLDER:
            raise OSError(30, "Read-only file system", str(path))
        real(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", mkdir)
    line = line_of([str(config), f"data.table={place}/t.csv"], 2, capsys, monkeypatch)
    wanted = f"error: data.index: {place}/.clip_index cannot be written (Read-only file system), set data.index"
    assert line.strip() == wanted
    tally("clip index: a place that cannot be written is one line", 1, 1)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a file system")
def test_a_table_on_a_read_only_file_system(tmp_path: Path) -> None:
    place = tmp_path / "d"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        table = Path(make_tables(place, rows=20, files=1)[0])
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        with pytest.raises(UserError, match=r"data\.index: .*\.clip_index cannot be written \(Read-only"):
            open_table(str(table))
        assert len(open_table(str(table), index=str(tmp_path / "elsewhere"))) == 20
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a file system")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    place = tmp_path / "full"
    place.mkdir()
    table = make_tables(tmp_path, rows=5000, files=1)[0]
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        with pytest.raises(UserError, match=r"data\.index: .* cannot be written \(.*No space left.*\), set"):
            open_table(str(table), index=str(place / "i"))
    finally:
        subprocess.run(["umount", place], check=True)


def feature_folder(folder: Path) -> Path:
    """Features of four samples; as precompute leaves them."""
    bucket = Bucket("64px", 1, 64, 64, 2)
    parts = []
    for first in (0, 2):
        tensors = {"latents": torch.randn(2, 4, 1, 8, 8), "txt": torch.randn(2, 3, 8), "y_vec": torch.randn(2, 8)}
        parts.append((MicroBatch(bucket, (first, first + 1), 0), feature_store.Features(**tensors)))
    feature_store.write_shard(folder, 0, parts, "hash")
    feature_store.write_null(folder, {"txt": torch.randn(1, 3, 8), "y_vec": torch.randn(1, 8)}, "hash")
    feature_store.write_index(folder, 1, 1, {"seed": 0}, "hash")
    return folder


def test_small_files_of_stored_features(tmp_path: Path, tally: Tally) -> None:
    """Every flipped bit is refused in one line that says what to do, and precompute's last step mends it."""
    folder = feature_folder(tmp_path)
    batch = MicroBatch(Bucket("64px", 1, 64, 64, 2), (1, 2), 0)
    truth = feature_store.FeatureStore(folder).read(batch).latents
    names, draw, noticed, count = ("manifest.json", "index.arrow", "null.safetensors"), random.Random(3), 0, 150
    whole = {name: (folder / name).read_bytes() for name in names}
    changes = [*[flip(draw)] * (count - len(DAMAGES)), *DAMAGES]
    for number, change in enumerate(changes):
        name = names[number % 3]
        change(folder / name)
        try:
            store = feature_store.FeatureStore(folder)
            assert torch.equal(store.read(batch).latents, truth)
        except UserError as error:
            assert "\n" not in str(error) and "precompute" in str(error)
            noticed += 1
        if name == "null.safetensors":
            assert not feature_store.has_null(folder, "hash")
        remedy(folder / name, whole[name])
    assert torch.equal(feature_store.FeatureStore(folder).read(batch).latents, truth)
    (folder / "manifest.json").write_text("{}")
    feature_store.write_index(folder, 1, 1, {"seed": 0}, "hash")
    assert torch.equal(feature_store.FeatureStore(folder).read(batch).latents, truth)
    tally("stored features: damage of manifest, index and empty prompt is refused in one line", noticed, count)
    assert noticed == count


def remedy(file: Path, content: bytes) -> None:
    if file.is_dir():
        file.rmdir()
    elif os.path.lexists(file):
        file.unlink()
    file.write_bytes(content)
