"""The real commands on real files: train, stop by a signal, resume on any layout, export, sample."""

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from acceleration.checkpoint import newest
from acceleration.distributed.runtime import start, stop
from opensora.cli import sample
from opensora.config.load import load_config
from opensora.config.run import RunConfig, SampleConfig
from opensora.inference.find import find_source
from opensora.inference.load import load_components
from opensora.inference.pipeline import build_api, fit
from opensora.models.mmdit.convert import WEIGHTS
from opensora.models.weights.reader import read_state_dict
from opensora.planner.cost_fit import measured
from opensora.train.loop import train
from opensora.train.setup import start_run
from opensora.train.step_data import open_data
from opensora.utils.metrics_log import read_metrics
from tests.dist.harness import run_distributed

Consumed = list[tuple[int, tuple[int, ...]]]  # (step, sample ids) of every weighted micro-batch
LAYOUT_A: list[str] = []  # as in the configuration: ZeRO 3, ulysses 2
LAYOUT_B = ["parallel.zero=1", "parallel.mesh.ulysses=1", "parallel.recompute.kind=none"]


class Noting:
    """A run's Preparation that notes samples, and sends SIGTERM to its own process during a step."""

    def __init__(self, inner: Any, kill_at: int | None) -> None:
        self._inner, self._kill_at = inner, kill_at
        self.consumed: Consumed = []

    def __call__(self, batch: Any, step: int) -> Any:
        if batch.weight:
            self.consumed.append((step, batch.sample_ids))
        if step == self._kill_at:
            self._kill_at = None  # once: a second signal, more than a second later, means to leave at once
            os.kill(os.getpid(), signal.SIGTERM)
        return self._inner(batch, step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def train_in_process(config: Path, overrides: list[str], kill_at: int | None) -> tuple[bool, Consumed]:
    """What scripts/diffusion/train.py does, noting samples; only the last process is asked to stop."""
    with start_run(load_config(RunConfig, config, overrides)) as run:
        is_last = run.runtime.rank == run.runtime.world_size - 1
        run.prepare = noting = Noting(run.prepare, kill_at if is_last else None)  # type: ignore[assignment]
        counts = run.mesh.is_first_of_sample
        finished = train(run)
    return finished, noting.consumed if counts else []


def train_on(world: int, config: Path, overrides: list[str], kill_at: int | None = None) -> tuple[bool, Counter]:  # type: ignore[type-arg]
    """(finished, how often each (step, sample) was consumed) over all processes."""
    results = run_distributed(train_in_process, world, config, overrides, kill_at, timeout=110, init=False)
    assert len({finished for finished, _ in results}) == 1
    return results[0][0], Counter((step, i) for _, consumed in results for step, ids in consumed for i in ids)


def weights(folder: Path) -> dict[str, Tensor]:
    return read_state_dict(folder / "exported", WEIGHTS)[0]


def output(tmp_path: Path, name: str) -> tuple[list[str], Path]:
    return [f"output={tmp_path / name}"], tmp_path / name / "run"


@pytest.mark.timeout(300)
def test_stopped_and_resumed_equals_uninterrupted(config: Path, tmp_path: Path) -> None:
    """Bitwise on the same layout; to 1e-10 on another; every sample consumed exactly as often."""
    whole, whole_folder = output(tmp_path, "whole")
    finished, wanted = train_on(2, config, whole + LAYOUT_A)
    assert finished

    broken, broken_folder = output(tmp_path, "broken")
    finished, first = train_on(2, config, broken + LAYOUT_A, kill_at=2)
    assert not finished
    assert newest(broken_folder / "checkpoints") == broken_folder / "checkpoints/step-00000003"
    moved, moved_folder = output(tmp_path, "moved")
    (tmp_path / "moved").mkdir()
    os.system(f"cp -r {broken_folder} {moved_folder}")

    finished, second = train_on(2, config, broken + LAYOUT_A)
    assert finished and first + second == wanted
    for name, weight in weights(whole_folder).items():
        assert torch.equal(weights(broken_folder)[name], weight), name

    finished, second = train_on(3, config, moved + LAYOUT_B)
    assert finished and first + second == wanted
    for name, weight in weights(whole_folder).items():
        error = (weights(moved_folder)[name] - weight).abs().max() / weight.abs().max().clamp(min=1e-12)
        assert error <= 1e-10, name

    steps = [json.loads(line)["step"] for line in (broken_folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 6

    # What a run writes is what fitting the cost reads.
    records, events = read_metrics(whole_folder / "metrics.jsonl")
    _, plan = open_data(load_config(RunConfig, whole_folder / "config.yaml"))
    rows, seconds = measured(plan, records, {event["step"] for event in events})
    assert len(rows) == len(records) - 1 and (seconds > 0).all()


def test_samples_while_training_change_nothing_but_the_folder(config: Path, tmp_path: Path) -> None:
    plain, plain_folder = output(tmp_path, "plain")
    train_on(2, config, [*plain, "train.steps=3"])
    watched, watched_folder = output(tmp_path, "watched")
    sampling = "{width: 40, height: 24, num_frames: 5, num_steps: 2, fps: 8}"
    validate = ["validate.every=2", "validate.prompts=[a red circle, a blue square]", f"validate.sampling={sampling}"]
    train_on(2, config, [*watched, "train.steps=3", *validate])
    for name, weight in weights(plain_folder).items():
        assert torch.equal(weights(watched_folder)[name], weight), name
    records = [json.loads(line) for line in (watched_folder / "metrics.jsonl").read_text().splitlines()]
    for record in (record for record in records if "loss" in record):  # samples are not counted as steps' traffic
        for axis in ("ulysses", "fsdp"):
            assert record[f"comm/{axis}_gib"] == record[f"comm/{axis}_predicted_gib"] > 0
    made = sorted(path.name for path in (watched_folder / "samples/step-00000002/video_40x24").iterdir())
    assert made == ["contact_sheet.png", "sample_0000.mp4", "sample_0000.txt", "sample_0001.mp4", "sample_0001.txt"]


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after a few large steps, so that its velocities are not zero."""
    from tests.integration.conftest import CONFIG

    folder = tmp_path_factory.mktemp("trained")
    path = folder / "train.yaml"
    path.write_text(CONFIG.format(output=folder, table=shapes / "train.csv"))
    fp32 = [f"parallel.precision.{key}=fp32" for key in ("compute", "reduce", "master")]
    train_on(1, path, [*LAYOUT_B, *fp32, "optim.lr=0.02", "train.steps=8"])
    return folder / "run"


def sample_config(weights: Path, save_dir: Path, size: tuple[int, int, int]) -> SampleConfig:
    frames, height, width = size
    path = save_dir.parent / f"{save_dir.name}.yaml"
    path.write_text(
        f"weights: {weights}\nsave_dir: {save_dir}\nprecision: fp32\nnum_sample: 2\n"
        "prompts: [a red circle moves left on a gray background, a blue square]\n"
        f"sampling: {{num_frames: {frames}, height: {height}, width: {width}, num_steps: 4, guidance: 3.0, fps: 8}}\n"
        "parallel: {zero: 3, mesh: {shard: 1, ulysses: -1}, timeout_s: 60}\n"
    )
    return load_config(SampleConfig, path)


def sample_pixels(cfg: SampleConfig) -> Tensor:
    runtime = start(60)
    parts = load_components(cfg, find_source(cfg), runtime)
    pixels = build_api(parts)(fit(cfg.sampling, parts), text=list(cfg.prompts), seed=[0, 5])
    stop()
    return pixels


@pytest.mark.parametrize(
    "size",
    [pytest.param((9, 24, 40), id="clip"), pytest.param((1, 40, 40), id="still", marks=pytest.mark.slow)],
)
def test_any_number_of_processes_samples_the_same(trained: Path, tmp_path: Path, size: tuple[int, int, int]) -> None:
    """45 and 25 image tokens over 1, 2 and 4 processes, from the run and from its export; fp32, at most one level."""
    found = {}
    for world, source in ((1, trained), (2, trained), (4, trained / "exported")):
        cfg = sample_config(source, tmp_path / f"on{world}", size)
        every = run_distributed(sample_pixels, world, cfg, timeout=100, init=False)
        for pixels in every[1:]:
            assert torch.equal(pixels, every[0])
        found[world] = every[0]
    assert found[1].shape == (2, 3, *size) and found[1].std() > 0.05
    for world in (2, 4):
        assert (found[world] - found[1]).abs().max() <= 2 / 255, world  # pixels are in [-1, 1]: one level is 2/255


def sample_command(path: Path) -> int:
    return sample.main([str(path)])


def test_the_command_writes_videos_prompts_and_a_sheet(trained: Path, tmp_path: Path) -> None:
    """Two data-parallel processes share three clips and one seed each."""
    sample_config(trained, tmp_path / "out", (5, 32, 32))
    table = tmp_path / "prompts.csv"
    table.write_text("text,name\na red circle,red\na blue square,\na green cross,\n")
    path = tmp_path / "out.yaml"
    replaced = ("prompts:", "num_sample:", "parallel:")
    kept = [line for line in path.read_text().splitlines() if not line.startswith(replaced)]
    path.write_text("\n".join([*kept, f"prompt_csv: {table}", "parallel: {zero: 2, timeout_s: 60}"]))
    assert run_distributed(sample_command, 2, path, timeout=100, init=False) == [0, 0]
    folder = tmp_path / "out/video_32x32"
    names = {"red", "prompts_0001", "prompts_0002"}
    assert {p.name for p in folder.iterdir()} == {"contact_sheet.png"} | {
        f"{name}.{suffix}" for name in names for suffix in ("mp4", "txt")
    }
    assert (folder / "red.txt").read_text() == "a red circle\n"

    # Again into the same folder: names that are free, then the same ones.
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run_distributed(sample_command, 1, path, timeout=100, init=False) == [0]
    new = {path.name for path in folder.iterdir()} - set(first)
    names = {"red_1", "prompts_0003", "prompts_0004"}
    assert new == {"contact_sheet_1.png"} | {f"{name}.{suffix}" for name in names for suffix in ("mp4", "txt")}
    assert all((folder / name).read_bytes() == content for name, content in first.items())
    path.write_text(path.read_text() + "\noverwrite: true\n")
    assert run_distributed(sample_command, 1, path, timeout=100, init=False) == [0]
    assert {path.name for path in folder.iterdir()} == set(first) | new
