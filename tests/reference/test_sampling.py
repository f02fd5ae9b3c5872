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
from opensora.datasets.decode.api import read_frames
from opensora.inference import load
from opensora.inference.find import find_source
from opensora.inference.load import load_components
from opensora.inference.pipeline import build_api, fit
from tests.dist.harness import run_distributed
from tests.reference import draws, files, mmdit, sampling
from tests.reference.samples import Clip
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


REFERRED = replace(GUIDED, kind="i2v_loop", guidance_img=2.5, along_clip=True)
# On 1, 2, 3 and 4 processes.
LAYOUTS_OF_REFERENCES: dict[str, tuple[int, list[str]]] = {
    "2-ulysses2": (2, ["parallel.mesh.ulysses=2", "parallel.zero=3", "vae_parallel=on"]),
    "2-ring2": (2, ["parallel.mesh.ring=2"]),
    "2-tensor2": (2, ["parallel.mesh.tensor=2"]),
    "3-cfg3": (3, ["parallel.mesh.cfg=3"]),
    "4-ring2-ulysses2": (4, ["parallel.mesh.ring=2", "parallel.mesh.ulysses=2"]),
    "4-cfg2-tensor2": (4, ["parallel.mesh.cfg=2", "parallel.mesh.tensor=2"]),
}


def write_config(folder: Path, sampler: Sampler, weights: Path, **more: Any) -> Path:
    """The sampling configuration of ``sampler``."""
    frames, height, width = sampler.size
    option = {"num_frames": frames, "height": height, "width": width, "num_steps": sampler.steps, "fps": 8}
    option |= {"guidance": sampler.guidance, "text_osci": sampler.oscillates, "seed": SEEDS[0]}
    option |= {"guidance_img": sampler.guidance_img, "image_osci": sampler.oscillates}
    option["scale_temporal_osci"] = sampler.along_clip
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
    parts = load_components(cfg, find_source(cfg), runtime)
    found = build_api(parts)(fit(cfg.sampling, parts), text=PROMPTS, neg=NEGATIVES, seed=SEEDS)
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


def noise_picture(name: str, frames: int, height: int, width: int) -> np.ndarray:
    return draws.philox(name).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def write_references(folder: Path) -> list[str]:
    """Of the two clips: a picture that is scaled and the end of a clip that is cropped; and nothing."""
    clip = Clip(text="", frames=noise_picture("clip", 7, 24, 64), fps=8.0)
    files.write_lossless(folder / "b.mkv", clip)
    Image.fromarray(noise_picture("still", 1, 30, 70)[0]).save(folder / "a.png")
    return [f"{folder / 'a.png'};{folder / 'b.mkv'}", ""]


def given(sampler: Sampler) -> Tensor:
    """Frames of which the first and last are what the references of the first clip give."""
    frames, height, width = sampler.size
    found = torch.zeros(3, frames, height, width, dtype=torch.float64)
    for at, picture in ((0, noise_picture("still", 1, 30, 70)[0]), (-1, noise_picture("clip", 7, 24, 64)[-1])):
        found[:, at] = covering(picture, height, width)
    return found


def covering(picture: np.ndarray, height: int, width: int) -> Tensor:
    """(3, height, width) fp64 in [-1, 1]: resized to cover, cropped at the centre."""
    scale = max(height / picture.shape[0], width / picture.shape[1])
    size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
    scaled = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
    top, left = (scaled.shape[0] - height) // 2, (scaled.shape[1] - width) // 2
    cropped = torch.from_numpy(scaled[top : top + height, left : left + width].copy())
    return cropped.permute(2, 0, 1).double() / 127.5 - 1


def referred_pixels(path: Path, overrides: list[str], ref: list[str]) -> Tensor:
    """(2, 3, T, H, W): what the project makes of the prompts and their references, on every process."""
    cfg = load_config(SampleConfig, path, overrides)
    runtime = start(60)
    parts = load_components(cfg, find_source(cfg), runtime)
    found = build_api(parts)(cfg.sampling, REFERRED.kind, text=PROMPTS, neg=NEGATIVES, seed=SEEDS, ref=ref)
    stop()
    return found


def check_referred(found: Tensor, sampler: Sampler = REFERRED) -> None:
    encode = text().encode
    rows = zip(PROMPTS, NEGATIVES, SEEDS, (given(sampler), None), strict=True)
    for clip, (prompt, negative, seed, frames) in zip(found, rows, strict=True):
        right = sampler.pixels(encode(prompt), encode(negative), seed, frames)
        assert right.std() > 0.05 and relative(clip, right) <= TOLERANCE


@pytest.mark.parametrize("distilled", [False, True], ids=["guided", "distilled"])
def test_references(tmp_path: Path, distilled: bool) -> None:
    """A picture and a clip of other sizes give the first and the last frame of one clip of two: in three passes, or in
    one of a model that reads the guidance."""
    sampler = replace(REFERRED, distilled=distilled)
    path = from_file(tmp_path, sampler, prompts=list(PROMPTS))
    check_referred(referred_pixels(path, [], write_references(tmp_path)), sampler)


MANY = [
    pytest.param(name, marks=() if name in ("2-ulysses2", "3-cfg3") else pytest.mark.slow)
    for name in LAYOUTS_OF_REFERENCES
]


@pytest.mark.parametrize("layout", MANY)
def test_references_on_many_processes(tmp_path: Path, layout: str) -> None:
    world, overrides = LAYOUTS_OF_REFERENCES[layout]
    path, refs = from_file(tmp_path, REFERRED, prompts=list(PROMPTS)), write_references(tmp_path)
    for found in run_distributed(referred_pixels, world, path, overrides, refs, timeout=110, init=False):
        check_referred(found)


def test_the_command_with_references(tmp_path: Path) -> None:
    """A table whose second clip has none; the last frame of the first is its reference, as far as latents hold it."""
    refs = write_references(tmp_path)
    table = tmp_path / "prompts.csv"
    table.write_text(f"text,neg,ref\n{PROMPTS[0]},{NEGATIVES[0]},{refs[0]}\n{PROMPTS[1]},{NEGATIVES[1]},\n")
    sampler = replace(REFERRED, steps=3)
    path = from_file(tmp_path, sampler, prompt_csv=str(table), cond_type=sampler.kind, crf=0, batch_size=2)
    assert command.main([str(path)]) == 0
    encode = text().encode
    for row, frames in enumerate((given(sampler), None)):
        right = sampler.pixels(encode(PROMPTS[row]), encode(NEGATIVES[row]), SEEDS[0], frames)
        check_clip(tmp_path / f"samples/video_40x24/prompts_{row:04d}.mp4", right)


STILL_FIRST = replace(GUIDED, kind="i2v_head", steps=3, guidance_img=2.0)
OF_STILLS = replace(GUIDED, distilled=True, steps=3, guidance=4.0, size=(1, 48, 48))


def still_config(folder: Path, **more: Any) -> Path:
    """Two models: one that reads its guidance for stills, one in three passes for clips."""
    (folder / "stills").mkdir()
    weights = files.write_weights(folder / "stills" / "weights.safetensors", files.alive())
    still = {"weights": str(weights), "resolution": "48px", "model": files.model_section("half")}
    still |= {"vae": files.encoder_sections()["vae"]}
    path = from_file(folder, STILL_FIRST, prompts=list(PROMPTS), neg=NEGATIVES[1], crf=0, still=still, **more)
    config = yaml.safe_load(path.read_text())
    config["sampling"]["aspect_ratio"] = "1:1"
    path.write_text(yaml.safe_dump(config))
    return path


def check_stills_and_clips(folder: Path) -> None:
    """The still of every prompt is what its model makes, and its clip goes on from the file."""
    made, encode = folder / "samples/video_40x24", text().encode
    for row, prompt in enumerate(PROMPTS):
        still = made / f"generated_condition/sample_{row:04d}.png"
        check_still(still, OF_STILLS.pixels(encode(prompt), encode(""), SEEDS[0]))
        frames = torch.zeros(3, *CLIP, dtype=torch.float64)
        frames[:, 0] = covering(np.asarray(Image.open(still)), *CLIP[1:])
        right = STILL_FIRST.pixels(encode(prompt), encode(NEGATIVES[1]), SEEDS[0], frames)
        check_clip(made / f"sample_{row:04d}.mp4", right)


def check_clip(file: Path, right: Tensor) -> None:
    """Brightness alone, as chroma is stored for 2x2 pixels."""
    found = read_frames(str(file), 0, right.shape[1])
    off = (torch.from_numpy(found).float() - sampling.levels(right).float()) @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert off.abs().mean() < 2, off.abs().mean()


def test_text_to_image_to_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models read one text encoder, which is loaded once; of another configuration there are two."""
    built: list[Any] = []
    build = load.text_encoder_of
    monkeypatch.setattr(load, "text_encoder_of", lambda cfg, *more: built.append(cfg) or build(cfg, *more))
    assert command.main([str(still_config(tmp_path))]) == 0
    check_stills_and_clips(tmp_path)
    assert len(built) == 1
    path = tmp_path / "sample.yaml"
    config = yaml.safe_load(path.read_text())
    config["still"]["text"] = config["text"] | {"max_words": 5}
    path.write_text(yaml.safe_dump(config))
    assert command.main([str(path), f"save_dir={tmp_path}/other"]) == 0 and len(built) == 3


@pytest.mark.slow
def test_text_to_image_to_video_on_many_processes(tmp_path: Path) -> None:
    """The model of stills has one pass: its processes share out the weights, which those of three passes do not."""
    layout = {"mesh": {"cfg": 3, "shard": 1}, "zero": 3, "timeout_s": 60}
    path = still_config(tmp_path, parallel=layout, batch_size=2)
    assert run_distributed(sample, 3, [str(path)], timeout=110, init=False) == [0] * 3
    check_stills_and_clips(tmp_path)


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
    check_still(tmp_path / "samples/image_24x40/prompt_0000.png", sampler.pixels(full, full, SEEDS[0]))
    sampler = replace(sampler, size=CLIP)
    path = write_config(tmp_path, sampler, tmp_path / "run", prompt=PROMPTS[0], lora_scale=scale)
    full = text().encode(f"{PROMPTS[0]} 8 FPS. 4 motion score.")
    assert relative(pixels(path, [])[0], sampler.pixels(full, full, SEEDS[0])) <= TOLERANCE
