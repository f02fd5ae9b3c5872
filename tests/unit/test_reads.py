"""Unreadable samples: listed without clashes, counted, and too many of them end the run in one line."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from acceleration.distributed.mesh import view
from opensora.datasets.buckets.bucket import Bucket
from opensora.datasets.loading.reader import Batch
from opensora.datasets.table.manifest import ClipTable, TextsInMemory
from opensora.train.health.data_health import DataHealth
from opensora.utils.errors import UserError

BUCKET = Bucket("32px", 1, 32, 32, 4)


def table() -> ClipTable:
    n = 5000
    ones = np.ones(n, dtype=np.int32)
    paths = pa.chunked_array([[f"{i}.mp4" for i in range(n)]])
    return ClipTable(
        num_frames=ones, height=ones, width=ones, fps=np.full(n, np.nan), motion_score=np.zeros(n, np.float32),
        texts=TextsInMemory(paths, paths), folders=("/clips",), first_rows=np.zeros(1, np.int64),
    )  # fmt: skip


def batch(first: int, count: int, bad: tuple[int, ...] = (), weight: float = 1.0) -> Batch:
    ids = tuple(range(first, first + count))
    replaced = tuple((ids[i], ids[i] + 7, f"/clips/{ids[i]}.mp4: broken") for i in bad)
    return Batch(
        pixels=None, prompts=[], sample_ids=ids, bucket=BUCKET, fps=torch.zeros(count), epoch=0, weight=weight,
        replaced=replaced, read_s=0.5,
    )  # fmt: skip


def reads(folder: Path, share: float = 0.01, rank: int = 0, **degrees: int) -> DataHealth:
    return DataHealth(folder, table(), view(degrees, rank), share)


def test_every_unreadable_sample_is_a_line(tmp_path: Path) -> None:
    watch = reads(tmp_path / "unreadable")
    watch.note(batch(0, 4), 0)
    assert not (tmp_path / "unreadable").exists()
    watch.note(batch(4, 4, (1, 3)), 1)
    watch.note(batch(4, 4, (1, 3), weight=0.0), 1)  # another process has it too
    watch.note(batch(8, 4, (0,)), 2)
    lines = [json.loads(line) for line in (tmp_path / "unreadable/rank-00000.jsonl").read_text().splitlines()]
    assert [(line["step"], line["sample"], line["substitute"]) for line in lines] == [
        (1, 5, 12),
        (1, 7, 14),
        (2, 8, 15),
    ]
    assert lines[0]["path"] == "/clips/5.mp4" and lines[0]["why"] == "/clips/5.mp4: broken"


def test_places_write_files_of_their_own_and_peers_nothing(tmp_path: Path) -> None:
    for rank in range(4):
        reads(tmp_path, rank=rank, shard=2, ulysses=2).note(batch(0, 2, (0,)), 0)
    found = {path.name: len(path.read_text().splitlines()) for path in tmp_path.iterdir()}
    assert found == {"rank-00000.jsonl": 1, "rank-00001.jsonl": 1}


@pytest.mark.parametrize("share, allowed", [(0.01, 10), (0.0, 0), (0.05, 50)])
def test_more_than_the_share_of_the_last_thousand_ends_the_run(tmp_path: Path, share: float, allowed: int) -> None:
    watch = reads(tmp_path, share)
    for i in range(3 * allowed):  # never more than ``allowed`` among 1000, for ever
        watch.note(batch(0, 1000 // max(allowed, 1), (0,)), i)
    with pytest.raises(
        UserError, match=rf"^data.max_bad_share={share:g}: {allowed + 1} of the last \d+ samples"
    ) as error:
        for i in range(allowed + 1):
            watch.note(batch(0, 2, (1,)), 100 + i)
    assert "\n" not in str(error.value) and "/clips/1.mp4: broken" in str(error.value)
    assert str(tmp_path / "rank-00000.jsonl") in str(error.value)


def test_a_hundred_in_a_row_end_the_run_whatever_the_share(tmp_path: Path) -> None:
    watch = reads(tmp_path, 1.0)
    for step in range(99):
        watch.note(batch(step, 1, (0,)), step)
    watch.note(batch(99, 1), 99)
    with pytest.raises(UserError, match="100 samples in a row could not be read"):
        for step in range(100):
            watch.note(batch(step, 1, (0,)), 100 + step)
    assert step == 99
