"""The real commands: train a base, adapt it, stop and resume, export, sample in every way adapters can be given."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from acceleration import lora
from acceleration.checkpoint import newest
from opensora.cli import convert
from opensora.config.load import load_config
from opensora.config.run import RunConfig, SampleConfig
from opensora.config.schema import plain
from opensora.inference.find import find_source
from opensora.models.mmdit.convert import WEIGHTS as FORMAT
from opensora.models.weights.adapter_names import WEIGHTS
from opensora.models.weights.adapters import read_adapter
from opensora.models.weights.reader import read_state_dict
from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import write_weights
from tests.dist.harness import run_distributed
from tests.integration.conftest import CONFIG
from tests.integration.test_train_and_sample import LAYOUT_B, sample_pixels, train_on

FP32 = [f"parallel.precision.{key}=fp32" for key in ("compute", "reduce", "master")]
ADAPTED = ["lora.rank=3", "lora.alpha=6", "lora.export_names=peft", "train.steps=4", "optim.warmup_steps=0"]
ONE = ["parallel.mesh.ulysses=1"]


@pytest.fixture(scope="module")
def folder(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/run: a base after a few large steps; adapted/run: adapters on it, trained with tensor parallelism."""
    folder = tmp_path_factory.mktemp("lora")
    for name in ("base", "adapted"):
        (folder / f"{name}.yaml").write_text(CONFIG.format(output=folder / name, table=shapes / "train.csv"))
    base = [*LAYOUT_B, *FP32, "optim.lr=0.02", "train.steps=6"]
    assert train_on(1, folder / "base.yaml", base)[0]
    assert train_on(2, folder / "adapted.yaml", adapted(folder, "parallel.mesh.ulysses=1", "parallel.mesh.tensor=2"))[0]
    return folder


def adapted(folder: Path, *more: str) -> list[str]:
    return [*ADAPTED, "optim.lr=0.05", f"train.init_from={folder}/base/run/exported", *more]


def first_loss(run: Path) -> float:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[1])["loss"]


def test_adapters_start_at_the_base(folder: Path, tmp_path: Path) -> None:
    """The first loss is that of the base itself, trained on from the same weights."""
    one = ["train.steps=1", "optim.warmup_steps=0", f"train.init_from={folder}/base/run/exported", *ONE]
    train_on(1, folder / "adapted.yaml", [*one, f"output={tmp_path}/whole"])
    train_on(1, folder / "adapted.yaml", [*one, f"output={tmp_path}/adapted", "lora.rank=3"])
    assert first_loss(tmp_path / "whole/run") == first_loss(tmp_path / "adapted/run") > 0


def exported(run: Path) -> dict[str, Tensor]:
    return {name.removeprefix("base_model.model."): x for name, x in read_adapter(run / "exported").tensors.items()}


def test_checkpoint_and_export_hold_adapters_alone(folder: Path) -> None:
    run = folder / "adapted/run"
    base_size = (folder / "base/run/exported/model.safetensors").stat().st_size
    assert (run / "exported" / WEIGHTS).stat().st_size < base_size / 2
    assert not list((run / "exported").glob("model*.safetensors"))
    names = set(exported(run))
    assert names and all(lora.is_adapter(name) for name in names)
    assert all(tensor.abs().max() > 0 for tensor in exported(run).values())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_stopped_and_resumed_on_another_layout(folder: Path, tmp_path: Path) -> None:
    """Begun with tensor parallelism, ended with Ulysses: the adapters of the run that was not stopped."""
    moved = [f"output={tmp_path}", *adapted(folder)]
    finished, _ = train_on(2, folder / "adapted.yaml", [*moved, *ONE, "parallel.mesh.tensor=2"], kill_at=1)
    assert not finished
    assert newest(tmp_path / "run/checkpoints") == tmp_path / "run/checkpoints/step-00000002"
    finished, _ = train_on(2, folder / "adapted.yaml", [*moved, "parallel.mesh.ulysses=2"])
    assert finished
    whole = exported(folder / "adapted/run")
    for name, tensor in exported(tmp_path / "run").items():
        assert (tensor - whole[name]).abs().max() <= 1e-10 * whole[name].abs().max(), name

    other = shutil.copytree(folder / "base/run/exported", tmp_path / "other")
    state = {name: tensor + 1e-3 for name, tensor in read_state_dict(other, FORMAT)[0].items()}
    write_weights(other, state.items(), {})
    with pytest.raises(AssertionError, match="not the weights that the adapters of"):
        train_on(2, folder / "adapted.yaml", [*moved, "train.steps=5", f"train.init_from={other}"])


def test_exported_for_comfyui(folder: Path, tmp_path: Path) -> None:
    """The same run with the other names: the same products, with alpha/rank in B, and its base is found."""
    names = [f"output={tmp_path}", *adapted(folder), *ONE, "lora.export_names=comfyui"]
    assert train_on(1, folder / "adapted.yaml", names)[0]
    path = tmp_path / "run/exported"
    assert not (path / "adapter_config.json").exists()
    file = load_file(path / WEIGHTS)
    assert all(name.startswith("diffusion_model.") for name in file)
    peft = read_adapter(folder / "adapted/run/exported")
    assert len(file) == 2 * len(peft.layers)
    for layer in peft.layers:
        a, b = peft.matrices(layer)
        name = f"diffusion_model.{layer.removeprefix('base_model.model.')}"
        found, b = file[f"{name}.{lora.B}"] @ file[f"{name}.{lora.A}"], 2.0 * b
        assert (found - b @ a).abs().max() <= 1e-10 * (b @ a).abs().max(), layer
    source = find_source(SampleConfig(weights=str(path), prompt="x"))
    assert source.path == folder / "base/run/exported" and source.adapters and source.adapters.exported
    assert {scale for _, scale in source.adapters.exported.sizes().values()} == {1.0}


def sample(tmp_path: Path, weights: Path, world: int = 1, **more: Any) -> Tensor:
    path = tmp_path / "sample.yaml"
    lines = {"weights": weights, "save_dir": tmp_path / "out", "precision": "fp32", **more}
    path.write_text(
        "\n".join(f"{key}: {value}" for key, value in lines.items())
        + "\nprompts: [a red circle moves left on a gray background, a blue square]\n"
        "sampling: {num_frames: 5, height: 24, width: 32, num_steps: 3, guidance: 3.0, fps: 8}\n"
    )
    return run_distributed(sample_pixels, world, load_config(SampleConfig, path), timeout=100, init=False)[0]


@pytest.fixture(scope="module")
def merged(folder: Path) -> Path:
    """The base with the adapters added by hand."""
    tensors = exported(folder / "adapted/run")
    target = shutil.copytree(folder / "base/run/exported", folder / "merged")
    state = dict(read_state_dict(target, FORMAT)[0])
    for layer in {name.removesuffix(f".{lora.A}") for name in tensors if name.endswith(lora.A)}:
        a, b = (tensors[f"{layer}.{kind}"] for kind in (lora.A, lora.B))
        state[f"{layer}.weight"] = (state[f"{layer}.weight"] + 2.0 * b @ a).float()
    write_weights(target, state.items(), {"fused_qkv": "true", "rope_layout": "interleaved"})
    return target


# (processes, weights, adapters): beside the base's export or its run, as an export of their own, as their run.
WAYS = {
    "run": (2, "adapted/run", None),
    "beside an export": (1, "base/run/exported", "adapted/run/exported"),
    "export": (2, "adapted/run/exported", None),
    "beside a run": (2, "base/run", "adapted/run/exported"),
}


@pytest.mark.parametrize("way", [way if way == "run" else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_every_way_to_give_adapters_is_the_same(folder: Path, merged: Path, tmp_path: Path, way: str) -> None:
    world, weights, adapters = WAYS[way]
    beside = {"lora": folder / adapters} if adapters else {}
    cut = {"parallel": "{zero: 3, mesh: {tensor: 2, shard: 1}, timeout_s: 60}"} if world == 2 else {}
    wanted = sample(tmp_path, merged)
    assert (sample(tmp_path, folder / weights, world, **beside, **cut) - wanted).abs().max() <= 2 / 255
    plain = sample(tmp_path, folder / (weights if adapters else "base/run/exported"), **beside, lora_scale=0)
    assert (plain - wanted).abs().max() > 0.05


def test_every_form_of_the_export_samples_the_same_clip(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Written by the command, given beside the base: not one bit of a pixel is another."""
    base, run = folder / "base/run/exported", folder / "adapted/run/exported"
    wanted = sample(tmp_path, base, lora=run)
    assert (sample(tmp_path, base) - wanted).abs().max() > 0.05
    for form in ("comfyui", "diffusers", "kohya", "peft"):
        place = tmp_path / (form if form == "peft" else f"{form}.safetensors")
        assert convert.main([str(run), "--to", str(place), "--lora", "--form", form]) == 0
        assert capsys.readouterr().out.startswith(f"written: {place}")
        assert torch.equal(sample(tmp_path, base, lora=place), wanted), form
    again = tmp_path / "again.safetensors"
    convert.main([str(tmp_path / "diffusers.safetensors"), "--to", str(again), "--lora", *model_keys(run)])
    first, second = load_file(tmp_path / "comfyui.safetensors"), load_file(again)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def model_keys(run: Path) -> list[str]:
    """The model of an export, as words of a command line."""
    model = plain(load_config(RunConfig, run / "config.yaml").model)
    return [f"model.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in model.items()]


def test_adapters_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    def refused(expected: str, weights: Path, adapters: Path | None) -> None:
        cfg = SampleConfig(weights=str(weights), lora=adapters and str(adapters), prompt="x")
        with pytest.raises(UserError, match=expected) as caught:
            find_source(cfg)
        assert "\n" not in str(caught.value)

    run = folder / "adapted/run"
    refused("holds adapters already", run, run / "exported")
    refused(r"has no adapter_config\.json", folder / "base/run", tmp_path)
    alone = shutil.copytree(run / "exported", tmp_path / "alone")
    described = (alone / "adapter_config.json").read_text()
    (alone / "adapter_config.json").write_text(described.replace(f"{folder}/base/run/exported", f"{tmp_path}/gone"))
    refused("its adapters belong to .*gone, which is not there", alone, None)
    assert set(load_file(alone / WEIGHTS)) == {f"base_model.model.{name}" for name in exported(run)}
