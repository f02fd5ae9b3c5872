"""What the doctor says of files that are there, are not, or are of something else; on both kinds of configuration."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora.cli import doctor, forecast
from opensora.cli.doctor import main
from opensora.config.load import is_training
from opensora.config.run import RunConfig
from opensora.models.families import MODEL_SIZES, build_model
from opensora.utils.errors import UserError
from tests.text_models import write_text_models

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = """
weights: {folder}/ckpts/Open_Sora_v2.safetensors
model: {{kind: mmdit, size: debug, in_channels: 64, context_in_dim: 16, vec_in_dim: 16}}
vae: {{kind: dct, channels: 16}}
text: {{kind: t5_clip, t5_path: {folder}/ckpts/google/t5-v1_1-xxl, clip_path: {folder}/clip, shard: true}}
sampling: {{resolution: 64px, num_frames: 5}}
parallel: {{mesh: {{shard: 1, ulysses: -1}}}}
"""
TRAIN = """
name: run
output: {folder}/outputs
data: {{table: {folder}/clips.csv, buckets: {{64px: {{5: [1.0, 2]}}}}, micro_batches: 8}}
model: {{kind: mmdit, size: debug, in_channels: 64, context_in_dim: 16, vec_in_dim: 16}}
vae: {{kind: dct, channels: 16}}
text: {{kind: t5_clip, t5_path: {folder}/ckpts/google/t5-v1_1-xxl, clip_path: {folder}/clip}}
train: {{steps: 10, init_from: {folder}/ckpts/Open_Sora_v2.safetensors}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sample.yaml").write_text(SAMPLE.format(folder=tmp_path))
    (tmp_path / "train.yaml").write_text(TRAIN.format(folder=tmp_path))
    (tmp_path / "more.yaml").write_text("include: train.yaml\nname: more\n")
    return tmp_path


def fill(folder: Path) -> None:
    """Everything that the configurations name."""
    write_text_models(folder)
    (folder / "ckpts" / "google").mkdir(parents=True)
    (folder / "t5").rename(folder / "ckpts" / "google" / "t5-v1_1-xxl")
    model = build_model(replace(MODEL_SIZES["mmdit"]["debug"], in_channels=64, context_in_dim=16, vec_in_dim=16))
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    save_file(state, folder / "ckpts" / "Open_Sora_v2.safetensors")
    (folder / "clips.csv").write_text("path,text,num_frames,height,width,fps\n")


@pytest.mark.parametrize("name", ["sample", "train"])
def test_all_is_there(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(folder)
    assert main([str(folder / f"{name}.yaml"), "--world", "4"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split("=")[0] for line in said if line.startswith("ok ")] == [
        f"ok           {key}"
        for key in (["weights"] if name == "sample" else ["data.table", "train.init_from"])
        + ["text.t5_path", "text.clip_path"]
    ]
    script = "inference" if name == "sample" else "train"
    assert said[-1] == f"next: bash launch/torchrun.sh 4 scripts/diffusion/{script}.py {folder / f'{name}.yaml'}"
    assert any(re.match(r"     4 x .*[0-9]\.[0-9]", line) for line in said)


@pytest.mark.parametrize("name", ["sample", "more"])
def test_what_is_published_is_not_there(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder / f"{name}.yaml"), "--world", "1"]) == 2
    said = capsys.readouterr().out
    key = "weights" if name == "sample" else "train.init_from"
    assert f"missing      {key}={folder}/ckpts/Open_Sora_v2.safetensors: no such file or folder\n" in said
    assert f"next: python -m opensora.cli.download open-sora-v2 --to {folder}/ckpts\n" in said
    assert "next: give " in said and "text.clip_path=..." in said and "torchrun" not in said


def test_files_of_something_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(folder)
    file = folder / "ckpts" / "google" / "t5-v1_1-xxl" / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    argv = [str(folder / "sample.yaml"), "--world", "2", "model.depth=5"]
    assert main(argv) == 2
    said = capsys.readouterr().out
    assert re.search(r"^does not fit weights=.*: .* missing: double_blocks", said, re.M)
    assert re.search(r"^does not fit text.t5_path=.*: .* 1 missing: final_layer_norm.weight", said, re.M)
    assert re.search(r"^ok +text.clip_path", said, re.M)


def test_values_are_not_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that end behind their headers would do, if safetensors opened them; NaN does."""
    fill(folder)
    file = folder / "clip" / "model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert main([str(folder / "sample.yaml"), "--world", "1"]) == 0


def test_memory_by_where_the_text_encoder_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the published one: 4.885e9 numbers of two bytes."""
    found = {}
    for override in ("text.shard=true", "text.shard=false", "text.shard=false text.device=cpu"):
        main([str(folder / "sample.yaml"), "--world", "4", *override.split()])
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("     4 x "))
        found[override] = float(re.search(r"text encoder ([0-9.]+)", line)[1])  # type: ignore[index]
    assert list(found.values()) == [2.3, 9.1, 0.0]


def test_which_kind_a_file_is(folder: Path) -> None:
    for kind, wanted in (("train", True), ("sample", False)):
        for path in sorted((ROOT / "configs" / kind).rglob("*.yaml")):
            assert is_training(RunConfig, path) == wanted, path
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        main([str(folder / "nowhere.yaml")])
    with pytest.raises(UserError, match=r"sampling\.colour: unknown key"):
        main([str(folder / "sample.yaml"), "sampling.colour=1"])


@pytest.mark.parametrize("command", [doctor.main, forecast.main])
def test_files_that_include_each_other(command: Callable[[list[str]], int], folder: Path) -> None:
    (folder / "a.yaml").write_text("include: b.yaml\n")
    (folder / "b.yaml").write_text("include: a.yaml\n")
    with pytest.raises(UserError, match="goes round in a circle") as found:
        command([str(folder / "a.yaml"), "--world", "1"])
    assert "\n" not in str(found.value)
