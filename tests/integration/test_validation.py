"""Validation while training: the numbers that formulas give, on any layout; training as if nothing had been."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from opensora.cli.plot import main as plot
from opensora.cli.precompute import main as precompute
from tests.dist.harness import DistributedFailure, run_distributed
from tests.faults.runs import digest
from tests.integration.validation import (
    SIGKILL,
    SIGTERM,
    by_formula,
    killed_in_a_round,
    numbers,
    rounds,
    train_watched,
)

BINS, SEED, SAMPLES = 2, 4, 8
SHORT = (
    *("train.steps=2", "train.log_every=1", "optim.warmup_steps=0"),
    "data.buckets={32px: {1: [1.0, 3], 5: [1.0, 2]}}",
)
SAMPLING = "{width: 40, height: 24, num_frames: 5, num_steps: 1, fps: 8}"
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1-zero0": (1, ["parallel.zero=0", "parallel.mesh.ulysses=1"]),
    "1-offload": (1, ["parallel.offload=optimizer", "parallel.mesh.ulysses=1"]),
    "1-workers": (1, ["data.workers=0", "parallel.mesh.ulysses=1"]),
    "2-shard2-zero1": (2, ["parallel.zero=1", "parallel.mesh.ulysses=1"]),
    "2-shard2-zero2": (2, ["parallel.zero=2", "parallel.mesh.ulysses=1"]),
    "2-ring2-zero3": (2, ["parallel.mesh.ring=2", "parallel.mesh.ulysses=1"]),
    "2-tensor2-zero0": (2, ["parallel.mesh.tensor=2", "parallel.mesh.ulysses=1", "parallel.zero=0"]),
    "2-ulysses2-dynamic": (2, ["parallel.mesh.dynamic=true"]),
    "3-shard3-zero3": (3, ["parallel.mesh.ulysses=1"]),
    "4-shard2-ulysses2-zero2": (4, ["parallel.zero=2"]),
    "4-ring2-tensor2-zero1": (4, ["parallel.mesh={ring: 2, tensor: 2, ulysses: 1}", "parallel.zero=1"]),
    "4-replicate2-ulysses2-zero3": (4, ["parallel.mesh={replicate: 2}"]),
}


@pytest.fixture(scope="module")
def held_out(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips of the training under other names, of which some are used, in a table of its own."""
    folder = tmp_path_factory.mktemp("held_out")
    with (shapes / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        name = row["path"].replace("/", "-")
        shutil.copy(shapes / row["path"], folder / name)
        row["path"] = name
    with (folder / "held_out.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return folder / "held_out.csv"


def options(folder: Path, table: Path, *, clips: bool = False) -> list[str]:
    given = [f"output={folder}", *SHORT, "validate.every=1", f"validate.table={table}"]
    given += [f"validate.samples={SAMPLES}", f"validate.bins={BINS}", f"validate.seed={SEED}"]
    return given + (["validate.prompts=[a red circle]", f"validate.sampling={SAMPLING}"] if clips else [])


def run_on(world: int, config: Path, overrides: list[str], function: Any = train_watched, *args: Any) -> list[Any]:
    return run_distributed(function, world, config, overrides, *args, timeout=200, init=False)


@pytest.fixture(scope="module")
def first(shapes: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(configuration, folder) of a run on two processes that share their samples."""
    from tests.integration.conftest import CONFIG

    folder = tmp_path_factory.mktemp("first")
    config = folder / "train.yaml"
    config.write_text(CONFIG.format(output=folder, table=shapes / "train.csv"))
    assert run_on(2, config, options(folder / "runs", held_out, clips=True)) == [2, 2]
    return config, folder / "runs/run"


@pytest.mark.timeout(300)
def test_the_numbers_are_those_of_the_formulas(first: tuple[Path, Path]) -> None:
    """Of the moving average, in the last round, which is what the run has exported."""
    found, wanted = rounds(first[1])[-1], by_formula(first[1], BINS, SEED)
    assert wanted["validate/samples"] == SAMPLES and wanted.keys() == {
        name for name in found if name.startswith("validate/") and not name.startswith("validate/bins/")
    }
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-10), name
    for name in (name for name in found if name.startswith("validate/bins/")):  # equally many values in each
        mean = sum(found[name]) / BINS
        assert mean == pytest.approx(found[name.replace("/bins/", "/bucket/")], rel=1e-12) and len(found[name]) == BINS


@pytest.mark.timeout(300)
def test_training_is_as_if_nothing_had_been(first: tuple[Path, Path], tmp_path: Path) -> None:
    """The same bits in every record and tensor. Within the first run no generator, mode or tensor was another after a
    round (``train_watched``)."""
    config, folder = first
    assert run_on(2, config, [f"output={tmp_path}", *SHORT]) == [0, 0]
    assert digest(tmp_path / "run") == digest(folder)
    losses = [
        [(line["loss"], line["grad_norm"]) for line in map(json.loads, path.read_text().splitlines()) if "loss" in line]
        for path in (folder / "metrics.jsonl", tmp_path / "run/metrics.jsonl")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    made = sorted(path.name for path in (folder / "samples/step-00000001/video_40x24").iterdir())
    assert made == ["contact_sheet.png", "sample_0000.mp4", "sample_0000.txt"]


def test_a_chart_shows_it(first: tuple[Path, Path], tmp_path: Path) -> None:
    assert plot([str(first[1]), "--out", str(tmp_path / "loss.png")]) == 0
    assert (tmp_path / "loss.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same(first: tuple[Path, Path], held_out: Path, tmp_path: Path, layout: str) -> None:
    world, overrides = LAYOUTS[layout]
    assert run_on(world, first[0], [*options(tmp_path, held_out), *overrides]) == [2] * world
    for found, wanted in zip(rounds(tmp_path / "run"), rounds(first[1]), strict=True):
        assert numbers(found) == pytest.approx(numbers(wanted), rel=1e-10)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_packs_samples(first: tuple[Path, Path], held_out: Path, tmp_path: Path) -> None:
    """Held-out clips are not packed: the numbers are those of the run that packs nothing. SGD, as Adam would make steps
    of the roundings of gradients that are zero at the start."""
    sgd = ["optim.kind=sgd", "optim.lr=0.1", "data.micro_batches=6", "data.balance_group=3"]
    found = []
    for name, packs in {"alone": [], "packed": ["data.tokens_per_sequence=200"]}.items():
        assert run_on(2, first[0], [*options(tmp_path / name, held_out), *sgd, *packs]) == [2, 2]
        found.append([numbers(event) for event in rounds(tmp_path / name / "run")])
    for packed, alone in zip(*found, strict=True):
        assert packed == pytest.approx(alone, rel=1e-10)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_from_stored_features_reads_held_out_clips(
    first: tuple[Path, Path], held_out: Path, tmp_path: Path
) -> None:
    assert precompute([str(first[0]), "--out", str(tmp_path / "features"), *SHORT]) == 0
    stored = [*options(tmp_path, held_out), f"data.features={tmp_path / 'features'}"]
    assert run_on(2, first[0], stored) == [2, 2]
    for found, wanted in zip(rounds(tmp_path / "run"), rounds(first[1]), strict=True):
        assert numbers(found) == pytest.approx(numbers(wanted), rel=1e-10)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_references_of_clips_and_of_held_out_ones(first: tuple[Path, Path], held_out: Path, tmp_path: Path) -> None:
    """Kinds are drawn for held-out clips as for others, on any layout alike; a table of prompts has its references."""
    references = ["model.cond_embed=true", "conditioning.known_in_loss=false"]
    references.append("conditioning.references={i2v_head: 2, t2v: 1, i2v_loop: 1}")
    Image.new("RGB", (50, 30), "red").save(tmp_path / "red.png")
    (tmp_path / "prompts.csv").write_text("text,name,ref\na red circle,with,red.png\na blue square,without,\n")
    clips = [f"validate.prompt_csv={tmp_path / 'prompts.csv'}", "validate.cond_type=i2v_head"]
    clips.append(f"validate.sampling={SAMPLING}")
    one, two = tmp_path / "one", tmp_path / "two"
    base = [*references, *clips]
    assert run_on(1, first[0], [*options(one, held_out), *base, "parallel.mesh.ulysses=1"]) == [2]
    assert run_on(2, first[0], [*options(two, held_out), *base]) == [2, 2]
    for found, wanted in zip(rounds(two / "run"), rounds(one / "run"), strict=True):
        assert numbers(found) == pytest.approx(numbers(wanted), rel=1e-10)
    made = {path.name for path in (two / "run/samples/step-00000002/video_40x24").iterdir()}
    assert made == {"contact_sheet.png", "with.mp4", "with.txt", "without.mp4", "without.txt"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_clip_that_cannot_be_read_is_left_out(first: tuple[Path, Path], held_out: Path, tmp_path: Path) -> None:
    """And nothing else changes: the others are weighted as they are."""
    folder = tmp_path / "damaged"
    shutil.copytree(held_out.parent, folder)
    with held_out.open() as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    config, whole = first
    used = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    assert used["event"] == "started"
    from opensora.config.load import load_config
    from opensora.config.run import RunConfig
    from opensora.train.held_out import open_held_out

    held = open_held_out(load_config(RunConfig, whole / "config.yaml"))
    assert held is not None
    broken = held.sample_ids[3]
    (folder / paths[broken]).write_bytes(b"nothing to see")
    assert run_on(2, config, [*options(tmp_path, folder / "held_out.csv"), "parallel.mesh.ulysses=1"]) == [2, 2]
    found, wanted = rounds(tmp_path / "run")[-1], by_formula(tmp_path / "run", BINS, SEED, left_out=(broken,))
    assert wanted["validate/samples"] == SAMPLES - 1
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-10), name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("step", [1, 2])
def test_a_kill_in_a_round_loses_nothing(first: tuple[Path, Path], held_out: Path, tmp_path: Path, step: int) -> None:
    """The checkpoint of its step is there, the round is made again when the run goes on, and all ends the same."""
    overrides = [*options(tmp_path, held_out), "train.checkpoint_every=1", "train.checkpoint_async=false"]
    with pytest.raises(DistributedFailure):
        run_on(2, first[0], overrides, killed_in_a_round, step, SIGKILL)
    assert (tmp_path / f"run/checkpoints/step-{step:08d}").is_dir()
    assert [event["step"] for event in rounds(tmp_path / "run")] == list(range(1, step))
    assert run_on(2, first[0], overrides) == [
        2 - step,
        2 - step,
    ]  # and the one that was broken off, before the first step
    assert [numbers(found) for found in rounds(tmp_path / "run")] == [numbers(wanted) for wanted in rounds(first[1])]
    assert digest(tmp_path / "run") == digest(first[1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stop_in_a_round_does_not_wait_for_its_end(first: tuple[Path, Path], held_out: Path, tmp_path: Path) -> None:
    overrides = options(tmp_path, held_out)
    assert run_on(2, first[0], overrides, killed_in_a_round, 1, SIGTERM) == ["stopped at 1"] * 2
    assert rounds(tmp_path / "run") == [] and (tmp_path / "run/checkpoints/step-00000001").is_dir()
    assert run_on(2, first[0], overrides) == [1, 1]
    assert [numbers(found) for found in rounds(tmp_path / "run")] == [numbers(wanted) for wanted in rounds(first[1])]
    assert digest(tmp_path / "run") == digest(first[1])
