"""Assignment by columns against the same rules written for one row, and what the report says."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from opensora.datasets import DataConfig
from opensora.datasets.buckets.aspect import area_of, training_sizes
from opensora.datasets.buckets.bucket import (
    NO_IMAGE_ROW,
    NOT_DRAWN,
    TOO_SHORT,
    TOO_SMALL,
    BucketTable,
    frame_interval,
    sampled_fps,
)
from opensora.datasets.buckets.shape_class_index import index_shape_classes
from opensora.datasets.plan.batch_plan import BatchPlan
from opensora.datasets.plan.counter_rng import uniform
from opensora.datasets.plan.epoch import Epoch, Source
from opensora.datasets.table.manifest import ClipTable, TextsInMemory
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
        height=np.array(height, np.uint16),
        width=np.array(width, np.uint16),
        fps=np.array(fps, np.float64),
        motion_score=np.full(count, np.nan, np.float32),
        texts=TextsInMemory(names, names),
        folders=("",),
        first_rows=np.zeros(1, np.int64),
    )


def random_table(count: int, seed: int = 0) -> ClipTable:
    rng = np.random.default_rng(seed)
    image = rng.random(count) < 0.2
    frames = np.where(image, 1, rng.lognormal(4, 1, count).astype(int) + 2)
    fps = np.where(image, np.nan, rng.choice([8, 12.5, 23.976, 24, 25, 29.97, 30, 50, 59.94, 60, 120], count))
    interval = frame_interval(fps)
    frames = np.where(~image & (frames // interval == 1), 2 * interval, frames)  # moving, or a still by its own word
    height = rng.integers(64, 1600, count)
    width = rng.integers(64, 1600, count)
    return clip_table(frames.tolist(), height.tolist(), width.tolist(), fps.tolist())


Outcome = tuple[str, int, int, int] | int


def assign_one(cfg: DataConfig, row: tuple[int, int, int, float], draw: Callable[[str], float]) -> Outcome:
    """The rules for one row of the table, written to be read; ``draw``: a number in [0, 1) for each decision."""
    frames, height, width, fps = row
    if fps >= 24:
        frames //= math.ceil(fps / 24)
    reason = TOO_SMALL
    for resolution in sorted(cfg.buckets, key=area_of, reverse=True):
        if height * width < 0.8 * area_of(resolution):
            continue
        lengths = cfg.buckets[resolution]
        if row[0] == 1 or frames == 1:
            here, candidates = NO_IMAGE_ROW, [1] if 1 in lengths else []
        else:
            here, candidates = TOO_SHORT, [n for n in sorted(lengths, reverse=True) if n > 1 and frames >= n]
        chosen = None
        for length in candidates:
            probabilities = lengths[length][0]
            keep, other = probabilities if isinstance(probabilities, list) else (probabilities, None)
            accept = 1.0 if other is None else other if cfg.probability == "accept" else 1 - other
            here = NOT_DRAWN
            if draw(f"{resolution}/{length}") < accept:
                chosen = length
                break
        if chosen is not None and draw(resolution) < keep:
            ratio = math.log(width / height)
            size = min(training_sizes(resolution, 16), key=lambda hw: abs(math.log(hw[1] / hw[0]) - ratio))
            return resolution, chosen, *size
        reason = reason if reason == NOT_DRAWN else here
    return reason


def outcomes(cfg: DataConfig, row: tuple[int, int, int, float]) -> list[tuple[Outcome, float]]:
    """Every way ``assign_one`` can go, as (outcome, probability), by trying all answers to every draw.

    In the order of the rules: a larger resolution before a smaller one, a longer row before a shorter one.
    """
    found: dict[Outcome, float] = {}

    def explore(answers: tuple[bool, ...], probability: float) -> None:
        asked = iter(answers)

        class Undecided(Exception):
            pass

        class Draw(float):
            """Smaller than a probability or not, as told; notes the probability it was compared to."""

            def __lt__(self, threshold: float) -> bool:
                answer = next(asked, None)
                if answer is None:
                    raise Undecided(threshold)
                return answer

        try:
            outcome = assign_one(cfg, row, lambda purpose: Draw())
        except Undecided as undecided:
            (threshold,) = undecided.args
            if threshold > 0:
                explore((*answers, True), probability * threshold)
            if threshold < 1:
                explore((*answers, False), probability * (1 - threshold))
        else:
            found[outcome] = found.get(outcome, 0.0) + probability

    explore((), 1.0)
    places = [(outcome, p) for outcome, p in found.items() if not isinstance(outcome, int)]
    return sorted(places, key=lambda place: (-area_of(place[0][0]), -place[0][1])) + [
        (outcome, p) for outcome, p in found.items() if isinstance(outcome, int)
    ]


@pytest.mark.parametrize("probability", ["skip", "accept"])
@pytest.mark.parametrize("epoch", [0, 3])
def test_columns_agree_with_the_rules_row_for_row(probability: Any, epoch: int) -> None:
    cfg = DataConfig(buckets=BUCKETS, probability=probability, unused_rows="report")
    table = random_table(800)
    buckets = BucketTable(cfg, 16)
    content = epoch_of(cfg, table, epoch)
    assigned, draws = content.assigned(), content.draws()
    assert draws.min() >= 0 and draws.max() < 1
    kinds = set()
    for i in range(len(table)):
        row = (int(table.num_frames[i]), int(table.height[i]), int(table.width[i]), float(table.fps[i]))
        ways = outcomes(cfg, row)
        assert sum(p for _, p in ways) == pytest.approx(1)
        ends = np.cumsum([p for _, p in ways])
        expected = ways[min(int(np.searchsorted(ends, draws[i], side="right")), len(ways) - 1)][0]
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


def test_draws_are_uniform_for_every_clip_and_even_within_a_kind() -> None:
    cfg = DataConfig(buckets={"256px": {1: [0.3, 1], 33: [0.7, 1]}})
    table = random_table(300)
    draws = np.array([epoch_of(cfg, table, epoch).draws() for epoch in range(400)])  # (epochs, rows)
    assert abs(draws.mean(axis=0) - 0.5).max() < 4.5 * math.sqrt(1 / 12 / 400)
    assert abs((draws < 0.3).mean(axis=0) - 0.3).max() < 4.5 * math.sqrt(0.21 / 400)
    after = np.corrcoef(draws[1:].ravel(), draws[:-1].ravel())[0, 1]
    assert abs(after) < 0.015  # epochs are independent
    kind = BucketTable(cfg, 16).shape_class_of(table)
    for number in np.unique(kind):
        mine = np.sort(draws[:, kind == number], axis=1)
        assert np.allclose(np.diff(mine, axis=1), 1 / mine.shape[1])  # neither more nor fewer than asked for


def test_ratios_on_and_beside_a_border_take_the_size_that_integers_say() -> None:
    buckets = BucketTable(DataConfig(buckets={"256px": {1: [1.0, 1]}, "768px": {1: [1.0, 1]}}), 16)
    rng = np.random.default_rng(0)
    height, width = rng.integers(1, 2**16, (2, 20_000))
    for sizes in (training_sizes("256px", 16), training_sizes("768px", 16)):
        for (h0, w0), (h1, w1) in pairwise(sizes):  # the border itself, where the means are whole
            over, under = math.isqrt(w0 * w1), math.isqrt(h0 * h1)
            height, width = np.append(height, [under, under + 1, 7 * under]), np.append(width, [over, over, 7 * over])
    table = clip_table([1] * len(height), height.tolist(), width.tolist(), [math.nan] * len(height))
    bins = buckets._ratio_bin(table.height, table.width)
    for name in ("256px", "768px"):
        sizes = training_sizes(name, 16)
        expected = [
            sum(int(w) ** 2 * h0 * h1 < int(h) ** 2 * w0 * w1 for (h0, w0), (h1, w1) in pairwise(sizes))
            for h, w in zip(height, width, strict=True)
        ]
        assert (buckets._size_at(sizes)[bins] == expected).all()


def epoch_of(cfg: DataConfig, table: ClipTable, epoch: int, seed: int = 7) -> Epoch:
    buckets = BucketTable(cfg, 16)
    return Epoch(Source(buckets, buckets.shares(), index_shape_classes(table, buckets), seed), epoch)


def test_skip_and_accept_are_opposites() -> None:
    table = random_table(2000)
    skip = DataConfig(buckets={"256px": {33: [[1.0, 0.3], 1], 5: [1.0, 1]}}, probability="skip")
    accept = DataConfig(buckets={"256px": {33: [[1.0, 0.7], 1], 5: [1.0, 1]}}, probability="accept")
    long = table.num_frames // frame_interval(table.fps) >= 33
    for cfg in (skip, accept):
        assigned = epoch_of(cfg, table, 0).assigned()
        placed = assigned[(assigned >= 0) & long]
        share = np.mean([BucketTable(cfg, 16).buckets[b].frames == 33 for b in placed])
        assert 0.68 < share < 0.72
    assert (epoch_of(skip, table, 0).assigned() == epoch_of(accept, table, 0).assigned()).all()


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
        (24.01, 2, 12),
        (math.nextafter(24, 25), 2, 12),
        (25, 2, 12),
        (29.97, 2, 14),
        (30, 2, 15),
        (48, 2, 24),
        (48.01, 3, 16),
        (50, 3, 16),
        (60, 3, 20),
        (120, 5, 24),
        (math.nan, 1, 0),
    ],
)
def test_frame_interval(fps: float, interval: int, new: float) -> None:
    assert frame_interval(np.array([fps])).tolist() == [interval]
    assert sampled_fps(fps) == new


Ratios = dict[float, tuple[int, int]]  # height / width -> (height, width), in the order of the family's table


def family_sizes(resolution: str, multiple: int = 16) -> Ratios:
    """The training table of Open-Sora 2, written from its description: plain rule, then the closest area."""
    name, _, suffix = resolution.partition("_")
    area = int(name[:-2]) ** 2 if name.endswith("px") else int(int(name[:-1]) ** 2 * 16 / 9)
    upright: dict[tuple[int, int], None] = {}
    for wide, tall in ((2.39, 1), (2, 1), (16, 9), (1.85, 1), (9, 16), (5, 8), (3, 2), (4, 3), (1, 1)):
        if suffix.startswith("ar") and [wide, tall] != [float(x) for x in suffix[2:].split(":")]:
            continue
        width = int(math.sqrt(area * wide / tall) // multiple) * multiple
        height = int(area / width // multiple) * multiple
        steps = [(0, 0), (multiple, 0), (-multiple, 0), (0, multiple), (0, -multiple)]
        around = [(height + dh, width + dw) for dh, dw in steps]
        upright[min(around, key=lambda size: abs(size[0] * size[1] - area))] = None
    sizes = list(upright)
    if not suffix.startswith("ar"):
        sizes += [(width, height) for height, width in upright]
    if suffix == "max":
        sizes = [max(sizes, key=lambda size: size[0] * size[1])]
    return {height / width: (height, width) for height, width in sizes}


def family_bucket(table: dict[str, dict[int, Any]], row: tuple[int, int, int, float]) -> tuple[str, int, Ratios] | None:
    """Where Open-Sora 2 puts a clip when every probability is 1; the sizes it chooses from."""
    frames, height, width, fps = row
    if fps >= 24:
        frames //= math.ceil(fps / 24)
    for resolution in sorted(table, key=area_of, reverse=True):
        if height * width < 0.8 * area_of(resolution):
            continue
        fitting = [n for n in table[resolution] if (n == 1 if frames == 1 else 1 < n <= frames)]
        if fitting:
            return resolution, max(fitting), family_sizes(resolution)
    return None


def test_buckets_are_those_of_the_family_but_for_the_differences_that_are_named() -> None:
    rows: dict[str, dict[int, Any]] = {
        "256px": {1: [1.0, 1], 5: [1.0, 1], 33: [1.0, 1], 65: [1.0, 1]},
        "480p_ar16:9": {17: [1.0, 1], 49: [1.0, 1]},
        "720p_max": {1: [1.0, 1], 97: [1.0, 1]},
        "768px": {1: [1.0, 1], 129: [1.0, 1]},
    }
    rng = np.random.default_rng(0)
    count = 20_000
    frames = rng.choice([1, 2, 3, 4, 5, 6, 33, 64, 65, 66, 129, 258, 700], count)
    near = rng.choice([24.0, 48.0, 72.0, 120.0], count) * (1 + rng.choice([-1e-3, -1e-9, 0, 1e-9, 4e-4, 1e-3], count))
    fps = np.where(rng.random(count) < 0.5, near, rng.uniform(1, 130, count))
    fps[rng.random(count) < 0.1] = np.nan
    height, width = rng.integers(64, 2000, (2, count))
    table = clip_table(frames.tolist(), height.tolist(), width.tolist(), fps.tolist())
    cfg = DataConfig(buckets=rows, unused_rows="report")
    buckets, assigned = BucketTable(cfg, 16).buckets, epoch_of(cfg, table, 0).assigned()
    stills = ratios = 0
    for i in range(count):
        row = (int(frames[i]), int(height[i]), int(width[i]), float(fps[i]))
        family = family_bucket(rows, row)
        if row[0] == 1 and row[3] >= 24:  # nowhere in the family, as 1 // k = 0; ours: an image, whatever its rate
            family = family_bucket(rows, (*row[:3], math.nan))
            stills += 1
        if family is None:
            assert assigned[i] < 0, row
            continue
        bucket, ratio = buckets[assigned[i]], row[1] / row[2]
        assert (bucket.resolution, bucket.frames) == family[:2], row
        nearest = min(family[2], key=lambda r: abs(r - ratio))
        in_log = min(family[2], key=lambda r: abs(math.log(r / ratio)))
        assert (bucket.height, bucket.width) == family[2][in_log], row
        ratios += nearest != in_log
    assert stills > 500 and 0 < ratios < 0.1 * count  # the differences occur, and there are no others


@pytest.mark.parametrize("name", ["256px", "768px", "1024px", "480p", "720p", "256px_ar16:9"])
def test_size_tables_are_those_of_the_family(name: str) -> None:
    assert set(training_sizes(name, 16)) == set(family_sizes(name).values())


@pytest.mark.parametrize(("name", "size"), [("720p_max", (1232, 752)), ("256px_max", (208, 320))])
def test_the_largest_size_is_the_first_of_equal_ones(name: str, size: tuple[int, int]) -> None:
    assert training_sizes(name, 16) == (size,) == tuple(family_sizes(name).values())


def test_clips_of_which_one_frame_is_used_are_images() -> None:
    table = clip_table([5, 2, 4, 1, 9], [512] * 5, [512] * 5, [120.0, 48.0, 120.0, math.nan, 120.0])
    cfg = DataConfig(buckets={"256px": {1: [1.0, 1], 5: [1.0, 1]}}, unused_rows="report")
    names = [str(b) for b in BucketTable(cfg, 16).buckets]
    places = [names[b] if b >= 0 else int(b) for b in epoch_of(cfg, table, 0).assigned()]
    still = "256px 1x256x256"
    assert places == [still, still, TOO_SHORT, still, still]
    without = DataConfig(buckets={"256px": {5: [1.0, 1]}}, unused_rows="report")
    assert epoch_of(without, table, 0).assigned().tolist() == [NO_IMAGE_ROW] * 2 + [TOO_SHORT] + [NO_IMAGE_ROW] * 2


def test_report_counts_every_row_once() -> None:
    table = clip_table(
        [1, 1, 100, 3, 50], [512, 32, 512, 512, 512], [512, 32, 512, 512, 512], [math.nan] * 2 + [24.0] * 3
    )
    cfg = DataConfig(buckets={"256px": {33: [1.0, 2], 65: [1.0, 1], 97: [0.0, 1]}}, unused_rows="report")
    plan = BatchPlan(table, cfg, 16, 0)
    report = plan.report()
    assert [(bucket.frames, count) for bucket, count in report.per_bucket] == [(33, 1)]
    assert sum(count for _, count in report.left_out) == 4 and len(report.left_out) == 4
    assert report.unused_rows == (("256px", 97), ("256px", 65))
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
