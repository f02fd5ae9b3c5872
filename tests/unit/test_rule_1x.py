"""Buckets as Open-Sora 1.1 to 1.3 assign clips to them: every golden table and decision, the rule written out, and what
a run makes of it on any number of processes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opensora.datasets import DataConfig
from opensora.datasets.buckets.bucket import REASONS, BucketTable
from opensora.datasets.buckets.rule_1x import Rule1x
from opensora.datasets.buckets.sizes_1x import (
    FRAME_COUNTS,
    RATIO_NAMES,
    RULES,
    Version,
    area_1x,
    clip_size_1x,
    nearest_ratio,
    resolutions,
    sizes_1x,
)
from opensora.datasets.plan.batch_plan import BatchPlan, MicroBatch
from tests.unit.test_published_rule import clip_table

VERSIONS: tuple[Version, ...] = ("1.1", "1.2", "1.3")


def rule_name(version: str) -> str:
    return f"open_sora_{version.replace('.', '_')}"


def read(golden: Path, what: str, version: str) -> Any:
    return json.loads((golden / f"v1/{what}_v{version.replace('.', '_')}.json").read_text())


def config(version: str, table: dict[str, Any], **more: Any) -> DataConfig:
    return DataConfig(
        buckets=table, bucket_rule=rule_name(version), probability="accept", unused_rows="report", **more
    )  # type: ignore[arg-type]


def configured(version: str, rows: dict[str, list[Any]], **more: Any) -> DataConfig:
    """Of {resolution: [[frames, p, batch size], ...]}."""
    return config(version, {name: {n: [p, batch] for n, p, batch in lines} for name, lines in rows.items()}, **more)


@pytest.mark.parametrize("version", VERSIONS)
def test_tables_of_sizes_are_equal(golden: Path, version: Version) -> None:
    found = read(golden, "aspect_tables", version)
    assert set(found["resolutions"]) == set(resolutions(version))
    for name, table in found["resolutions"].items():
        assert area_1x(version, name) == table["area"]
        sizes = {ratio: list(size) for ratio, size in sizes_1x(version, name).items()}
        assert list(sizes.items()) == list(table["sizes"].items()), name  # in this order
    if version != "1.1":
        assert (RATIO_NAMES, FRAME_COUNTS) == (found["aspect_ratio_map"], found["num_frames_map"])


@pytest.mark.parametrize("version", VERSIONS)
def test_every_decision_is_equal(golden: Path, version: str) -> None:
    for table in read(golden, "buckets", version):
        assert table["columns"] == ["T", "H", "W", "frame_interval", "seed", "bucket", "thw_and_batch_size"]
        rules = {
            interval: configured(version, table["bucket_config"], frame_interval=interval)
            for interval in {row[3] for row in table["rows"]}
        }
        placed = 0
        for frames, height, width, interval, seed, wanted, shape in table["rows"]:
            buckets = BucketTable(rules[interval], 8)
            rule = Rule1x(rules[interval], buckets, 0)
            assert rule.buckets == table["num_bucket"]
            ids = {name: {row.frames: n for n, row in enumerate(buckets.rows) if row.resolution == name} for name in table["bucket_ids"]}
            assert ids == {name: {int(n): i for n, i in rows.items()} for name, rows in table["bucket_ids"].items()}
            number = rule.bucket(frames, height, width, seed)
            if wanted is None:
                assert number in REASONS
                continue
            bucket = buckets.buckets[number]
            ratio = nearest_ratio(sizes_1x(RULES[rule_name(version)], bucket.resolution), height, width)
            assert [bucket.resolution, bucket.frames, ratio] == wanted
            assert [bucket.frames, bucket.height, bucket.width, bucket.batch_size] == shape
            placed += 1
        assert 0 < placed < len(table["rows"])
