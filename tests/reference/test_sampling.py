"""The sampling command and its function compute what the formulas say: pixels, to rounding."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from acceleration.distributed.runtime import start, stop
from opensora.cli import sample as command
from opensora.cli import train
from opensora.config.load import load_config
from opensora.config.run import SampleConfig
from opensora.inference.find import find_source
from opensora.inference.pipeline import fit, prepare_api, prepare_models
from tests.dist.harness import run_distributed
from tests.reference import files, mmdit, sampling
from tests.reference.sampling import Sampler
from tests.reference.test_training import CASES, launch, relative, text, truth

TOLERANCE = 1e-10
PROMPTS = ("a lamp", "two dogs run over the long bridge at night")
NEGATIVES = ("", "fog and rain")
SEEDS = (0, 5)
CLIP, STILL = (9, 24, 40), (1, 40, 24)

GUIDED = Sampler(
    weights=files.alive(),
    model=files.problem(text()).model,
    autoencoder=files.problem(text()).autoencoder,
    steps=13,
    guidance=3.0,
    size=CLIP,
    oscillates=True,
)
# On 1, 2 and 4 processes.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1": (1, []),
    "2-cfg2": (2, ["parallel.mesh.cfg=2"]),
    "2-ulysses2": (2, ["parallel.mesh.ulysses=2", "parallel.zero=3", "vae_parallel=on"]),
    "2-tensor2": (2, ["parallel.mesh.tensor=2"]),
    "4-ring2-cfg2": (4, ["parallel.mesh.ring=2", "parallel.mesh.cfg=2"]),
    "4-shard2-tensor2": (4, ["parallel.mesh.shard=2", "parallel.mesh.tensor=2", "parallel.zero=3"]),
}


def write_config(folder: Path, sampler: Sampler, weights: Path, **more: Any) -> Path:
    """The sampling configuration of ``sampler``."""
    frames, height, width = sampler.size
    option = {"num_frames": frames, "height": height, "width": width, "num_steps": sampler.steps, "fps": 8}
    option |= {"guidance": sampler.guidance, "text_osci": sampler.oscillates, "seed": SEEDS[0]}
    option["method"] = "distill" if sampler.distilled else "i2v"
    config = {"weights": str(weights), "save_dir": str(folder / "samples"), "precision": "fp64", "sampling": option}
    path = folder / "sample.yaml"
    path.write_text(yaml.safe_dump(config | {"parallel": {"timeout_s": 60}} | more))
    return path


def from_file(folder: Path, sampler: Sampler, **more: Any) -> Path:
    """Weights alone, which the configuration says the rest of."""
    used = {name: w for name, w in files.alive().items() if sampler.distilled or not name.startswith("guidance_in.")}
    weights = files.write_weights(folder / "weights.safetensors", used)
    sections = {"model": files.model_section("half", guidance=sampler.distilled), **files.encoder_sections()}
    return write_config(folder, sampler, weights, **sections, **more)


def pixels(path: Path, overrides: list[str]) -> Tensor:
    """(2, 3, T, H, W): what the project makes of the prompts, on every process."""
    cfg = load_config(SampleConfig, path, overrides)
    runtime = start(60)
    parts = prepare_models(cfg, find_source(cfg), runtime)
    found = prepare_api(parts)(fit(cfg.sampling, parts), text=PROMPTS, neg=NEGATIVES, seed=SEEDS)
    stop()
    return found


def wanted(sampler: Sampler) -> Iterator[Tensor]:
    encode = text().encode
    for prompt, negative, seed in zip(PROMPTS, NEGATIVES, SEEDS, strict=True):
        yield sampler.pixels(encode(prompt), encode(negative), seed)


def check(found: Tensor, sampler: Sampler) -> None:
    for clip, right in zip(found, wanted(sampler), strict=True):
        assert right.std() > 0.05 and (right.abs() < 1).double().mean() > 0.3  # not all clamped
        assert relative(clip, right) <= TOLERANCE


@pytest.mark.parametrize("distilled", [False, True], ids=["guided", "distilled"])
def test_clips(tmp_path: Path, distilled: bool) -> None:
    sampler = replace(GUIDED, distilled=distilled)
    check(pixels(from_file(tmp_path, sampler, prompts=list(PROMPTS)), []), sampler)


@pytest.mark.parametrize("layout", [pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "1"])
def test_clips_on_many_processes(tmp_path: Path, layout: str) -> None:
    world, overrides = LAYOUTS[layout]
    path = from_file(tmp_path, GUIDED, prompts=list(PROMPTS))
    for found in run_distributed(pixels, world, path, overrides, timeout=110, init=False):
        check(found, GUIDED)


def sample(argv: list[str]) -> int:
    return command.main(argv)


def check_still(file: Path, right: Tensor) -> None:
    """Level for level; a value within rounding of the middle between two may be either."""
    found = torch.from_numpy(np.asarray(Image.open(file)).copy())
    exact = (right[:, 0].permute(1, 2, 0) + 1) * 127.5
    middle = (exact - exact.floor() - 0.5).abs() < 1e-3
    assert right.std() > 0.05 and torch.equal(found[~middle], sampling.levels(right)[0][~middle])
    assert middle.double().mean() < 0.02


def write_table(folder: Path) -> Path:
    table = folder / "prompts.csv"
    rows = [f'"{prompt}","{negative}"' for prompt, negative in zip(PROMPTS, NEGATIVES, strict=True)]
    table.write_text("\n".join(["text,neg", *rows]) + "\n")
    return table


def test_stills_of_a_table(tmp_path: Path) -> None:
    """The command: prompts with what to move away from, and two seeds of each."""
    sampler = replace(GUIDED, size=STILL)
    path = from_file(tmp_path, sampler, prompt_csv=str(write_table(tmp_path)), num_sample=2, batch_size=3)
    assert command.main([str(path)]) == 0
    check_table(tmp_path, sampler)


def check_table(folder: Path, sampler: Sampler) -> None:
    encode = text().encode
    for row, (prompt, negative) in enumerate(zip(PROMPTS, NEGATIVES, strict=True)):
        for k in range(2):
            right = sampler.pixels(encode(prompt), encode(negative), SEEDS[0] + k)
            check_still(folder / f"samples/image_24x40/prompts_{row:04d}{f'_{k}' if k else ''}.png", right)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stills_as_typed(tmp_path: Path, layout: str) -> None:
    world, overrides = LAYOUTS[layout]
    sampler = replace(GUIDED, size=STILL)
    path = from_file(tmp_path, sampler, prompt_csv=str(write_table(tmp_path)), num_sample=2)
    launch(world, "inference", [str(path), *overrides], tmp_path)
    check_table(tmp_path, sampler)


@pytest.mark.parametrize("case", ["adamw", "adapters"])
def test_from_training_to_pixels(tmp_path: Path, case: str) -> None:
    """A run's moving average is what is sampled from, with the words about motion that the run was trained with;
    adapters count as much as ``lora_scale`` says."""
    trained, scale = CASES[case], 0.5
    weights = files.write_weights(tmp_path / "weights.safetensors", files.alive())
    table = files.write_clips(tmp_path / "clips")
    config = files.write_config(tmp_path / "train.yaml", table, init_from=weights, case=trained)
    assert train.main([str(config)]) == 0
    average = truth(trained)[1].ema
    if trained.lora:
        rank, alpha = trained.lora
        average = mmdit.with_adapters(files.alive(), average, scale * alpha / rank)
    sampler = replace(GUIDED, distilled=True, size=STILL, weights=average, steps=4)
    path = write_config(tmp_path, sampler, tmp_path / "run", prompt=PROMPTS[0], lora_scale=scale)
    assert command.main([str(path)]) == 0
    full = text().encode(f"{PROMPTS[0]} 4 motion score.")
    check_still(tmp_path / "samples/image_24x40/sample_0000.png", sampler.pixels(full, full, SEEDS[0]))
    sampler = replace(sampler, size=CLIP)
    path = write_config(tmp_path, sampler, tmp_path / "run", prompt=PROMPTS[0], lora_scale=scale)
    full = text().encode(f"{PROMPTS[0]} 8 FPS. 4 motion score.")
    assert relative(pixels(path, [])[0], sampler.pixels(full, full, SEEDS[0])) <= TOLERANCE
