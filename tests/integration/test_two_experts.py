"""Two runs of a part of all times each, by the command, and sampling with both: what a loop makes of their weights."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from opensora.assembly.turns import DENOISER, LOW_NOISE
from opensora.cli import sample, train
from opensora.config.load import load_config
from opensora.config.other_models import LowNoiseConfig
from opensora.config.run import RunConfig, SampleConfig
from opensora.inference import load
from opensora.inference.find import find_source
from opensora.inference.pipeline import build_sampler
from opensora.models.families import build_model
from opensora.models.text import build_text_encoder
from opensora.sampling.options import SamplingOption
from opensora.utils.errors import UserError
from opensora.utils.metrics_log import read_metrics
from opensora.utils.rng import torch_generator
from tests.dist.harness import run_distributed

MODEL = (
    "model: {kind: wan, in_channels: 16, hidden_size: 48, num_heads: 4, depth: 2, ffn_dim: 64, text_dim: 32, "
    "patch_size: [1, 2, 2]}"
)
TRAINING = ["parallel.mesh.ulysses=1", "train.log_every=1", "train.steps=4", "optim.lr=3.0e-2"]
TIMES = {"high": (0.8, 1.0), "low": (0.0, 0.8)}
OPTION = SamplingOption(
    width=32, height=32, num_frames=5, num_steps=4, guidance=4.0, guidance_low=2.5, flow_shift=3.0, fps=8
)
PROMPT, NEG = "a red circle", "grey"


def run_train(argv: list[str]) -> int:
    return train.main(argv)


def run_sample(argv: list[str]) -> int:
    return sample.main(argv)


@pytest.fixture
def wan(config: Path) -> Path:
    """The configuration with a small Wan in place of the MMDiT."""
    before, _, rest = config.read_text().partition("model:\n")
    path = config.parent / "wan.yaml"
    path.write_text(before + MODEL + "\n" + rest[rest.index("vae:") :])
    return path


def trained(wan: Path, folder: Path, *more: str) -> dict[str, Path]:
    """Exports of two experts, which begin alike."""
    found = {}
    for name, (low, high) in TIMES.items():
        objective = f"objective={{kind: rectified_flow, t_min: {low}, t_max: {high}, sample_method: uniform}}"
        argv = [str(wan), objective, *TRAINING, *more, f"output={folder / name}"]
        assert run_distributed(run_train, 1, argv, timeout=140, init=False) == [0]
        found[name] = folder / name / "run" / "exported"
    return found


def job(experts: dict[str, Path], **more: Any) -> SampleConfig:
    return SampleConfig(
        weights=str(experts["high"]),
        low_noise=LowNoiseConfig(weights=str(experts["low"])),
        prompt=PROMPT,
        neg=NEG,
        sampling=OPTION,
        precision="fp64",
        **more,
    )


def latents_of(cfg: SampleConfig, room: int | None) -> tuple[Tensor, set[str], list[str]]:
    """What a process makes of the clip, whose turns there were that moved weights, and what was said of experts."""
    from acceleration.distributed import runtime as runtimes

    told: list[str] = []
    load.device_bytes = lambda: room  # type: ignore[assignment]
    load.announce = told.append  # type: ignore[assignment]
    runtime = runtimes.start(60, mesh=cfg.parallel.mesh)
    parts = load.load_components(cfg, find_source(cfg), runtime)
    made = build_sampler(parts)(cfg.sampling, seed=[5], text=[PROMPT], neg=[NEG]).latents
    assert parts.turns is not None
    moved = set(parts.turns._movable)
    runtimes.stop()
    return made, moved, [line for line in told if "experts" in line]


def as_tokens(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Files have patches as planes, and rows of the last layer as (ph, pw, c); the model has tokens, (c, ph, pw)."""
    found = {name: tensor.double() for name, tensor in weights.items()}
    found["patch_embedding.weight"] = found["patch_embedding.weight"].flatten(1)
    for name in ("head.head.weight", "head.head.bias"):
        rows = found[name].unflatten(0, (2, 2, 16))
        found[name] = rows.movedim(2, 0).flatten(0, 2)
    return found


@torch.no_grad()
def by_loop(experts: dict[str, Path]) -> Tensor:
    """Euler steps over whole clips with the weights of the files."""
    saved = load_config(RunConfig, experts["high"] / "config.yaml")
    text, models = build_text_encoder(saved.text, "cpu", torch.float64), {}
    for name, folder in experts.items():
        models[name] = build_model(saved.model).double()
        models[name].load_state_dict(as_tokens(load_file(folder / "model.safetensors")))
    x = torch.randn(1, 16, 2, 4, 4, generator=torch_generator(5, "sampling noise")).double()
    place = torch.cartesian_prod(*(torch.arange(n).double() for n in (2, 2, 2)))[None]
    even = [1 - step / 4 for step in range(5)]
    for now, then in pairwise([3 * t / (1 + 2 * t) for t in even]):
        model, scale = (models["high"], 4.0) if now >= 0.8 else (models["low"], 2.5)
        found = []
        for prompt in (PROMPT, NEG):
            read = text.encode([prompt])
            rows = read.txt if read.mask is None else read.txt * read.mask[..., None]
            tokens = x.reshape(1, 16, 2, 2, 2, 2, 2).permute(0, 2, 3, 5, 1, 4, 6).reshape(1, 8, 64)
            v = model(x=tokens, timestep=torch.tensor([1000 * now]).double(), text=rows.double(), positions=place)
            found.append(v.reshape(1, 2, 2, 2, 16, 2, 2).permute(0, 4, 1, 2, 5, 3, 6).reshape(x.shape))
        x = x + (then - now) * (found[1] + scale * (found[0] - found[1]))
    return x


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_runs_and_sampling_with_the_switch(wan: Path, tmp_path: Path) -> None:
    experts = trained(wan, tmp_path)
    weights = {name: load_file(folder / "model.safetensors") for name, folder in experts.items()}
    assert not torch.equal(*(one["blocks.0.self_attn.q.weight"] for one in weights.values()))
    losses = [
        [record["loss"] for record in read_metrics(folder.parent / "metrics.jsonl")[0]] for folder in experts.values()
    ]
    assert losses[0][1:] != losses[1][1:]  # the first is of a model that predicts nothing, at any time
    wanted = by_loop(experts)
    cfg = job(experts)
    assert find_source(cfg).low_noise.boundary == 0.8  # type: ignore[union-attr]
    two = ((2, 1, {"ulysses": 2}), (2, None, {"cfg": 2}), (2, 1, {"tensor": 2}))
    for world, room, parallel in ((1, None, {}), (1, 1, {}), *two, (4, None, {"ulysses": 2, "tensor": 2})):
        mesh = replace(cfg.parallel.mesh, **parallel)
        here = replace(cfg, parallel=replace(cfg.parallel, mesh=mesh, zero=3 if world > 1 else 0))
        for made, moved, told in run_distributed(latents_of, world, here, room, timeout=100, init=False):
            assert ((made - wanted).abs().max() / wanted.abs().max()).item() < 1e-9
            assert moved == ({DENOISER, LOW_NOISE} if room else set())
            where = "they take turns on the device" if room else "both stay on the device"
            assert told == [f"two experts, the second below time 0.8: {where}"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_takes_both(wan: Path, tmp_path: Path) -> None:
    experts = trained(wan, tmp_path, "train.steps=1", "optim.warmup_steps=0")
    path = tmp_path / "job.yaml"
    path.write_text(f"weights: {experts['high']}\nlow_noise: {{weights: {experts['low']}}}\nprompt: a fox\n")
    option = "sampling={width: 32, height: 32, num_frames: 5, num_steps: 2, guidance_low: 2.0, solver: unipc}"
    argv = [str(path), option, "precision=fp64", f"save_dir={tmp_path / 'out'}"]
    assert run_distributed(run_sample, 1, argv, timeout=140, init=False) == [0]
    assert list((tmp_path / "out").rglob("*.mp4"))
    refused(wan, tmp_path, experts)


def refused(wan: Path, tmp_path: Path, experts: dict[str, Path]) -> None:
    """Experts that do not fit each other, in one line."""
    argv = [
        str(wan),
        *TRAINING,
        "train.steps=1",
        "optim.warmup_steps=0",
        "model.depth=1",
        f"output={tmp_path / 'short'}",
    ]
    assert run_distributed(run_train, 1, argv, timeout=140, init=False) == [0]
    short = tmp_path / "short" / "run" / "exported"
    for pair, said in (
        ({"high": experts["high"], "low": short}, f"low_noise.weights={short}: has model.depth=1, weights have 2; exp"),
        ({"high": short, "low": short}, "low_noise.boundary: missing; weights were trained at times from 0 on"),
        ({"high": experts["high"], "low": tmp_path / "none"}, f"low_noise.weights={tmp_path / 'none'}: "),
    ):
        with pytest.raises(UserError) as error:
            find_source(job(pair))
        assert str(error.value).startswith(said) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"guidance_low=2\.5: must be null without low_noise"):
        SampleConfig(weights="w", sampling=OPTION)
