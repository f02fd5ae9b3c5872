"""Training from stored features is training from the files, command by command."""

import json
from pathlib import Path

import pytest
import torch

from opensora.cli.precompute import main as precompute
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.models.mmdit.convert import WEIGHTS
from opensora.models.weights.reader import read_state_dict
from opensora.train.loop import train
from opensora.train.setup import start_run
from opensora.utils.errors import UserError
from tests.dist.harness import run_distributed


def train_in_process(config: Path, overrides: list[str]) -> bool:
    with start_run(load_config(RunConfig, config, overrides)) as run:
        assert (run.prepare.encoders.autoencoder is None) == run.prepare.encoders.stored
        return train(run)


def too_many_unreadable(config: Path, overrides: list[str]) -> str:
    run = start_run(load_config(RunConfig, config, overrides))
    try:
        train(run)
        return "finished"
    except UserError as error:
        run.data.close()
        return str(error)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_same_weights_come_out(config: Path, tmp_path: Path) -> None:
    """All in fp64 but the encoders, on two processes that share the tokens of every clip."""
    one_length = ["data.buckets={32px: {1: [1.0, 3], 5: [1.0, 2]}}", "train.steps=4", "train.log_every=1"]
    assert precompute([str(config), "--out", str(tmp_path / "features"), *one_length]) == 0
    stored = [f"data.features={tmp_path / 'features'}"]
    for name, more in {"files": [], "stored": stored}.items():
        assert run_distributed(
            train_in_process, 2, config, [*one_length, f"output={tmp_path / name}", *more], timeout=280, init=False
        ) == [True, True]
    found = [read_state_dict(tmp_path / name / "run/exported", WEIGHTS)[0] for name in ("files", "stored")]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / name / "run/metrics.jsonl").read_text().splitlines()]
        for name in ("files", "stored")
    ]
    assert losses[0] == losses[1] and len(losses[0]) >= 4
    record = json.loads((tmp_path / "stored/run/metrics.jsonl").read_text().splitlines()[-1])
    assert record["data/replaced"] == 0 and record["data/decode_ms"] >= 0 and record["data/wait_s"] >= 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_too_many_unreadable_clips_end_a_run_in_one_line(config: Path, shapes: Path, tmp_path: Path) -> None:
    table = (shapes / "train.csv").read_text().splitlines()
    clips = [line.split(",")[0] for line in table[1:] if ".mp4" in line.split(",")[0]]
    broken = tmp_path / "t.csv"
    broken.write_text("\n".join(table).replace(clips[0], "nowhere.mp4").replace(clips[1], "nothing.mp4"))
    overrides = [f"data.table={broken}", f"data.root={shapes}", "data.max_bad_share=0", "parallel.mesh.ulysses=1"]
    (said,) = run_distributed(too_many_unreadable, 1, config, [*overrides, "train.steps=60"], timeout=280, init=False)
    assert said.startswith("data.max_bad_share=0: 1 of the last") and "\n" not in said
    lines = (tmp_path / "runs/run/unreadable/rank-00000.jsonl").read_text().splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["path"].endswith((".mp4",))
