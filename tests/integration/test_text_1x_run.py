"""Runs that read T5 with its mask, and an embedding of the model's own for no prompt: whole or cut over processes, from
clips or from stored features, and the samples of what was trained."""

from pathlib import Path

import pytest

from opensora.cli import precompute, sample, train
from opensora.utils.metrics_log import read_metrics
from tests import factored_family
from tests.dist.harness import run_distributed
from tests.text_models import write_text_models

MODEL = f"model: {{kind: {factored_family.KIND}, channels: 16, text_dim: 16, width: 32, heads: 4, depth: 1}}\n"


def run(command: str, argv: list[str]) -> int:
    """In every process, as under torchrun; the import above has registered the family."""
    return {"train": train.main, "sample": sample.main, "precompute": precompute.main}[command](argv)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_train_and_sample_with_t5(config: Path, tmp_path: Path) -> None:
    write_text_models(tmp_path)
    before, _, rest = config.read_text().partition("model:\n")
    factored = tmp_path / "factored.yaml"
    factored.write_text(before + MODEL + rest[rest.index("vae:") :])
    common = [
        str(factored),
        f"text={{kind: t5, t5_path: {tmp_path}/t5, max_tokens: 12}}",
        f"objective={{kind: {factored_family.OBJECTIVE}, sigma_min: 0.001}}",
        "conditioning={dropout: {text: 0.3}}",
        "train.log_every=1",
    ]
    runs = {
        "cut": (2, ["text.shard=true"]),
        "whole": (1, ["parallel.mesh.ulysses=1"]),
        "stored": (1, ["parallel.mesh.ulysses=1", f"data.features={tmp_path / 'features'}"]),
    }
    argv = [*common, "--out", str(tmp_path / "features"), "--epochs", "2", "parallel.mesh.ulysses=1"]
    assert run_distributed(run, 1, "precompute", argv, timeout=280, init=False) == [0]
    losses = {}
    for name, (world, extra) in runs.items():
        argv = [*common, f"output={tmp_path / name}", *extra]
        assert run_distributed(run, world, "train", argv, timeout=280, init=False) == [0] * world
        losses[name] = [record["loss"] for record in read_metrics(tmp_path / name / "run" / "metrics.jsonl")[0]]
    assert len(losses["whole"]) == 6 and losses["stored"] == losses["whole"]
    assert losses["cut"] == pytest.approx(losses["whole"], rel=1e-9)
    made = []
    for world in (1, 2):
        job, out = tmp_path / f"job{world}.yaml", tmp_path / f"samples{world}"
        job.write_text(f"weights: {tmp_path / 'whole' / 'run' / 'exported'}\nprompt: A <b>Red</b> circle\n")
        sampling = "sampling={width: 32, height: 32, num_frames: 9, num_steps: 2, fps: 8, guidance: 3.0}"
        argv = [str(job), f"save_dir={out}", "precision=fp64", sampling, f"parallel.mesh.ulysses={world}"]
        assert run_distributed(run, world, "sample", argv, timeout=280, init=False) == [0] * world
        made.append({file.name: file.read_bytes() for file in out.rglob("*.mp4")})
    assert made[0] and made[0] == made[1]
