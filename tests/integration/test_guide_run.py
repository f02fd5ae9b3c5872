"""The two examples of the Open-Sora family's guide, run as they stand but for paths and sizes: training, resumed on
another layout, then sampling from what was trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from opensora.models.families import build_model
from opensora.models.pixart import PixArtConfig
from opensora.utils.metrics_log import read_metrics
from tests import guide_configs
from tests.dist.harness import run_distributed
from tests.integration.test_dit_family_run import run_sample, run_train
from tests.integration.test_sample_command import command
from tests.published_autoencoders import write_small
from tests.text_models import write_text_models

PROMPT = "a red circle moves left on a gray background"
SHAPE: dict[str, Any] = {"hidden_size": 48, "depth": 2, "num_heads": 4, "caption_channels": 16}
# What makes the examples small: clips of 4 frames and 32 pixels, and a model of this shape.
SMALL = ["--image-size", "32", "32", "--num-frames", "4", *(f"model.{key}={value}" for key, value in SHAPE.items())]
TRAINING = [*SMALL, "num_workers=1", "log_every=1", "lr=0.003"]
TRAINING += [f"parallel.precision.{key}=fp64" for key in ("compute", "reduce", "master")]
SPLIT = ["parallel.zero=3", "parallel.mesh.ulysses=2"]  # two processes share every clip; the example has ZeRO 2


@pytest.fixture
def examples(tmp_path: Path) -> tuple[Path, Path]:
    """(training, sampling): the files, with clips, prompts, and a small T5, autoencoder and PixArt where they say."""
    from data_pipeline.shapes.__main__ import main

    shapes = ["--clips", "12", "--images", "0", "--sizes", "32x32", "--durations", "17", "--processes", "1"]
    main(["--out", str(tmp_path / "shapes"), *shapes])
    write_text_models(tmp_path)
    write_small("sd", tmp_path / "autoencoder.safetensors")
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n", encoding="utf-8")
    save_file(pixart_weights(), tmp_path / "pixart.safetensors")
    models: dict[str, Path | str] = {
        "stabilityai/sd-vae-ft-ema": tmp_path / "autoencoder.safetensors",
        "DeepFloyd/t5-v1_1-xxl": tmp_path / "t5",
    }
    training: dict[str, Path | str] = {
        "CSV_PATH": tmp_path / "shapes/train.csv",
        "YOUR_PRETRAINED_MODEL": tmp_path / "pixart.safetensors",
        "outputs": tmp_path / "outputs",
    }
    sampling = {
        "./assets/texts/t2v_samples.txt": tmp_path / "prompts.txt",
        "PRETRAINED_MODEL": tmp_path / "outputs/run",
    }
    return (
        guide_configs.written(tmp_path / "run.py", guide_configs.TRAINING, models | training),
        guide_configs.written(tmp_path / "sampling.py", guide_configs.SAMPLING, models | sampling),
    )


def pixart_weights() -> dict[str, torch.Tensor]:
    """What an STDiT starts from, none of it zero."""
    generator = torch.Generator().manual_seed(2)
    state = build_model(PixArtConfig(**SHAPE)).state_dict()
    return {name: torch.randn(x.shape, generator=generator) * 0.1 for name, x in state.items()}


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")[0]]


def sampled(config: Path, folder: Path, world: int, extra: Sequence[str] = ("precision=fp64",)) -> dict[str, bytes]:
    """What the sampling example writes on so many processes: files by name."""
    argv = [str(config), *SMALL, "--save-dir", str(folder), *extra]
    assert run_distributed(run_sample, world, argv, timeout=300, init=False) == [0] * world
    return {file.name: file.read_bytes() for file in folder.rglob("*.mp4")}


def test_train_resume_sample(examples: tuple[Path, Path], tmp_path: Path) -> None:
    training, sampling = examples
    for world, steps, layout in ((1, 2, []), (2, 3, SPLIT)):
        argv = [str(training), *TRAINING, f"train.steps={steps}", *layout]
        assert run_distributed(run_train, world, argv, timeout=100, init=False) == [0] * world
    assert len(losses(tmp_path / "outputs/run")) == 3
    one, two = (sampled(sampling, tmp_path / f"on{world}", world) for world in (1, 2))
    assert list(one) == ["sample_0.mp4"] and one == two


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_as_typed(examples: tuple[Path, Path], tmp_path: Path) -> None:
    """By torchrun: two processes by ZeRO 2 as the example says, then two that share clips, then one: the losses of one
    process that was never interrupted. The video of one, two and three processes; and in the example's precision."""
    training, sampling = (str(path) for path in examples)
    for world, steps, layout in ((2, 3, []), (2, 6, SPLIT), (1, 8, [])):
        command(world, "train", training, *TRAINING, f"train.steps={steps}", *layout)
    command(1, "train", training, *TRAINING, "train.steps=8", "--outputs", str(tmp_path / "whole"))
    found, truth = losses(tmp_path / "outputs/run"), losses(tmp_path / "whole/run")
    assert len(truth) == 8 and found == pytest.approx(truth, rel=1e-9)

    videos = []
    for world in (1, 2, 3):
        folder = tmp_path / f"typed{world}"
        command(world, "inference", sampling, *SMALL, "--save-dir", str(folder), "precision=fp64")
        videos.append([file.read_bytes() for file in folder.rglob("*.mp4")])
    assert videos[0] and videos[0] == videos[1] == videos[2]
    sheets = []
    for world in (1, 2):
        folder = tmp_path / f"half{world}"
        command(world, "inference", sampling, *SMALL, "--save-dir", str(folder))
        sheets.append(np.asarray(Image.open(next(folder.rglob("contact_sheet.png")))).astype(int))
    assert sheets[0].std() > 5 and np.abs(sheets[0] - sheets[1]).mean() < 4
