"""A run stopped at any step and continued by any number of ranks and workers consumes the same samples, with the same
windows, crops, captions and noise. Every start builds everything anew, as a new process does."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from opensora.conditioning import DropoutConfig
from opensora.conditioning.dropout import drop_text
from opensora.datasets import DataConfig
from opensora.datasets.decode import api
from opensora.datasets.loading import loader, reader
from opensora.datasets.loading.loader import build_loader
from opensora.datasets.plan.batch_plan import BatchPlan
from opensora.datasets.table.index import open_index, open_table
from opensora.schedulers.timesteps import draw_per_sample
from tests.unit.test_clip_index import make_tables

SEED, STEPS, STOPS = 5, 80, 200
# Every length is drawn, so that epochs differ in length; 1,500 rows make about 20 steps of an epoch.
BUCKETS = {"12px": {1: [0.7, 5], 5: [[0.9, 0.3], 4], 17: [[0.8, 0.5], 2]}, "24px": {1: [0.5, 3], 9: [[0.6, 0.5], 2]}}
Trace = dict[tuple[int, tuple[int, ...]], Any]


def fake_frames(path: str, start: int, frames: int, interval: int, *, resize: Any, **options: Any) -> np.ndarray:
    """(T, H, W, 3) that tell clip, frame and place apart, larger than any crop."""
    height, width = resize(160, 288)
    place = np.arange((height + 5) * (width + 7) * 3, dtype=np.uint8).reshape(1, height + 5, width + 7, 3)
    time = (sum(path.encode()) + 7 * (start + interval * np.arange(frames))).astype(np.uint8)
    return time[:, None, None, None] + place


class FakeProcess:
    """A decoding process that is none."""

    since, reading = math.inf, None

    def __call__(self, *args: Any, **options: Any) -> np.ndarray:
        return fake_frames(*args, **options)

    def close(self) -> None:
        """Nothing to end."""


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tables")
    return [str(path) for path in make_tables(folder, rows=250)]


def run(tables: list[str], steps: range, degree: int, workers: int, pack: int) -> Trace:
    """What all ranks together consume in these steps: (step, sample ids) -> digest of everything drawn for them."""
    open_index.cache_clear()
    cfg = DataConfig(
        table=tables,
        buckets=BUCKETS,
        probability="accept",
        unused_rows="report",
        micro_batches=12,
        balance_group=pack,
        crop="random",
        prompt_suffix=True,
        workers=workers,
    )
    table = open_table(cfg.table)
    trace: Trace = {}
    for rank in range(degree):
        plan = BatchPlan(table, cfg, 4, SEED)
        batches = build_loader(
            table,
            plan,
            cfg,
            start_step=steps.start,
            stop_step=steps.stop,
            dp_rank=rank,
            dp_degree=degree,
            seed=SEED,
        )
        for step in steps:
            for _ in plan.assign(step, rank, degree):
                batch = next(batches)
                if batch.weight:
                    assert (step, batch.sample_ids) not in trace
                    trace[step, batch.sample_ids] = drawn(batch, step)
        batches.close()
    return trace


def drawn(batch: reader.Batch, step: int) -> tuple:
    """Everything random about a batch."""
    ids = batch.sample_ids
    noise = draw_per_sample(SEED, step, ids, "noise", (1, 2, 2, 2))
    dropped = [drop.tolist() for drop in drop_text(SEED, step, ids, DropoutConfig(text=0.3, pooled=0.3))]
    pixels = batch.pixels[:, :, :, 0, 0].tolist(), int(batch.pixels.sum())
    return batch.epoch, str(batch.bucket), batch.prompts, pixels, noise.tolist(), dropped


def stops(count: int) -> list[tuple[int, int]]:
    """(step it resumes at, ranks)."""
    rng = np.random.default_rng(1)
    return [(int(rng.integers(0, STEPS)), int(rng.choice([1, 2, 3, 4, 5, 6, 12]))) for _ in range(count)]


@pytest.fixture(scope="module", autouse=True)
def frames() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setattr(api, "read_frames", fake_frames)
    patch.setattr(loader, "DecoderProcess", FakeProcess)
    torch.set_num_threads(1)
    yield
    patch.undo()


@pytest.fixture(scope="module", params=[1, 4], ids=["pack 1", "pack 4"])
def uninterrupted(tables: list[str], request: pytest.FixtureRequest) -> tuple[int, Trace]:
    """(pack, one process in one go)."""
    return request.param, run(tables, range(STEPS), 1, 0, request.param)


def part(trace: Trace, steps: range) -> Trace:
    return {key: value for key, value in trace.items() if key[0] in steps}


def test_two_hundred_stops(tables: list[str], uninterrupted: tuple[int, Trace]) -> None:
    """Half of them for each way to compose steps."""
    pack, whole = uninterrupted
    assert len({epoch for epoch, *_ in whole.values()}) > 2
    assert len({step for step, _ in whole}) == STEPS
    for first, degree in stops(STOPS // 2):
        steps = range(first, first + 1)
        assert run(tables, steps, degree, 0, pack) == part(whole, steps), (first, degree)


@pytest.mark.parametrize(("first", "degree", "workers"), [(17, 1, 1), (53, 2, 2)])
def test_workers_change_nothing(
    tables: list[str], uninterrupted: tuple[int, Trace], first: int, degree: int, workers: int
) -> None:
    pack, whole = uninterrupted
    steps = range(first, first + 3)
    assert run(tables, steps, degree, workers, pack) == part(whole, steps)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_hundred_stops_with_workers(tables: list[str], uninterrupted: tuple[int, Trace]) -> None:
    pack, whole = uninterrupted
    rng = np.random.default_rng(2)
    for first, degree in stops(STOPS // 2):
        steps = range(first, min(first + 3, STEPS))
        assert run(tables, steps, degree, int(rng.integers(1, 3)), pack) == part(whole, steps), (first, degree)
