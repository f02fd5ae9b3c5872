"""data_pipeline.journal: what a crash leaves of it, byte by byte."""

import random
from pathlib import Path

import pyarrow as pa
import pytest

from data_pipeline.journal import Journal, ShardTaken
from data_pipeline.outputs import Done

SCHEMA = pa.schema([("pts", pa.list_(pa.int64())), ("text", pa.string())])


def rows(number: int) -> pa.Table:
    return pa.table({"pts": [[number, number + 1]], "text": [f"row {number}"]}, schema=SCHEMA)


def write(path: Path, count: int) -> list[int]:
    """Sizes of the file after each record."""
    journal, sizes = Journal(path), []
    for number in range(count):
        journal.add_lost(f"key {number}", "its process was killed by SIGKILL")
        journal.add(Done(f"{number}.mp4", f"key {number}", 1), rows(number))
        sizes.append(path.stat().st_size)
    journal.add_lost("key x", "its process was killed by SIGSEGV")
    journal.close()
    return sizes


def read(path: Path) -> dict[str, object]:
    journal = Journal(path)
    found = {key: (done, table.to_pylist()) for key, (done, table) in journal.done.items()}
    journal.close()
    return found


def expected(count: int) -> dict[str, object]:
    return {f"key {i}": (Done(f"{i}.mp4", f"key {i}", 1), rows(i).to_pylist()) for i in range(count)}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "journal", 3)
    journal = Journal(tmp_path / "journal")
    assert journal.lost == {"key x": ["its process was killed by SIGSEGV"]}  # of the others a record came after it
    assert journal.add_lost("key x", "again") == ["its process was killed by SIGSEGV", "again"]
    journal.close()
    assert read(tmp_path / "journal") == expected(3)


def test_every_cut_and_every_damaged_region_costs_only_what_is_behind_it(tmp_path: Path) -> None:
    path, draw = tmp_path / "journal", random.Random(5)
    sizes = write(path, 3)
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        whole = sum(size <= at for size in sizes)
        for damaged in (
            content[:at],
            content[:at] + bytes(3000),  # what a power cut can leave
            content[:at] + bytes([content[at] ^ draw.randint(1, 255)]) + content[at + 1 :],
        ):
            path.write_bytes(damaged)
            found = read(path)
            assert expected(whole).items() <= found.items() and found.items() <= expected(3).items()
            journal = Journal(path)  # and it can be written on
            journal.add(Done("new.mp4", "new", 1), rows(9))
            journal.close()
            assert read(path) == {**found, "new": (Done("new.mp4", "new", 1), rows(9).to_pylist())}


def test_nobody_else_writes_it(tmp_path: Path) -> None:
    first = Journal(tmp_path / "journal")
    with pytest.raises(ShardTaken):
        Journal(tmp_path / "journal")
    first.close()
    Journal(tmp_path / "journal").close()


def test_one_that_is_removed_before_it_is_locked_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two processes would hold locks on two files of one name."""
    path, locked = tmp_path / "journal", []
    lock = Journal._lock

    def remove_first(journal: Journal) -> None:
        if not locked:
            path.unlink()
        locked.append(lock(journal))

    monkeypatch.setattr(Journal, "_lock", remove_first)
    journal = Journal(path)
    assert len(locked) == 2
    journal.add(Done("a.mp4", "a", 1), rows(0))
    journal.close()
    assert set(read(path)) == {"a"}
