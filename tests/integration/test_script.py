"""The family's Python interface: the script of the docs makes the files of the command, on one process and on two."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from opensora.config.load import load_config
from opensora.config.run import SampleConfig
from opensora.inference.job import sample
from opensora.inference.save import to_uint8
from opensora.models.mmdit import SIZES, MMDiTModel
from tests.conftest import ROOT
from tests.dist.harness import run_distributed

MODEL = {"kind": "mmdit", "size": "debug", "patch_size": 2, "context_in_dim": 32, "vec_in_dim": 32}
SIZE = 'resolution="32px", num_frames=6, num_steps=3, guidance=3.0, seed=7'


def documented_script() -> str:
    """As it stands in the docs."""
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?process_and_save.*?)```", text, flags=re.DOTALL)
    return str(script)


def small(script: str, config: Path) -> str:
    """The same script with other files, a small clip, and fp64, in which layouts give the same pixels."""
    changes = {
        '"configs/sample/256px.yaml"': repr(str(config)),
        'resolution="256px", num_frames=97, guidance=7.5, seed=1234': SIZE,
        "torch.bfloat16": "torch.float64",
        '"cat.png"': repr(str(config.parent / "cat.png")),
        "video_256px": "video_32px",
    }
    for old, new in changes.items():
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    return script


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, a picture, and a configuration for each number of processes."""
    path = tmp_path_factory.mktemp("script")
    generator = torch.Generator().manual_seed(1)
    shape = replace(SIZES["debug"], context_in_dim=32, vec_in_dim=32)
    weights = {
        name: torch.randn(x.shape, generator=generator) * 0.2 + name.endswith("scale")
        for name, x in MMDiTModel(shape).state_dict().items()
    }
    save_file(weights, path / "weights.safetensors")
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path / "cat.png")
    for processes in (1, 2):
        config = {
            "weights": str(path / "weights.safetensors"),
            "model": MODEL,
            "vae": {"kind": "dct", "channels": 4},
            "text": {"kind": "bytes", "dim": 32},
            "save_dir": str(path / f"script{processes}"),
            "prompt_suffix": True,
            "precision": "fp64",
            "sampling": {"resolution": "32px", "num_frames": 6, "num_steps": 3, "guidance": 3.0, "seed": 7},
            "parallel": {"mesh": {"shard": 1, "ulysses": -1}, "timeout_s": 60},
        }
        (path / f"{processes}.yaml").write_text(yaml.safe_dump(config))
    return path


def run_script(script: str) -> None:
    torch.set_num_threads(1)
    exec(script, {})


def run_command(config: Path, overrides: list[str]) -> list[str]:
    torch.set_num_threads(1)
    return sample(load_config(SampleConfig, config, overrides))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("video_32px/prompt_*"))}


@pytest.fixture(scope="module")
def of_the_command(folder: Path) -> dict[str, bytes]:
    base = ["prompt=a cat", f"save_dir={folder}/command"]
    run_distributed(run_command, 1, folder / "1.yaml", base, init=False)
    more = ["cond_type=i2v_head", f"ref={folder}/cat.png"]
    run_distributed(run_command, 1, folder / "1.yaml", [*base, *more], init=False)
    return files(folder / "command")


@pytest.mark.parametrize("processes", [1, 2])
def test_the_documented_script_makes_the_files_of_the_command(
    folder: Path, of_the_command: dict[str, bytes], processes: int
) -> None:
    """Frames bit for bit, and the prompts that the model was given."""
    assert len(documented_script().strip().splitlines()) <= 12
    run_distributed(run_script, processes, small(documented_script(), folder / f"{processes}.yaml"), init=False)
    names = [f"prompt_000{number}.{kind}" for number in (0, 1) for kind in ("mp4", "txt")]
    assert sorted(of_the_command) == names and files(folder / f"script{processes}") == of_the_command
    assert of_the_command["prompt_0000.txt"] == b"a cat. 24 FPS. 4 motion score.\n"
    assert of_the_command["prompt_0000.mp4"] != of_the_command["prompt_0001.mp4"]


STILLS = """
from opensora.utils.inference import process_and_save
from opensora.utils.sampling import SamplingOption, prepare_api, prepare_models
model, model_ae, model_t5, model_clip, optional_models = prepare_models({cfg!r}, dtype="fp64")
api_fn = prepare_api(optional_models["img_flux"], optional_models["img_flux_ae"], model_t5, model_clip, optional_models)
option = SamplingOption(width={width}, height={height}, num_frames=1, num_steps=3, guidance=4.0, seed=7)
still = api_fn(option, text="a cat")
api_fn = prepare_api(model, model_ae, model_t5, model_clip, optional_models)
clip = api_fn({option}, "i2v_head", text="a cat", ref={ref!r})
process_and_save(clip, {{"text": "a cat"}}, {cfg!r}, "of_the_script", {option})
import torch
torch.save(still, {out!r})
"""


def test_the_models_of_text_to_image_to_video(folder: Path) -> None:
    """Two models over one text encoder: the still and the clip are those of the command."""
    config = yaml.safe_load((folder / "1.yaml").read_text())
    config["still"] = {"resolution": "40px", "weights": config["weights"], "model": MODEL, "vae": {**config["vae"]}}
    config |= {"save_dir": str(folder / "still"), "prompts": ["a cat"], "crf": 0}
    (folder / "still.yaml").write_text(yaml.safe_dump(config))
    run_distributed(run_command, 1, folder / "still.yaml", [], init=False)
    made = folder / "still/video_32px"
    png = made / "generated_condition/sample_0000.png"
    option = f"SamplingOption({SIZE})"
    width, height = Image.open(png).size
    more = {"width": width, "height": height}
    script = STILLS.format(
        **more, cfg=str(folder / "still.yaml"), option=option, ref=str(png), out=str(folder / "still.pt")
    )
    run_distributed(run_script, 1, script, init=False)
    still = torch.load(folder / "still.pt")
    assert np.array_equal(to_uint8(still)[0, 0].numpy(), np.asarray(Image.open(png)))
    assert (folder / "still/of_the_script/prompt_0000.mp4").read_bytes() == (made / "sample_0000.mp4").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_under_the_launcher(folder: Path, of_the_command: dict[str, bytes]) -> None:
    """As typed: nothing is left behind, and the script ends by itself."""
    path = folder / "script.py"
    path.write_text(small(documented_script(), folder / "2.yaml").replace("script2", "launched"))
    config = (folder / "2.yaml").read_text().replace("script2", "launched")
    (folder / "2.yaml").write_text(config)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(path)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert files(folder / "launched") == of_the_command
