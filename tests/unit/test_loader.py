"""Batches: shapes, order, independence of workers, replacement of unreadable clips, signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opensora.datasets import DataConfig
from opensora.datasets.decode import api
from opensora.datasets.decode import process as reader
from opensora.datasets.decode.api import read_frames
from opensora.datasets.decode.common import ResizeToFill, cover_size
from opensora.datasets.decode.process import DecoderProcess
from opensora.datasets.loading import loader
from opensora.datasets.loading import reader as video
from opensora.datasets.loading.loader import LoadTask, build_loader
from opensora.datasets.loading.reader import Batch, BatchReader, ReadTask
from opensora.datasets.loading.window import window_start
from opensora.datasets.plan.batch_plan import BatchPlan
from opensora.datasets.table.manifest import ClipTable, read_table
from opensora.utils.errors import UserError
from opensora.utils.prompt_suffix import with_suffix
from tests.patience import patience
from tests.unit.test_decode import encode

BUCKETS = {"32px": {1: [1.0, 3], 5: [1.0, 2], 9: [1.0, 2]}}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of 7 or 12 frames at 24 or 48 per second and five stills, with their table."""
    folder = tmp_path_factory.mktemp("clips")
    lines = ["path,text,num_frames,height,width,fps"]
    for i in range(6):
        frames = 12 if i % 2 else 24
        encode(folder / f"{i}.mp4", frames, size=(48, 64) if i < 4 else (64, 48))
        size = "48,64" if i < 4 else "64,48"
        lines.append(f"{i}.mp4,clip {i},{frames},{size},{24 if i % 2 else 48}")
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f"{i}.png,still {i},1,40,40,")
    (folder / "t.csv").write_text("\n".join(lines))
    return folder


def load(table: ClipTable, steps: range, rank: int = 0, degree: int = 1, **changes: Any) -> list[Batch]:
    settings: dict[str, Any] = {"buckets": BUCKETS, "micro_batches": 2, "workers": 0} | changes
    cfg = DataConfig(**{"unused_rows": "report", **settings})
    plan = BatchPlan(table, cfg, 8, seed=1)
    batches = build_loader(
        table, plan, cfg, start_step=steps.start, stop_step=steps.stop, dp_rank=rank, dp_degree=degree, seed=1
    )
    found = list(batches)
    expected = [m for step in steps for m in plan.assign(step, rank, degree)]
    assert [(b.bucket, b.sample_ids, b.epoch, b.weight) for b in found] == [
        (m.bucket, m.sample_ids, m.epoch, m.weight) for m in expected
    ]
    return found


def same(a: Batch, b: Batch) -> bool:
    return (
        torch.equal(a.pixels, b.pixels)
        and torch.equal(a.fps, b.fps)
        and (a.prompts, a.sample_ids, a.bucket, a.replaced) == (b.prompts, b.sample_ids, b.bucket, b.replaced)
    )


def test_shapes_prompts_and_rates(clips: Path) -> None:
    batches = load(read_table(str(clips / "t.csv")), range(8))
    seen = set()
    for batch in batches:
        bucket = batch.bucket
        assert batch.pixels.dtype == torch.uint8
        assert batch.pixels.shape == (len(batch.sample_ids), 3, bucket.frames, bucket.height, bucket.width)
        assert len(batch.prompts) == len(batch.sample_ids) and not batch.replaced
        assert (batch.fps == (0.0 if bucket.frames == 1 else 24.0)).all()
        assert all(prompt.startswith("still" if bucket.frames == 1 else "clip") for prompt in batch.prompts)
        assert batch.pixels.float().std() > 5
        seen.add((bucket.frames, bucket.height, bucket.width))
    assert len(seen) >= 3


def test_pixels_are_the_keyed_window_of_the_clip(clips: Path) -> None:
    table = read_table(str(clips / "t.csv"))
    batch = next(b for b in load(table, range(8)) if 0 in b.sample_ids)
    slot, bucket = batch.sample_ids.index(0), batch.bucket
    start = window_start(24, bucket.frames, 2, seed=1, epoch=batch.epoch, sample_id=0)
    frames = read_frames(
        table.path(0), start, bucket.frames, 2, resize=lambda h, w: cover_size(h, w, bucket.height, bucket.width)
    )
    top, left = (frames.shape[1] - bucket.height) // 2, (frames.shape[2] - bucket.width) // 2
    expected = frames[:, top : top + bucket.height, left : left + bucket.width]
    assert np.array_equal(batch.pixels[slot].permute(1, 2, 3, 0).numpy(), expected)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_workers_resume_and_ranks_change_nothing(clips: Path, crop: str) -> None:
    table = read_table(str(clips / "t.csv"))
    reference = load(table, range(8), crop=crop)
    state = torch.get_rng_state()
    for workers in (1, 2):
        other = load(table, range(8), crop=crop, workers=workers)
        assert len(other) == len(reference) and all(map(same, other, reference))
    assert torch.equal(torch.get_rng_state(), state)
    later = load(table, range(5, 8), crop=crop, workers=1)
    assert all(map(same, later, reference[-len(later) :]))
    by_ids = {(b.epoch, b.sample_ids): b for b in reference}
    for rank in range(3):
        for batch in load(table, range(8), rank=rank, degree=3, crop=crop):
            assert same(batch, by_ids[batch.epoch, batch.sample_ids])


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_cache_changes_nothing_but_the_reading(clips: Path, crop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = read_table(str(clips / "t.csv"))
    reference = load(table, range(12), crop=crop)
    opened: list[str] = []
    real = api.read_frames
    monkeypatch.setattr(api, "read_frames", lambda path, *a, **k: opened.append(path) or real(path, *a, **k))
    large = load(table, range(12), crop=crop, cache_mib=64)
    read_once = len(opened)
    small = load(table, range(12), crop=crop)
    elsewhere = load(table, range(12), crop=crop, cache_mib=64, workers=1)
    assert (
        all(map(same, large, reference)) and all(map(same, small, reference)) and all(map(same, elsewhere, reference))
    )
    assert read_once < len(opened) - read_once  # epochs after the first read stills, and windows seen before, for free


def test_the_cache_keeps_what_was_used_last_and_its_bound() -> None:
    cache = video._FrameCache(2500)
    window = np.zeros(1000, dtype=np.uint8)
    reads: list[str] = []

    def get(key: str, value: np.ndarray = window) -> None:
        cache.get(key, lambda: reads.append(key) or value)  # type: ignore[func-returns-value]

    for key in ("a", "b", "a", "c", "a", "b"):
        get(key)
    assert reads == ["a", "b", "c", "b"]
    get("too large", np.zeros(3000, dtype=np.uint8))
    get("b")
    assert reads == ["a", "b", "c", "b", "too large"]


def test_windows_differ_between_epochs_and_stay_inside() -> None:
    starts = [window_start(100, 9, 3, seed=0, epoch=e, sample_id=5) for e in range(300)]
    assert min(starts) == 0 and max(starts) == 100 - 25
    assert window_start(9, 9, 1, seed=0, epoch=0, sample_id=0) == 0


@pytest.mark.parametrize("source", [(48, 64), (64, 48), (1080, 1920), (33, 77), (40, 40)])
@pytest.mark.parametrize("target", [(32, 32), (24, 48), (64, 16)])
def test_cover_size_covers_tightly(source: tuple[int, int], target: tuple[int, int]) -> None:
    height, width = cover_size(*source, *target)
    assert height >= target[0] and width >= target[1] and (height == target[0] or width == target[1])
    assert abs(height / width - source[0] / source[1]) / (source[0] / source[1]) < 0.05


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_clips_are_replaced_from_the_same_bucket(clips: Path, tmp_path: Path, workers: int) -> None:
    for file in clips.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "1.mp4").write_bytes(b"broken")
    (tmp_path / "3.png").unlink()
    table = read_table(str(tmp_path / "t.csv"))
    batches = load(table, range(8), workers=workers)
    replaced = [r for b in batches for r in b.replaced]
    assert {bad for bad, _, _ in replaced} == {1, 9}
    for batch in batches:
        assert batch.pixels.shape[0] == len(batch.sample_ids)
        for bad, substitute, reason in batch.replaced:
            slot = batch.sample_ids.index(bad)
            assert bool(table.is_image[bad]) == bool(table.is_image[substitute]) and substitute not in (1, 9)
            assert os.path.basename(table.path(bad)) in reason
            assert batch.prompts[slot] == table.caption(substitute)
    again = load(table, range(8))
    assert all(map(same, again, batches))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bucket_with_nothing_readable_is_one_line(clips: Path, tmp_path: Path, workers: int) -> None:
    (tmp_path / "t.csv").write_text((clips / "t.csv").read_text())
    table = read_table(str(tmp_path / "t.csv"))
    with pytest.raises(UserError, match=r"no substitute in bucket 32px") as error:
        load(table, range(2), workers=workers)
    assert "\n" not in str(error.value)


def test_programming_errors_go_through(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **kwargs: Any) -> None:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr("opensora.datasets.decode.api.read_frames", wrong)
    with pytest.raises(KeyError, match="a mistake of ours"):
        load(read_table(str(clips / "t.csv")), range(1))


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[DecoderProcess]:
    """Every decoding process that is started from now on."""
    started: list[DecoderProcess] = []
    monkeypatch.setattr(loader, "DecoderProcess", lambda: started.append(DecoderProcess()) or started[-1])
    return started


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(true: Any, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + patience(seconds)
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(true())


def batches_of(table: ClipTable, steps: int, **changes: Any) -> Any:
    cfg = DataConfig(**{"buckets": BUCKETS, "unused_rows": "report", "micro_batches": 1} | changes)
    plan = BatchPlan(table, cfg, 8, 0)
    return build_loader(table, plan, cfg, start_step=0, stop_step=steps, dp_rank=0, dp_degree=1, seed=0)


def test_workers_ignore_signals_and_end_with_the_iterator(clips: Path, processes: list[DecoderProcess]) -> None:
    batches = batches_of(read_table(str(clips / "t.csv")), 60, workers=2)
    next(batches)
    pids = [process.pid for process in processes]
    assert len(pids) == 2
    for pid in pids:
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"):
            os.kill(pid, getattr(signal, name))
    for _ in range(20):
        next(batches)
    assert all(map(is_alive, pids)) and pids == [process.pid for process in processes]
    batches.close()
    assert not any(map(is_alive, pids))


@pytest.mark.timeout(400)
def test_workers_end_with_their_trainer_however_it_ends(clips: Path) -> None:
    code = (
        "import time; from opensora.datasets.decode.process import DecoderProcess; "
        "p = DecoderProcess(); print(p.pid, flush=True); time.sleep(60)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert trainer.stdout
    pid = int(trainer.stdout.readline())
    assert is_alive(pid)
    trainer.kill()
    trainer.wait()
    assert wait_until(lambda: not is_alive(pid))


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSEGV", "SIGSTOP"])
def test_a_worker_that_dies_or_hangs_is_replaced_and_nothing_is_lost(
    clips: Path, monkeypatch: pytest.MonkeyPatch, processes: list[DecoderProcess], how: str
) -> None:
    monkeypatch.setattr(reader, "PATIENCE_S", 0.2)
    table = read_table(str(clips / "t.csv"))
    reference = list(batches_of(table, 12, workers=0))
    found = []
    batches = batches_of(table, 12, workers=1, prefetch=1, decode_timeout_s=2)
    for batch in batches:
        found.append(batch)
        if len(found) == 4:
            first = processes[0].pid
            os.kill(first, getattr(signal, how))
    assert len(found) == len(reference) and all(map(same, found, reference))
    assert processes[0].pid != first and not is_alive(first)


@pytest.mark.parametrize("how", ["die", "hang"])
def test_a_clip_that_takes_its_decoder_along_is_named_and_replaced(
    clips: Path, monkeypatch: pytest.MonkeyPatch, processes: list[DecoderProcess], tmp_path: Path, how: str
) -> None:
    """Its process dies or hangs twice; then it is left alone, and its substitute is as for any unreadable clip."""
    harm = "os.kill(os.getpid(), 9)" if how == "die" else "time.sleep(600)"
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'opensora.datasets.decode.worker' in sys.orig_argv:\n"
        "    import os, time, opensora.datasets.decode.api as d\n"
        "    real = d.read_frames\n"
        "    def read(path, *a, **k):\n"
        f"        if path.endswith('1.mp4'): {harm}\n"
        "        return real(path, *a, **k)\n"
        "    d.read_frames = read\n"
    )
    said: list[str] = []
    monkeypatch.setattr(video, "announce", said.append)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    table = read_table(str(clips / "t.csv"))
    monkeypatch.setattr(reader, "PATIENCE_S", 0.2)
    found = list(batches_of(table, 12, workers=1, decode_timeout_s=1.5))
    replaced = [r for batch in found for r in batch.replaced]
    assert len(replaced) >= 2 and {bad for bad, _, _ in replaced} == {1}
    reason = "was killed by SIGKILL (out of memory?)" if how == "die" else "hung for 2 s and was killed"
    assert all(reason in why and "1.mp4" in why for _, _, why in replaced)
    assert len(said) == 1 and said[0].startswith("sample 1: ") and "1.mp4" in said[0]


def test_a_worker_never_loads_torch(clips: Path) -> None:
    """It would cost every worker seconds and hundreds of megabytes."""
    process = DecoderProcess()
    process(str(clips / "0.mp4"), 0, 3, resize=ResizeToFill(32, 32), threads=1, decoder="pyav", timeout_s=30)
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    process.close()
    assert "libav" in maps and "torch" not in maps


def test_a_mistake_of_ours_in_a_worker_goes_through(clips: Path) -> None:
    process = DecoderProcess()
    with pytest.raises(RuntimeError, match="KeyError: 'no such decoder'"):
        process(str(clips / "0.mp4"), 0, 1, resize=None, threads=1, decoder="no such decoder", timeout_s=9)
    with pytest.raises(RuntimeError, match="start=-1"):
        process(str(clips / "0.mp4"), -1, 1, resize=None, threads=1, decoder="pyav", timeout_s=9)
    process.close()


def test_nothing_read_for_too_long_is_one_line(clips: Path, processes: list[DecoderProcess]) -> None:
    batches = batches_of(read_table(str(clips / "t.csv")), 60, workers=1, decode_timeout_s=2.9, worker_timeout_s=3)
    next(batches)
    os.kill(processes[0].pid, signal.SIGSTOP)
    with pytest.raises(
        UserError, match=r"data.worker_timeout_s=3: nothing was read in this time; at work: .*\.(mp4|png)"
    ):
        list(batches)
    assert not is_alive(processes[0].pid)


def test_what_is_prepared_ahead_is_bounded(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = read_table(str(clips / "t.csv"))
    alive: list[int] = []
    real = LoadTask.empty_pixels
    monkeypatch.setattr(LoadTask, "empty_pixels", lambda task: alive.append(task.pixel_bytes()) or real(task))
    batches = batches_of(table, 60, workers=2, prefetch=9, prefetch_mib=1)
    monkeypatch.setattr(LoadTask, "pixel_bytes", lambda task: 300 * 1024)
    next(batches)
    assert len(alive) == 3  # 300 KiB each: a fourth would be too much
    next(batches)
    assert len(alive) == 4
    batches.close()
    monkeypatch.setattr(LoadTask, "pixel_bytes", lambda task: 2**40)
    assert len(list(batches_of(table, 3, workers=1, prefetch_mib=1))) == 3


def test_a_run_of_any_length_starts_at_once(clips: Path) -> None:
    cfg = DataConfig(buckets=BUCKETS, unused_rows="report", workers=0)
    table = read_table(str(clips / "t.csv"))
    plan = BatchPlan(table, cfg, 8, 0)
    batches = build_loader(table, plan, cfg, start_step=10**9, stop_step=10**12, dp_rank=0, dp_degree=1, seed=0)
    assert next(batches).sample_ids == plan.step(10**9)[0].sample_ids


def test_prompt_suffix(clips: Path) -> None:
    assert with_suffix("a cat", 24, 4) == "a cat 24 FPS. 4 motion score."
    assert with_suffix("a cat", None, 4.0) == "a cat 4 motion score."
    assert with_suffix("a cat", 0.0, float("nan")) == "a cat"
    prompts = [p for b in load(read_table(str(clips / "t.csv")), range(6), prompt_suffix=True) for p in b.prompts]
    assert any(p.endswith(" 24 FPS.") for p in prompts if p.startswith("clip"))
    assert not any("FPS" in p for p in prompts if p.startswith("still"))


def test_the_reader_is_what_the_loader_maps(clips: Path) -> None:
    cfg = DataConfig(buckets=BUCKETS, unused_rows="report", workers=0)
    table = read_table(str(clips / "t.csv"))
    plan = BatchPlan(table, cfg, 8, 0)
    micro_batch = plan.step(0)[0]
    job = ReadTask(micro_batch, plan.members(micro_batch))
    (pixels,) = LoadTask((job,), is_pack=False).empty_pixels()
    batch = BatchReader(table, cfg, 0).load(job, pixels, api.read_frames)
    assert isinstance(batch, Batch) and batch.sample_ids == plan.step(0)[0].sample_ids
