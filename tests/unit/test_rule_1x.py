"""Buckets as Open-Sora 1.1 to 1.3 assign clips to them: every golden table and decision, the rule written out, and what
a run makes of it on any number of processes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from opensora.assembly.bucket_shapes import check_buckets
from opensora.assembly.stored_features import identity, identity_hash
from opensora.config.run import RunConfig, TrainConfig
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
from opensora.models.families import MODEL_CONFIGS, describe
from opensora.models.text import TEXT_ENCODER_CONFIGS
from opensora.models.vae import AUTOENCODER_CONFIGS, autoencoder_shape
from opensora.schedulers import OBJECTIVE_CONFIGS
from opensora.utils.errors import UserError
from tests.unit.test_published_rule import clip_table

VERSIONS: tuple[Version, ...] = ("1.1", "1.2", "1.3")


def rule_name(version: str) -> str:
    return f"open_sora_{version.replace('.', '_')}"


def read(golden: Path, what: str, version: str) -> Any:
    return json.loads((golden / f"v1/{what}_v{version.replace('.', '_')}.json").read_text())


def config(version: str, table: dict[str, Any], **more: Any) -> DataConfig:
    return DataConfig(buckets=table, bucket_rule=rule_name(version), probability="accept", unused_rows="report", **more)  # type: ignore[arg-type]


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
        assert found["aspect_ratio_map"] == RATIO_NAMES and found["num_frames_map"] == FRAME_COUNTS


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
            ids = {
                name: {row.frames: n for n, row in enumerate(buckets.rows) if row.resolution == name}
                for name in table["bucket_ids"]
            }
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


def by_the_rule(
    version: str, table: dict[str, dict[int, Any]], clip: tuple[int, int, int], interval: int, seed: int
) -> list[Any] | None:
    """[resolution, frames] of a clip (frames, height, width), one statement of the published rule after the other."""
    frames, height, width = clip
    names = sorted(table, key=lambda name: area_1x(RULES[rule_name(version)], name), reverse=True)
    rows = {(name, n): number for number, (name, n) in enumerate((m, n) for m in names for n in sorted(table[m])[::-1])}
    for name in names:
        if height * width < area_1x(RULES[rule_name(version)], name) * 0.8:
            continue
        chosen = None
        for length in sorted(table[name], reverse=True):
            p, generator = table[name][length][0], np.random.default_rng(seed + rows[name, length])
            fits = frames == 1 if length == 1 else frames > length * interval
            if not fits or (isinstance(p, list) and generator.random() > p[1]):
                continue
            chosen = length
            break
        if chosen is None:
            continue
        p = p[0] if isinstance(p, list) else p
        if (p == 1 and chosen > 1) or generator.random() < p:
            return [name, chosen]
    return None


@pytest.mark.parametrize("seed", range(12))
def test_other_tables_and_clips(seed: int) -> None:
    """At random, against the rule written out; another epoch, another seed of the run."""
    rng = np.random.default_rng(seed)
    version: Version = VERSIONS[seed % 3]
    names = [*resolutions(version)[:8], *(["240p_16d", "360p_16d"] if version == "1.3" else [])]
    table: dict[str, dict[int, Any]] = {}
    for name in rng.choice(names, rng.integers(1, 5), replace=False).tolist():
        row: dict[int, Any] = {1: [float(rng.choice([0, 0.3, 1])), 4]} if rng.random() < 0.7 else {}
        for length in rng.choice([5, 16, 17, 33, 65], rng.integers(1, 4), replace=False).tolist():
            keep = float(rng.choice([0, 0.4, 0.9, 1]))
            paired = version != "1.1" and rng.random() < 0.5
            row[length] = [
                [keep, float(rng.choice([0, 0.5, 1]))] if paired else keep,
                None if keep == 0 and not paired else 2,
            ]
        table[name] = row
    interval = int(rng.integers(1, 4))
    cfg = config(version, table, frame_interval=interval)
    buckets = BucketTable(cfg, 16)
    rule = Rule1x(cfg, buckets, seed)
    lengths = [n * interval + more for row in table.values() for n in row for more in (0, 1)]  # about the limits
    lengths += rng.integers(1, 80 * interval, 30).tolist() + [1] * 10
    clips = [[int(rng.choice(lengths)), *rng.integers(90, 900, 2).tolist(), 8.0] for _ in range(120)]
    found = rule.assigned(clip_table(clips), 2)
    for clip, (number, (frames, height, width, _)) in enumerate(zip(found.tolist(), clips, strict=True)):
        wanted = by_the_rule(version, table, (frames, height, width), interval, seed + 2 + clip * rule.buckets)
        bucket = buckets.buckets[number] if number >= 0 else None
        assert (bucket and [bucket.resolution, bucket.frames]) == wanted, clip
        if bucket:
            sizes = sizes_1x(version, bucket.resolution)
            nearest = min(sizes, key=lambda name: abs(float(name) - height / width))
            assert sizes[nearest] == (bucket.height, bucket.width)


def test_ratios_are_compared_by_their_difference() -> None:
    """1.159 is nearer to 1 than to 1.33; their logarithms would say otherwise."""
    assert nearest_ratio(sizes_1x("1.2", "144p"), 1159, 1000) == "1.00"
    assert nearest_ratio(sizes_1x("1.2", "144p"), 1166, 1000) == "1.33"


def random_clips(count: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    sides = [(256, 256), (240, 426), (480, 854), (1080, 1920), (640, 360), (90, 120)]
    rows = []
    for _ in range(count):
        height, width = sides[rng.integers(len(sides))]
        rows.append([int(rng.choice([1, 20, 49, 60, 103, 150, 410])), height, width, float(rng.choice([8, 24, 30]))])
    return clip_table(rows)


TABLES: dict[str, dict[str, Any]] = {
    "1.0": {"256x256": {1: [1.0, 4], 16: [1.0, 3]}},
    "1.1": {"144p": {1: [0.5, 4], 16: [1.0, 3], 32: [0.3, 2]}, "256": {16: [0.5, 3], 64: [0.0, None]}},
    "1.2": {"144p": {1: [1.0, 5], 51: [1.0, 3], 102: [[1.0, 0.33], 2]}, "240p": {51: [0.4, 2], 102: [[0.5, 0.4], 1]}},
    "1.3": {"360p": {1: [0.7, 3], 49: [0.8, 2]}, "240p_16d": {49: [[1.0, 0.6], 3], 17: [0.5, 4]}},
}


@pytest.mark.parametrize("version", TABLES)
def test_no_sample_is_lost_on_any_number_of_processes(version: str) -> None:
    """Each epoch holds just the clips that the rule takes, once, in their buckets, however many processes there are and
    wherever they begin; what it drops is counted by its reason."""
    clips, cfg = random_clips(90, 7), config(version, TABLES[version], micro_batches=4)
    plan = BatchPlan(clips, cfg, 16, 5)
    rule = Rule1x(cfg, BucketTable(cfg, 16), 5)
    names = [str(bucket) for bucket in plan._buckets.buckets]
    step, taken = 0, []
    for epoch in range(2):
        wanted = {clip: names[n] for clip, n in enumerate(rule.assigned(clips, epoch).tolist()) if n >= 0}
        for world in (1, 2, 3, 5):
            seen: dict[int, str] = {}
            resumed = BatchPlan(clips, cfg, 16, 5)  # knows of no step before
            for number in range(step, step + plan.steps_in_epoch(epoch)):
                for rank in range(world):
                    for part in resumed.assign(number, rank, world):
                        assert isinstance(part, MicroBatch) and part.epoch == epoch
                        if part.weight:
                            assert not seen.keys() & set(part.sample_ids)
                            seen |= dict.fromkeys(part.sample_ids, str(part.bucket))
            assert seen == wanted, (epoch, world)
        step += plan.steps_in_epoch(epoch)
        taken.append(wanted)
    report = plan.report()
    assert report.rows == 90 and sum(count for _, count in report.left_out) == 90 - len(taken[0])
    assert rule.draws == (version != "1.0") and (taken[0] != taken[1]) == rule.draws
    assert ("256", 64) not in report.unused_rows  # a row that is there for its number


@pytest.mark.parametrize(
    ("version", "table", "more", "problem"),
    [
        (
            "1.1",
            {"2k": {16: [1.0, 2]}},
            {},
            "buckets.2k.16: 2k: not a resolution of Open-Sora 1.1; must be one of 144p, 256",
        ),
        ("1.2", {"256px": {16: [1.0, 2]}}, {}, "buckets.256px.16: 256px: not a resolution of Open-Sora 1.2"),
        ("1.2", {"360p_16d": {16: [1.0, 2]}}, {}, "360p_16d: not a resolution of Open-Sora 1.2"),
        ("1.3", {"360q": {16: [1.0, 2]}}, {}, "or one of these with _16d"),
        ("1.0", {"256": {16: [1.0, 2]}}, {}, "256: must be a size, height first, as 256x256"),
        ("1.0", {"16x2048": {16: [1.0, 2]}}, {}, "16x2048: must have a ratio from 1:32 to 32:1"),
        ("1.1", {"256": {16: [[1.0, 0.5], 2]}}, {}, "must have one probability a row"),
        ("1.2", {"256": {16: [0.5, None]}}, {}, "the batch size must be an integer >= 1"),
        (
            "1.2",
            {"256": {16: [[1.0, 0.5], 2]}},
            {"probability": "skip"},
            "probability=skip: with bucket_rule=open_sora_1_2 must be acc",
        ),
        ("1.2", {"256": {16: [1.0, 2]}}, {"frame_interval": 0}, "frame_interval=0: must be an integer >= 1"),
        (
            "2",
            {"256px": {16: [1.0, 2]}},
            {"frame_interval": 3, "probability": "skip"},
            "frame_interval=3: must be null with bucket_rule=open_sora_2",
        ),
    ],
)
def test_what_a_table_cannot_say(version: str, table: dict[str, Any], more: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError) as caught:
        DataConfig(**{"buckets": table, "bucket_rule": rule_name(version), "probability": "accept", **more})
    assert problem in str(caught.value)


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_sizes_of_sampled_clips_are_those_of_the_tables(golden: Path, version: Version) -> None:
    found = read(golden, "aspect_tables", version)
    for resolution, table in found["resolutions"].items():
        for ratio, name in found["aspect_ratio_map"].items():
            listed = {float(key): size for key, size in table["sizes"].items()}
            if float(name) in listed:
                assert list(clip_size_1x(version, resolution, ratio)) == listed[float(name)]
            else:
                with pytest.raises(ValueError, match=f"{resolution} has no size of {ratio}; must be one of"):
                    clip_size_1x(version, resolution, ratio)
    with pytest.raises(ValueError, match="no ratio '5:7'"):
        clip_size_1x(version, "480p", "5:7")


@pytest.mark.parametrize(
    ("model", "vae", "problem"),
    [
        ("stdit3", "sd", ""),
        ("stdit3", "dct", "data.buckets.144p.5: 117x312 pixels do not fit the autoencoder: use multiples of 8x8"),
        (
            "dit",
            "sd",
            "117x312 pixels make 14x39 latents, which this model does not cut into patches of 2x2; use sizes",
        ),
    ],
)
def test_sizes_that_are_no_whole_tokens(model: str, vae: str, problem: str) -> None:
    """Are filled up by some models, and refused before anything is read with others."""
    shape = autoencoder_shape(AUTOENCODER_CONFIGS[vae](**({} if vae == "dct" else {"path": "x"})))
    denoising = describe(MODEL_CONFIGS[model]())
    cfg = config("1.2", {"144p": {5: [1.0, 2]}})
    if not problem:
        check_buckets(cfg, shape, denoising)
        return
    with pytest.raises(UserError) as caught:
        check_buckets(cfg, shape, denoising)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_stored_features_belong_to_a_rule_and_a_window() -> None:
    """What is coded of other frames, other sizes or otherwise scaled pixels is not taken for the same."""
    base = {"table": "c.csv", "buckets": {"144p": {16: [1.0, 2]}}, "bucket_rule": "open_sora_1_2"}
    changes: list[dict[str, Any]] = [
        {},
        {"frame_interval": 3},
        {"frame_interval": 2},
        {"interpolation": "bilinear"},
        {"bucket_rule": "open_sora_1_3"},
    ]
    found = []
    for change in changes:
        cfg = RunConfig(
            name="run",
            model=MODEL_CONFIGS["stdit3"](),
            vae=AUTOENCODER_CONFIGS["sd"](path="x"),
            text=TEXT_ENCODER_CONFIGS["t5"](t5_path="y"),
            objective=OBJECTIVE_CONFIGS["rectified_flow_v1"](),
            data=DataConfig(**{**base, **change}),
            train=TrainConfig(steps=1),
        )
        found.append(identity_hash(identity(cfg, SimpleNamespace(content="c"))))  # type: ignore[arg-type]
    assert len(set(found)) == len(changes)
