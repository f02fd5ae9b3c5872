"""The real commands: train a base, adapt it, stop and resume, export, sample in every way adapters can be given."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from acceleration import lora
from acceleration.checkpoint import newest
from opensora.config import SampleConfig, load_config
from opensora.inference.load import find_source
from opensora.models.mmdit.convert import read_state_dict
from opensora.utils.adapters import WEIGHTS, read_adapter
from opensora.utils.errors import UserError
from opensora.utils.weights import write_weights
from tests.dist.harness import run_distributed
from tests.integration.conftest import CONFIG
from tests.integration.test_train_and_sample import LAYOUT_B, sample_pixels, train_on

FP32 = [f"parallel.precision.{key}=fp32" for key in ("compute", "reduce", "master")]
ADAPTED = ["lora.rank=3", "lora.alpha=6", "train.steps=4", "optim.warmup_steps=0"]
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


def exported(run: Path) -> dict[str, Tensor]:
    return read_adapter(run / "exported").tensors


def test_checkpoint_and_export_hold_adapters_alone(folder: Path) -> None:
    run = folder / "adapted/run"
    base_size = (folder / "base/run/exported/model.safetensors").stat().st_size
    assert (run / "exported" / WEIGHTS).stat().st_size < base_size / 2
    assert not list((run / "exported").glob("model*.safetensors"))
    names = set(exported(run))
    assert names and all(lora.is_adapter(name) for name in names)
    assert all(tensor.abs().max() > 0 for tensor in exported(run).values())


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
    state = {name: tensor + 1e-3 for name, tensor in read_state_dict(other)[0].items()}
    write_weights(other, state.items(), {})
    with pytest.raises(AssertionError, match="not the weights that the adapters of"):
        train_on(2, folder / "adapted.yaml", [*moved, "train.steps=5", f"train.init_from={other}"])


def sample(tmp_path: Path, weights: Path, world: int = 1, **more: Any) -> Tensor:
    path = tmp_path / "sample.yaml"
    lines = {"weights": weights, "save_dir": tmp_path / "out", "precision": "fp32", **more}
    path.write_text(
        "\n".join(f"{key}: {value}" for key, value in lines.items())
        + "\nprompts: [a red circle moves left on a gray background, a blue square]\n"
        "sampling: {num_frames: 5, height: 24, width: 32, num_steps: 3, guidance: 3.0, fps: 8}\n"
    )
    return run_distributed(sample_pixels, world, load_config(SampleConfig, path), timeout=100, init=False)[0]


@pytest.mark.timeout(300)
def test_every_way_to_give_adapters_is_the_same(folder: Path, tmp_path: Path) -> None:
    """Beside the base's export or its run, as an export, as a run; equal to weights merged by hand."""
    base, run = folder / "base/run", folder / "adapted/run"
    adapters = read_adapter(run / "exported")
    state = dict(read_state_dict(base / "exported")[0])
    for layer in adapters.layers:
        a, b = (adapters.tensors[f"{layer}.{kind}"] for kind in (lora.A, lora.B))
        state[f"{layer}.weight"] = (state[f"{layer}.weight"] + 2.0 * b @ a).float()
    merged = shutil.copytree(base / "exported", tmp_path / "merged")
    write_weights(merged, state.items(), {"fused_qkv": "true", "rope_layout": "interleaved"})

    wanted, plain = sample(tmp_path, merged), sample(tmp_path, base / "exported")
    assert (wanted - plain).abs().max() > 0.05
    cut = "{zero: 3, mesh: {tensor: 2, shard: 1}, timeout_s: 60}"
    for pixels in (
        sample(tmp_path, base / "exported", lora=run / "exported"),
        sample(tmp_path, run / "exported", world=2, parallel=cut),
        sample(tmp_path, run, world=2, parallel=cut),
        sample(tmp_path, base, world=2, lora=run / "exported"),
    ):
        assert (pixels - wanted).abs().max() <= 2 / 255
    assert torch.equal(sample(tmp_path, base / "exported", lora=run / "exported", lora_scale=0), plain)


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
