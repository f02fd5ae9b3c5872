"""A clip table of raw videos trains a step and is precomputed, as it is, from files and from archives."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as papq
import pytest

from data_pipeline.config import PipelineConfig
from data_pipeline.engines.config import EngineConfig
from data_pipeline.run import run
from data_pipeline.stages.cut import CutConfig
from data_pipeline.stages.filter import FilterRule
from data_pipeline.stages.shots import ShotsConfig
from opensora.cli.precompute import main as precompute
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.datasets.table.index import open_table
from opensora.train.loop import train
from opensora.train.setup import start_run
from tests.dist.harness import run_distributed


def train_in_process(config: Path, overrides: list[str]) -> bool:
    with start_run(load_config(RunConfig, config, overrides)) as started:
        return train(started)


@pytest.fixture(scope="module", params=["files", "tar"])
def table(request: pytest.FixtureRequest, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of rendered clips of nine frames as raw videos, one of them with a caption beside it."""
    folder = tmp_path_factory.mktemp("raw")
    clips = sorted(shapes.rglob("*.mp4"))[:8]
    for number, path in enumerate(clips):
        shutil.copy(path, folder / f"{number}.mp4")
    (folder / "0.txt").write_text("A caption that a person wrote.")
    (folder / "broken.mp4").write_bytes(clips[0].read_bytes()[:300])
    out = folder / "out"
    cut = CutConfig(short_side=32, preset="ultrafast", container=request.param)
    shots, filters = ShotsConfig(detector="none", min_s=0.1), {"short": FilterRule(column="duration_s", min=0.2)}
    place = {"source": str(folder), "out": str(out), "engine": EngineConfig(workers=1)}
    cfg = PipelineConfig(cut=cut, shots=shots, filters=filters, **place)  # type: ignore[arg-type]
    assert run(cfg) == 0
    return out / "clips.parquet"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_step_and_precompute(config: Path, table: Path, tmp_path: Path) -> None:
    rows = papq.read_table(table).to_pylist()
    kept = [row["text"] for row in rows if row["keep"]]
    assert kept and len(kept) < len(rows) and "A caption that a person wrote." in kept
    clips = open_table(str(table), index=str(tmp_path / "index"))
    assert [clips.caption(row) for row in range(len(clips))] == kept
    overrides = [f"data.table={table}", "data.buckets={32px: {1: [1.0, 2], 5: [1.0, 2]}}", "data.prompt_suffix=true"]
    overrides += [
        "data.unused_rows=report",
        "parallel.mesh.ulysses=1",
        "train.steps=2",
        "train.log_every=1",
        "optim.warmup_steps=1",
    ]
    features = tmp_path / "features"
    assert precompute([str(config), "--out", str(features), *overrides]) == 0
    for more in ([], [f"data.features={features}"]):
        place = tmp_path / f"run{len(more)}"
        (found,) = run_distributed(
            train_in_process, 1, config, [*overrides, *more, f"output={place}"], timeout=280, init=False
        )
        assert found is True
        lines = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
        assert len([line for line in lines if "loss" in line]) >= 2
        assert all(line.get("data/replaced", 0) == 0 for line in lines)
