"""Assignment by columns against the same rules written for one row, and what the report says."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from opensora.datasets import DataConfig
from opensora.datasets.aspect import area_of, training_sizes
from opensora.datasets.bucket import (
    NO_IMAGE_ROW,
    NOT_DRAWN,
    TOO_SHORT,
    TOO_SMALL,
    BucketTable,
    frame_interval,
    sampled_fps,
)
from opensora.datasets.draws import uniform
from opensora.datasets.manifest import ClipTable
from opensora.utils.errors import UserError

BUCKETS: dict[str, dict[int, Any]] = {
    "256px": {1: [1.0, 9], 5: [0.9, 8], 33: [[0.7, 0.4], 4], 65: [[0.8, 0.5], 2]},
    "768px": {1: [0.5, 4], 17: [[0.6, 0.3], 2], 129: [[0.9, 0.25], 1]},
    "480p_ar16:9": {33: [0.3, 2]},
}


def clip_table(num_frames: list[int], height: list[int], width: list[int], fps: list[float]) -> ClipTable:
    count = len(num_frames)
    names = pa.chunked_array([[f"{i}.mp4" for i in range(count)]])
    return ClipTable(
        num_frames=np.array(num_frames, np.int32),
        height=np.array(height, np.int32),
        width=np.array(width, np.int32),
        fps=np.array(fps, np.float64),
        motion_score=np.full(count, np.nan, np.float32),
        paths=names,
        captions=names,
        folders=("",),
        folder=np.zeros(count, np.int32),
    )


def random_table(count: int, seed: int = 0) -> ClipTable:
    rng = np.random.default_rng(seed)
    image = rng.random(count) < 0.2
    frames = np.where(image, 1, rng.lognormal(4, 1, count).astype(int) + 2)
    fps = np.where(image, np.nan, rng.choice([8, 12.5, 23.976, 24, 25, 29.97, 30, 50, 59.94, 60, 120], count))
    height = rng.integers(64, 1600, count)
    width = rng.integers(64, 1600, count)
    return clip_table(frames.tolist(), height.tolist(), width.tolist(), fps.tolist())


def draw(sample: int, seed: int, epoch: int, purpose: str) -> float:
    return float(uniform(np.array([sample]), seed, epoch, purpose)[0])


def assign_one(
    cfg: DataConfig, multiple: int, row: tuple[int, int, int, float], sample: int, seed: int, epoch: int
) -> tuple[str, int, int, int] | int:
    """The rules for one row of the table, written to be read."""
    frames, height, width, fps = row
    if fps >= 24:
        frames //= math.ceil(fps / 24)
    reason = TOO_SMALL
    for resolution in sorted(cfg.buckets, key=area_of, reverse=True):
        if height * width < 0.8 * area_of(resolution):
            continue
        lengths = cfg.buckets[resolution]
        if frames == 1 and row[0] == 1:
            here, candidates = NO_IMAGE_ROW, [1] if 1 in lengths else []
        else:
            here, candidates = TOO_SHORT, [n for n in sorted(lengths, reverse=True) if n > 1 and frames >= n]
        chosen = None
        for length in candidates:
            probabilities = lengths[length][0]
            keep, other = probabilities if isinstance(probabilities, list) else (probabilities, None)
            accept = 1.0 if other is None else other if cfg.probability == "accept" else 1 - other
            if draw(sample, seed, epoch, f"bucket/{resolution}/{length}") < accept:
                chosen = length
                break
            here = NOT_DRAWN
        if chosen is not None:
            if draw(sample, seed, epoch, f"bucket/{resolution}") < keep:
                ratio = math.log(width / height)
                size = min(training_sizes(resolution, multiple), key=lambda hw: abs(math.log(hw[1] / hw[0]) - ratio))
                return resolution, chosen, *size
            here = NOT_DRAWN
        reason = reason if reason == NOT_DRAWN else here
    return reason


@pytest.mark.parametrize("probability", ["skip", "accept"])
@pytest.mark.parametrize("epoch", [0, 3])
def test_columns_agree_with_the_rules_row_for_row(probability: Any, epoch: int) -> None:
    cfg = DataConfig(buckets=BUCKETS, probability=probability)
    table = random_table(4000)
    buckets = BucketTable(cfg, 16)
    assigned = buckets.assign(table, 7, epoch)
    kinds = set()
    for i in range(len(table)):
        row = (int(table.num_frames[i]), int(table.height[i]), int(table.width[i]), float(table.fps[i]))
        expected = assign_one(cfg, 16, row, i, 7, epoch)
        got = int(assigned[i])
        if got >= 0:
            bucket = buckets.buckets[got]
            assert (bucket.resolution, bucket.frames, bucket.height, bucket.width) == expected, (i, row)
            assert bucket.batch_size == cfg.buckets[bucket.resolution][bucket.frames][1]
            kinds.add((bucket.resolution, bucket.frames))
        else:
            assert got == expected, (i, row)
            kinds.add(got)
    assert len(kinds) >= 8 + 3  # every line of the table and every reason this table can give
    assert NOT_DRAWN in kinds and TOO_SMALL in kinds and TOO_SHORT in kinds


def test_skip_and_accept_are_opposites() -> None:
    table = random_table(2000)
    skip = BucketTable(DataConfig(buckets={"256px": {33: [[1.0, 0.3], 1], 5: [1.0, 1]}}, probability="skip"), 16)
    accept = BucketTable(DataConfig(buckets={"256px": {33: [[1.0, 0.7], 1], 5: [1.0, 1]}}, probability="accept"), 16)
    long = table.num_frames // frame_interval(table.fps) >= 33
    for buckets in (skip, accept):
        assigned = buckets.assign(table, 0, 0)
        placed = assigned[(assigned >= 0) & long]
        share = np.mean([buckets.buckets[b].frames == 33 for b in placed])
        assert 0.65 < share < 0.75
    assert (skip.assign(table, 0, 0) == accept.assign(table, 0, 0)).all()


def test_draws_depend_on_every_part_of_the_key_and_only_on_it() -> None:
    ids = np.arange(100_000)
    first = uniform(ids, 1, 2, "a")
    assert (first[::-1] == uniform(ids[::-1], 1, 2, "a")).all()
    assert abs(first.mean() - 0.5) < 0.01 and abs(first.var() - 1 / 12) < 0.002
    for key in ((2, 2, "a"), (1, 3, "a"), (1, 2, "b")):
        assert abs(np.corrcoef(first, uniform(ids, *key))[0, 1]) < 0.015
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.015


@pytest.mark.parametrize(
    ("fps", "interval", "new"),
    [
        (8, 1, 8),
        (12.5, 1, 12.5),
        (23.976, 1, 23.976),
        (24, 1, 24),
        (24.01, 1, 24),
        (25, 2, 12),
        (29.97, 2, 14),
        (30, 2, 15),
        (48, 2, 24),
        (50, 3, 16),
        (60, 3, 20),
        (120, 5, 24),
        (math.nan, 1, 0),
    ],
)
def test_frame_interval(fps: float, interval: int, new: float) -> None:
    assert frame_interval(np.array([fps])).tolist() == [interval]
    assert sampled_fps(fps) == new


def test_report_counts_every_row_once() -> None:
    table = clip_table(
        [1, 1, 100, 3, 50], [512, 32, 512, 512, 512], [512, 32, 512, 512, 512], [math.nan] * 2 + [24.0] * 3
    )
    buckets = BucketTable(DataConfig(buckets={"256px": {33: [1.0, 2], 65: [1.0, 1], 97: [0.0, 1]}}), 16)
    report = buckets.report(buckets.assign(table, 0, 0))
    assert [(bucket.frames, count) for bucket, count in report.per_bucket] == [(33, 1)]
    assert sum(count for _, count in report.left_out) == 4 and len(report.left_out) == 4
    assert report.empty_rows == (("256px", 97), ("256px", 65))
    text = str(report)
    for words in ("1 of 5 samples", "too small", "too short", "no row of 1 frame", "dropped", "256px x 97"):
        assert words in text


@pytest.mark.parametrize(
    ("buckets", "words"),
    [
        ({"256": {1: [1.0, 1]}}, "buckets.256.1"),
        ({"256px": {1: [2.0, 1]}}, "from 0 to 1"),
        ({"256px": {1: [[1.0, 0.5], 1]}}, "an image has no other length"),
        ({"256px": {5: [1.0, 0]}}, "batch size"),
        ({"256px": {5: 4}}, r"\[keep_prob, batch_size\]"),
        ({"256px": {0: [1.0, 1]}}, "integer >= 1"),
    ],
)
def test_bad_rows_name_their_key(buckets: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DataConfig(buckets=buckets)


def test_no_rows_and_tiny_resolutions() -> None:
    with pytest.raises(UserError, match=r"data\.buckets is empty"):
        BucketTable(DataConfig(), 16)
    with pytest.raises(UserError, match=r"data\.buckets\.8px"):
        BucketTable(DataConfig(buckets={"8px": {1: [1.0, 1]}}), 16)


@pytest.mark.parametrize(("name", "rows"), [("stage1", 35), ("stage2", 66)])
def test_published_tables_are_readable(name: str, rows: int) -> None:
    path = Path(__file__).resolve().parents[2] / "configs" / "data" / f"{name}.yaml"
    table = BucketTable(DataConfig(**yaml.safe_load(path.read_text())["data"]), 16)
    assert len(table.rows) == rows
    assert all(row.frames % 4 == 1 and row.frames <= 129 for row in table.rows)
