"""Buckets as the published code assigns clips to them: every golden row, and a run that takes its samples from them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from opensora.datasets import DataConfig
from opensora.datasets.buckets.aspect import named_sizes, training_sizes
from opensora.datasets.buckets.bucket import REASONS, BucketTable, frame_interval, sampled_fps
from opensora.datasets.buckets.published_rule import PublishedRule
from opensora.datasets.plan.batch_plan import BatchPlan, MicroBatch
from opensora.datasets.table.manifest import ClipTable, TextsInMemory

SEED, MULTIPLE = 1000, 16
TABLES = ("stage1", "stage2", "stage2_i2v", "zero_one", "pairs")


def clip_table(rows: list[list[Any]]) -> ClipTable:
    """Of rows (frames, height, width, fps, ...)."""
    count = len(rows)
    names = pa.chunked_array([[f"{i}.mp4" for i in range(count)]])
    return ClipTable(
        num_frames=np.array([row[0] for row in rows], np.int32),
        height=np.array([row[1] for row in rows], np.uint16),
        width=np.array([row[2] for row in rows], np.uint16),
        fps=np.array([math.nan if row[3] is None else row[3] for row in rows], np.float64),
        motion_score=np.full(count, np.nan, np.float32),
        texts=TextsInMemory(names, names),
        folders=("",),
        first_rows=np.zeros(1, np.int64),
    )


def config(table: dict[str, Any], rule: str = "open_sora_2") -> DataConfig:
    buckets = {name: {int(frames): row for frames, row in rows.items()} for name, rows in table["config"].items()}
    return DataConfig(buckets=buckets, bucket_rule=rule, unused_rows="report")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def published(golden: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((golden / "buckets.json").read_text())
    return found


def test_frame_rates(published: dict[str, Any]) -> None:
    rows = [row for row in published["rows"] if row[3] is not None]
    assert frame_interval(np.array([row[3] for row in rows])).tolist() == [row[5] for row in rows]
    assert [sampled_fps(row[3]) for row in rows] == [row[4] for row in rows]


@pytest.mark.parametrize("name", TABLES)
def test_every_decision_of_the_published_rule(name: str, published: dict[str, Any]) -> None:
    table, clips = published["tables"][name], clip_table(published["rows"])
    cfg = config(table)
    buckets = BucketTable(cfg, MULTIPLE)
    assert len(buckets.buckets) == table["num_bucket"]
    found = PublishedRule(cfg, buckets, MULTIPLE, SEED).assigned(clips, 0)
    for clip, (number, wanted) in enumerate(zip(found.tolist(), table["assigned"], strict=True)):
        if wanted is None:
            assert number in REASONS, clip
            continue
        resolution, frames, ratio, size = wanted
        bucket = buckets.buckets[number]
        assert (bucket.resolution, bucket.frames) == (resolution, frames), clip
        assert [bucket.frames, bucket.height, bucket.width] == size, clip
        assert "max" in resolution or named_sizes(resolution, MULTIPLE)[ratio] == (bucket.height, bucket.width)


def by_the_rule(
    table: dict[str, dict[int, Any]], clip: int, frames: int, area: int, buckets: int, seed: int
) -> list[Any] | None:
    """[resolution, frames] of a clip, one statement of the published rule after the other."""
    generator = np.random.default_rng(seed + clip * buckets)
    for name in sorted(table, key=lambda name: -(int(name[:-2]) ** 2)):
        if area < 0.8 * int(name[:-2]) ** 2:
            continue
        if frames == 1:
            if 1 in table[name] and generator.random() < table[name][1][0]:
                return [name, 1]
            continue
        chosen = None
        for length in sorted(table[name], reverse=True):
            keep = table[name][length][0]
            if length == 1 or length > frames or (isinstance(keep, list) and generator.random() < keep[1]):
                continue
            chosen = length
            break
        if chosen is None:
            continue
        keep = table[name][chosen][0]
        keep = keep[0] if isinstance(keep, list) else keep
        if keep >= 1 or generator.random() < keep:
            return [name, chosen]
    return None


@pytest.mark.parametrize("seed", range(20))
def test_other_tables(seed: int) -> None:
    """Tables and clips at random, against the rule written out."""
    rng = np.random.default_rng(seed)
    table: dict[str, dict[int, Any]] = {}
    for name in rng.choice(["144px", "256px", "480px", "768px"], rng.integers(1, 4), replace=False).tolist():
        row: dict[int, Any] = {1: [float(rng.choice([0, 0.3, 1])), 4]} if rng.random() < 0.7 else {}
        for length in rng.choice([5, 9, 17, 33, 65], rng.integers(1, 4), replace=False).tolist():
            keep = float(rng.choice([0, 0.4, 0.9, 1]))
            row[length] = [[keep, float(rng.choice([0, 0.5, 1]))] if rng.random() < 0.5 else keep, 2]
        table[name] = row
    cfg = DataConfig(buckets=table, bucket_rule="open_sora_2", unused_rows="report")
    buckets = BucketTable(cfg, MULTIPLE)
    clips = [[int(rng.integers(1, 80)), int(rng.integers(90, 900)), int(rng.integers(90, 900)), 8.0] for _ in range(60)]
    found = PublishedRule(cfg, buckets, MULTIPLE, seed).assigned(clip_table(clips), 2)
    for clip, (number, (frames, height, width, _)) in enumerate(zip(found.tolist(), clips, strict=True)):
        wanted = by_the_rule(table, clip, frames, height * width, len(buckets.buckets), seed + 2)
        bucket = buckets.buckets[number] if number >= 0 else None
        assert (bucket and [bucket.resolution, bucket.frames]) == wanted, clip
        if bucket:  # the nearest of the names' ratios, height over width
            slopes = {
                (float(name.split(":")[1]) / float(name.split(":")[0])): size
                for name, size in named_sizes(bucket.resolution, MULTIPLE).items()
            }
            nearest = min(slopes, key=lambda slope: abs(slope - height / width))
            assert slopes[nearest] == (bucket.height, bucket.width)


@pytest.mark.parametrize("name", ["stage2", "zero_one"])
def test_the_even_rule_differs_in_ratios_alone_where_nothing_is_drawn(name: str, published: dict[str, Any]) -> None:
    """And in clips of which less than a frame would be used, which it takes for images."""
    table, clips = published["tables"][name], clip_table(published["rows"])
    plan = BatchPlan(clips, config(table, "even"), MULTIPLE, SEED)
    found, other = plan._epoch(0).assigned(), 0
    for row, number, wanted in zip(published["rows"], found.tolist(), table["assigned"], strict=True):
        if row[0] // row[5] < 1:
            continue
        bucket = plan._buckets.buckets[number] if number >= 0 else None
        assert (bucket and [bucket.resolution, bucket.frames]) == (wanted and wanted[:2])
        other += bool(bucket and [bucket.height, bucket.width] != wanted[3][1:])
    assert 0 < other < 10


def test_a_run_takes_its_samples_from_them(published: dict[str, Any]) -> None:
    """Every clip that the rule takes once an epoch, in its bucket, and other ones in the next."""
    table, clips = published["tables"]["pairs"], clip_table(published["rows"])
    cfg = config(table)
    plan = BatchPlan(clips, cfg, MULTIPLE, SEED)
    rule = PublishedRule(cfg, BucketTable(cfg, MULTIPLE), MULTIPLE, SEED)
    step, taken = 0, []
    for epoch in range(2):
        seen: dict[int, str] = {}
        for _ in range(plan.steps_in_epoch(epoch)):
            for micro_batch in plan.step(step):
                assert isinstance(micro_batch, MicroBatch)
                for sample in micro_batch.sample_ids:
                    assert sample not in seen and plan.epoch_of(step) == epoch
                    seen[sample] = str(micro_batch.bucket)
            step += 1
        wanted = rule.assigned(clips, epoch).tolist()
        names = [str(bucket) for bucket in plan._buckets.buckets]
        assert seen == {clip: names[number] for clip, number in enumerate(wanted) if number >= 0}
        taken.append(set(seen))
    report = plan.report()
    assert report.rows == 300 and sum(count for _, count in report.left_out) == 300 - len(taken[0])
    assert taken[0] != taken[1]


@pytest.mark.parametrize("resolution", ["256px", "512px", "768px", "1024px", "480p", "720p", "720p_max", "144p_ar5:8"])
@pytest.mark.parametrize("multiple", [8, 16, 32])
def test_named_sizes_are_those_of_the_table(resolution: str, multiple: int) -> None:
    assert set(named_sizes(resolution, multiple).values()) == set(training_sizes(resolution, multiple))


def test_pairs_are_probabilities_to_skip() -> None:
    with pytest.raises(ValueError, match="probability=accept: with bucket_rule=open_sora_2 must be skip"):
        DataConfig(bucket_rule="open_sora_2", probability="accept")
