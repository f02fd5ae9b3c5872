"""Clips as Open-Sora 1.x reads them: frames spread over a window, scaled by bilinear interpolation, cut at the centre;
through the loader, in worker processes, with every decoder, in packs. Frames, sizes and pixels are written out here."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from opensora.datasets import DataConfig
from opensora.datasets.decode.api import DECODERS, read_frames
from opensora.datasets.decode.common import bilinear, spread
from opensora.datasets.loading.loader import build_loader
from opensora.datasets.loading.reader import Batch, PackedBatch
from opensora.datasets.loading.window import sampled_frames, told_fps
from opensora.datasets.plan.batch_plan import BatchPlan
from opensora.datasets.table.manifest import ClipTable, read_table
from opensora.utils.errors import UserError
from tests.unit.test_decode import encode

SHAPE = (32, 48)
BUCKETS = {"32x48": {1: [1.0, 2], 4: [1.0, 2]}}
LENGTHS = (4, 9, 12, 13, 20)
CLIP, STILL = (70, 90), (50, 40)  # height, width


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    lines = ["path,text,num_frames,height,width,fps"]
    for i, frames in enumerate(LENGTHS):
        encode(folder / f"{i}.mp4", frames, size=CLIP)
        lines.append(f"{i}.mp4,clip {i},{frames},{CLIP[0]},{CLIP[1]},{25 if i else 23.976}")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (*STILL, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f"{i}.png,still {i},1,{STILL[0]},{STILL[1]},")
    (folder / "t.csv").write_text("\n".join(lines))
    return folder


def config(**more: Any) -> DataConfig:
    told: dict[str, Any] = {"buckets": BUCKETS, "bucket_rule": "open_sora_1_0", "frame_interval": 3} | more
    return DataConfig(**{"interpolation": "bilinear", "unused_rows": "report", "workers": 0, **told})


def load(table: ClipTable, cfg: DataConfig, epochs: int = 1) -> list[Batch | PackedBatch]:
    plan = BatchPlan(table, cfg, 8, seed=3)
    steps = plan.steps_in_epoch(0) * epochs
    return list(build_loader(table, plan, cfg, start_step=0, stop_step=steps, dp_rank=0, dp_degree=1, seed=3))


def window_by_hand(start: int, frames: int, interval: int, length: int) -> list[int]:
    """n * interval frames, or as many as there are; n of them, the first and the last among them, rounded down."""
    end = start + min(frames * interval, length)
    if frames == 1:
        return [start]
    return [start + int(Fraction((end - 1 - start) * i, frames - 1)) for i in range(frames)]


def pixels_by_hand(picture: np.ndarray, mode: str) -> np.ndarray:
    """Scaled to cover the shape, and cut at the centre."""
    (height, width), (tall, wide) = SHAPE, picture.shape[:2]
    if height / tall > width / wide:
        size = (height, round(wide * height / tall))
    else:
        size = (round(tall * width / wide), width)
    if mode == "bicubic":
        scaled = np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC)).astype(np.float64)
    else:
        x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].double()
        scaled = F.interpolate(x, size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled[top : top + height, left : left + width]


def check(batch: Batch, table: ClipTable, folder: Path, starts: dict[int, set[int]], interval: int = 3) -> None:
    for slot, sample in enumerate(batch.sample_ids):
        found, length = batch.pixels[slot].permute(1, 2, 3, 0).double().numpy(), int(table.num_frames[sample])
        whole = read_frames(table.path(sample), 0, length)
        mode = "bilinear" if length > 1 else "bicubic"
        every = np.stack([pixels_by_hand(frame, mode) for frame in whole])
        span = min(batch.bucket.frames * interval, length)
        errors = {
            start: np.abs(every[window_by_hand(start, batch.bucket.frames, interval, length)] - found).max()
            for start in range(length - span + 1)
        }
        start = min(errors, key=lambda start: errors[start])
        assert errors[start] <= 0.51, (sample, errors)
        starts.setdefault(sample, set()).add(start)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_and_pixels_are_those_written_out(clips: Path, workers: int, decoder: str) -> None:
    try:
        DECODERS[decoder][0]()
    except UserError as missing:
        pytest.skip(str(missing))
    table, starts = read_table(str(clips / "t.csv")), dict[int, set[int]]()
    for batch in load(table, config(workers=workers, decoder=decoder), epochs=6):
        assert isinstance(batch, Batch)
        check(batch, table, clips, starts)
        rates = [
            0.0 if table.num_frames[sample] == 1 else 23 // 3 if sample == 0 else 25 // 3 for sample in batch.sample_ids
        ]
        assert batch.fps.tolist() == rates and not batch.replaced
    assert set(starts) == set(range(len(LENGTHS) + 3))
    assert starts[0] == {0} and starts[2] == {0}  # 4 of 4 frames, and a window of 12 of 12
    assert len(starts[4]) > 2 and max(starts[4]) <= 20 - 12


def test_packs_hold_the_same(clips: Path) -> None:
    table, starts = read_table(str(clips / "t.csv")), dict[int, set[int]]()
    cfg = config(micro_batches=2, balance_group=2, tokens_per_sequence=200)
    for pack in load(table, cfg):
        assert isinstance(pack, PackedBatch)
        for part in pack.parts:
            check(part, table, clips, starts)
    assert set(starts) == set(range(len(LENGTHS) + 3))


@pytest.mark.parametrize("seed", range(8))
def test_windows_lie_in_their_clips(seed: int) -> None:
    """Any lengths and intervals: every start is possible, no other one, and frames rise."""
    rng = np.random.default_rng(seed)
    frames, interval = int(rng.integers(1, 20)), int(rng.integers(1, 6))
    length = frames * interval + 1 + int(rng.integers(0, 5))
    cfg = config(buckets={"256x256": {frames: [1.0, 1]}}, frame_interval=interval)
    starts = set()
    for epoch in range(80):
        start, step, span = sampled_frames(cfg, length, 25.0, frames, seed=seed, epoch=epoch, sample_id=7)
        assert (step, span) == (1, frames * interval)
        numbers = list(spread(start, span, frames))
        assert numbers == window_by_hand(start, frames, interval, length)
        assert all(a < b for a, b in pairwise(numbers)) and numbers[-1] < length
        starts.add(start)
    assert starts == set(range(length - frames * interval + 1))


def test_neighbours_are_not_all_equally_far_apart() -> None:
    """16 frames of 48: no fixed stride of 3, and the last one is the window's."""
    assert spread(5, 48, 16) == [5, 8, 11, 14, 17, 20, 23, 26, 30, 33, 36, 39, 42, 45, 48, 52]


@pytest.mark.parametrize(
    ("fps", "interval", "told"),
    [(30.0, 3, 10.0), (29.97, 3, 9.0), (23.976, 1, 23.0), (60.0, 4, 15.0), (float("nan"), 3, 0.0)],
)
def test_rates_are_divided_and_rounded_down(fps: float, interval: int, told: float) -> None:
    assert told_fps(config(frame_interval=interval), fps) == told


@pytest.mark.parametrize("seed", range(20))
def test_bilinear_is_that_of_torch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    before, after = rng.integers(1, 60, 2), rng.integers(1, 60, 2)
    picture = rng.integers(0, 256, (*before, 3), dtype=np.uint8)
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].double()
    wanted = F.interpolate(x, tuple(after.tolist()), mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()
    found = bilinear(picture, *after.tolist())
    assert found.dtype == np.uint8 and np.abs(found - wanted).max() <= 0.51


def test_the_default_is_as_before(clips: Path) -> None:
    """Bicubic and antialiased, every k-th frame, with the other rules."""
    cfg = DataConfig(buckets={"32px": {4: [1.0, 2]}})
    assert (cfg.interpolation, cfg.frame_interval, cfg.bucket_rule) == ("bicubic", None, "even")
    assert sampled_frames(cfg, 40, 48.0, 4, seed=1, epoch=0, sample_id=2)[1:] == (2, None)
    with pytest.raises(ValueError, match="span=3: must be an integer >= count=4"):
        read_frames(str(clips / "0.mp4"), 0, 4, span=3)


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ".h264"])
def test_spread_frames_are_those_of_the_whole_clip(suffix: str, tmp_path: Path) -> None:
    """Whatever reads the file: by seeking, by counting, or picture by picture."""
    path = str(tmp_path / f"clip{suffix}")
    if suffix in (".gif", ".webp"):
        rng = np.random.default_rng(3)
        pictures = [Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)) for _ in range(13)]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    else:
        encode(Path(path), 13)
    whole = read_frames(path, 0, 13)
    for start, span, count in ((0, 13, 5), (2, 9, 4), (4, 8, 8), (6, 7, 1), (0, 13, 13)):
        found = read_frames(path, start, count, span=span)
        assert np.array_equal(
            found, whole[window_by_hand(start, count, 1, 13) if count == 1 else spread(start, span, count)]
        )
