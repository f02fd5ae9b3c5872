"""What a user gets wrong costs one line and exit code 2, before anything is written or any process is met."""

import re
import sys
from pathlib import Path

import pytest
import torch

from acceleration.checkpoint import atomic_dir
from acceleration.distributed.runtime import Runtime
from opensora.cli import sample, train
from opensora.cli.main import run_cli
from opensora.config.load import load_config, save
from opensora.config.run import RunConfig
from opensora.train.state import resume
from opensora.train.state.resume import check_same, checkpoint_info
from opensora.utils.errors import UserError

BAD_TRAINING = {
    "unknown key": (["optim.learning_rate=1"], "2", "optim.learning_rate"),
    "wrong type": (["train.steps=many"], "2", "train.steps"),
    "heads not divisible": (
        ["parallel.mesh.tensor=3", "parallel.mesh.ulysses=1"],
        "3",
        "parallel.mesh.tensor=3: does not divide the 4 heads",
    ),
    "more processes than heads": (["parallel.mesh.ulysses=6"], "6", "use ulysses=3 with ring=2"),
    "missing column": (["data.table={folder}/no_column.csv"], "2", "text"),
    "empty table": (["data.table={folder}/empty.csv"], "2", "empty"),
    "missing file": (["data.table={folder}/nowhere.csv"], "2", "nowhere.csv"),
    "frames do not fit": (["data.buckets={{32px: {{8: [1.0, 2]}}}}"], "2", "data.buckets.32px.8"),
    "world size": (["parallel.mesh.ulysses=2", "parallel.mesh.shard=1"], "3", "does not fit 3 processes"),
    "channels": (["model.in_channels=12"], "2", "model.in_channels=16"),
    "no clip fits": (["data.buckets={{4096px: {{129: [1.0, 1]}}}}"], "2", "data.buckets"),
    "bad init": (["train.init_from={folder}/nothing"], "2", "nothing"),
    "adapters on no layer": (
        ["train.init_from={folder}", "lora.rank=2", "lora.targets=[blocks.*.qkv]"],
        "2",
        "lora.targets: slot pattern 'blocks.*.qkv' matches no Linear",
    ),
}


def refused(main, argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(sys, "argv", ["command", *argv])
    with pytest.raises(SystemExit) as exit_:
        run_cli(main)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_training(
    case: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, world, expected = BAD_TRAINING[case]
    header = "path,text,num_frames,height,width,fps\n"
    (tmp_path / "empty.csv").write_text(header)
    (tmp_path / "no_column.csv").write_text(header.replace("text,", "") + "a.mp4,5,32,32,8\n")
    for name, value in {"RANK": "0", "WORLD_SIZE": world, "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    error = refused(train.main, [str(config), *(o.format(folder=tmp_path) for o in overrides)], capsys, monkeypatch)
    assert expected in error, error
    assert not (tmp_path / "runs").exists()


def test_a_fresh_start_over_checkpoints(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = atomic_dir.stage(tmp_path / "runs/run/checkpoints", "x")
    atomic_dir.commit(staged, staged.parent / "step-00000007", {"step": 7}, {})
    error = refused(train.main, [str(config), "train.resume=none", "parallel.mesh.ulysses=1"], capsys, monkeypatch)
    assert "already has step-00000007" in error


def test_another_model_or_optimizer_is_named_before_loading(config: Path) -> None:
    cfg = load_config(RunConfig, config)
    manifest = checkpoint_info(cfg, Runtime(0, 1, 0, torch.device("cpu")), "")
    check_same(cfg, Path("step"), manifest)
    for override, expected in (
        ("model.depth=3", "model.depth=3 (was 2)"),
        ("optim.kind=sgd", "optim.kind=sgd (was adamw)"),
        ("optim.ema_decay=0", "optim.ema_decay=0 (was on)"),
    ):
        with pytest.raises(UserError, match=re.escape(expected)):
            check_same(load_config(RunConfig, config, [override]), Path("step"), manifest)


def test_other_adapters_or_another_base_are_named_before_loading(config: Path) -> None:
    adapted = ["lora.rank=2", "train.init_from=base"]
    cfg = load_config(RunConfig, config, adapted)
    manifest = checkpoint_info(cfg, Runtime(0, 1, 0, torch.device("cpu")), "", "0123")
    check_same(cfg, Path("step"), manifest, "0123")
    for overrides, base, expected in (
        ([*adapted, "lora.rank=4"], "0123", "lora.rank=4 (was 2)"),
        ([], None, "lora.rank=0 (was 2)"),
        (adapted, "4567", "train.init_from=base: not the weights that the adapters of step were trained beside"),
    ):
        with pytest.raises(UserError, match=re.escape(expected)):
            check_same(load_config(RunConfig, config, overrides), Path("step"), manifest, base)
    plain = checkpoint_info(load_config(RunConfig, config), Runtime(0, 1, 0, torch.device("cpu")), "")
    del plain["lora"], plain["base"]  # as checkpoints from before there were adapters
    check_same(load_config(RunConfig, config), Path("step"), plain)


def test_changed_settings_are_announced(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(resume, "announce", said.append)
    save(load_config(RunConfig, config), tmp_path / "runs/run/config.yaml")
    resume.announce_changes(load_config(RunConfig, config, ["parallel.zero=1", "train.steps=9", "data.workers=0"]))
    assert said == []
    resume.announce_changes(load_config(RunConfig, config, ["data.micro_batches=4", "optim.lr=0.5"]))
    assert "data.micro_batches=4 (was 3); optim.lr=0.5 (was 0.001)" in said[0]


def test_every_change_is_said_and_what_changes_the_numbers_first(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the configuration in the checkpoint, whatever became of that in the run's folder."""
    said: list[str] = []
    monkeypatch.setattr(resume, "announce", said.append)
    cfg = load_config(RunConfig, config)
    manifest = checkpoint_info(cfg, Runtime(0, 1, 0, torch.device("cpu")), "")
    resume.announce_changes(cfg, manifest)
    resume.announce_changes(load_config(RunConfig, config, ["train.steps=9", "parallel.zero=1"]), manifest)
    assert said == []
    changes = {
        "validate.every": (7, 0),
        "data.micro_batches": (4, 3),
        "data.crop": ("random", "center"),
        "optim.lr": (0.5, 0.001),
        "optim.warmup_steps": (5, 3),
        "optim.weight_decay": (0.25, cfg.optim.weight_decay),
        "conditioning.dropout.text": (0.5, cfg.conditioning.dropout.text),
        "seed": (4, 3),
        "guard.max_bad": (2, 5),
        "parallel.precision.reduce": ("fp32", "fp64"),
    }
    overrides = [f"{key}={pair[0]}" for key, pair in changes.items() if pair]
    resume.announce_changes(load_config(RunConfig, config, [*overrides, "validate.prompts=[a]"]), manifest)
    assert len(said) == 1 and "more" not in said[0]
    for key, pair in changes.items():
        assert pair and f"{key}={pair[0]} (was {pair[1]})" in said[0], key
    order = [said[0].index(f"{key}=") for key in ("seed", "data.micro_batches", "optim.lr", "guard.max_bad")]
    assert max(order) < said[0].index("validate.every=")


def test_the_number_of_steps_counts_where_the_learning_rate_depends_on_it(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(resume, "announce", said.append)
    cosine = ["optim.schedule=cosine"]
    manifest = checkpoint_info(load_config(RunConfig, config, cosine), Runtime(0, 1, 0, torch.device("cpu")), "")
    resume.announce_changes(load_config(RunConfig, config, [*cosine, "train.steps=9", "train.log_every=1"]), manifest)
    assert said == ["resuming with other settings than before: train.steps=9 (was 6)"]


def odd_paths(tmp_path: Path) -> None:
    """What somebody may give as a checkpoint or as weights."""
    for name in ("empty", "run/checkpoints/step-00000008", "exported"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("file", "exported/model.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "run/checkpoints/step-00000008/manifest.json").write_text("{}")
    (tmp_path / "run/checkpoints/step-00000008/shard-00000.safetensors").write_text("")


ODD_PATHS = {
    "resume=nowhere": "no such file or folder",
    "resume=file": "a file; give the folder of a run, or one of its checkpoints, called as step-00000008",
    "resume=empty": "no checkpoint there; give the folder of a run",
    "resume=/etc": "no checkpoint there; give the folder of a run",
    "resume=exported": "exported weights; start from them by train.init_from",
    "init_from=nowhere": "no such file or folder",
    "init_from=run": "the folder of a run; give run/exported, or go on with it by train.resume",
    "init_from=run/checkpoints/step-00000008": "one checkpoint of a run, whose tensors are in pieces; give ",
}


@pytest.mark.parametrize("case", ODD_PATHS)
def test_odd_paths_of_checkpoints_and_weights(
    case: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd_paths(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    more = ["parallel.mesh.ulysses=1", "output=other"]
    error = refused(train.main, [str(config), *more, f"train.{case}"], capsys, monkeypatch)
    assert error.startswith(f"error: train.{case}: ") and ODD_PATHS[case] in error, error
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("weights: {folder}/nowhere", "nowhere"),
        ("weights: {folder}", "no weights there"),
        ("weights: {folder}\nnum_smaple: 2", "num_sample"),
    ],
)
def test_sampling(
    line: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sample.yaml"
    path.write_text(f"prompt: a cat\nsave_dir: {tmp_path}/out\n" + line.format(folder=tmp_path))
    assert expected in refused(sample.main, [str(path)], capsys, monkeypatch)
    assert not (tmp_path / "out").exists()
