"""What an earlier release left goes on: tests/fixtures/run_before_moves was written by commit ff27067.

Its configuration has keys that had other names then. It stopped after three steps, in fp64; what the same release made
of three more is written down here.
"""

import shutil
from pathlib import Path

import pytest

from opensora.config.load import load_config
from opensora.config.run import RunConfig, SampleConfig
from opensora.config.strict_yaml import read_yaml
from opensora.inference.find import find_source
from opensora.models.mmdit.convert import WEIGHTS
from opensora.models.weights.reader import read_state_dict
from opensora.train.state import resume
from opensora.utils.files import digests
from opensora.utils.metrics_log import read_metrics
from tests.dist.harness import run_distributed
from tests.faults.runs import run_with

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_before_moves"
LOSSES = [1.7257252341505516, 1.6981527848921099, 2.182878655425262]  # of steps 4 to 6


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_of_before_resumes_with_the_same_numbers(world: int, old: Path) -> None:
    """From features that were stored then; on another number of processes too."""
    overrides = ["train.steps=6", f"output={old}", f"data.table={old}/clips.csv", f"data.features={old}/features"]
    ends = run_distributed(run_with, world, old / "run.yaml", overrides, init=False)
    assert [(end.end, end.step) for end in ends] == [("finished", 6)] * world
    records, events = read_metrics(old / "run" / "metrics.jsonl")
    assert [record["loss"] for record in records][3:] == pytest.approx(LOSSES, rel=1e-10)
    assert [event["step"] for event in events if event["event"] == "resumed"] == [3]


def test_keys_of_before_are_read_from_a_saved_configuration(old: Path) -> None:
    cfg = load_config(RunConfig, old / "run" / "config.yaml")
    assert (cfg.data.unused_rows, cfg.data.balance_group, cfg.guard.max_rollbacks) == ("report", 2, 3)
    old_flow = read_yaml(old / "run" / "config.yaml")[0]["flow"]
    dropout = cfg.conditioning.dropout
    assert cfg.objective.sigma_min == old_flow["sigma_min"]
    assert dropout.text == dropout.pooled == old_flow["text_dropout"]


def test_nothing_is_said_of_keys_that_there_were_not_yet(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(resume, "announce", said.append)
    saved, folder = read_yaml(old / "run" / "config.yaml")[0], [f"output={old}"]
    resume.announce_changes(load_config(RunConfig, old / "run" / "config.yaml", folder), {"config": saved})
    assert said == []
    changed = [*folder, "flow.text_dropout=0.75", "conditioning.dropout.pooled=0.5"]
    resume.announce_changes(load_config(RunConfig, old / "run" / "config.yaml", changed), {"config": saved})
    assert "conditioning.dropout.text=0.75" in said[0] and "conditioning.dropout.pooled=0.5" in said[0]


def test_an_export_of_before_can_be_sampled_from(old: Path) -> None:
    digests.verify(old / "run" / "exported", ["model.safetensors", "config.yaml"])
    cfg = load_config(SampleConfig, {"weights": "run/exported", "prompt": "a red circle"})
    source = find_source(cfg)
    tensors, layout = read_state_dict(source.path, WEIGHTS)
    assert source.model.hidden_size == 16 and layout.fused_qkv and len(tensors) > 40
