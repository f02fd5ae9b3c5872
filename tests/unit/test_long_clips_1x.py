"""Clips that go on from one another behind the autoencoders of Open-Sora 1.1, 1.2 and 1.3, which code in pieces: the
frames that are kept, and how clips are joined."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from acceleration.distributed import mesh as meshes
from acceleration.sequence import SequenceParallel
from opensora.assembly.components import Components
from opensora.assembly.token_layout import token_layout
from opensora.config.run import SampleConfig
from opensora.inference import pipeline
from opensora.inference.opensora_1x.clips import LongClips
from opensora.inference.pipeline import build_sampler
from opensora.inference.prompts import read_jobs
from opensora.models.stdit import STDiT3Config
from opensora.models.vae import OpenSoraV12Config, OpenSoraV13Config, SDConfig, build_autoencoder
from opensora.sampling.options import SamplingOption
from opensora.schedulers.rectified_flow_v1 import RectifiedFlowV1Config
from opensora.utils.rng import torch_generator
from tests.dist.problem import FakeText
from tests.dist.stdit import plain_model
from tests.golden_1x import Golden

GROUPS = {"norm_num_groups": 4, "num_groups": 4}
SHAPE: dict[str, Any] = {"hidden_size": 24, "depth": 1, "num_heads": 2, "caption_channels": 12, "model_max_length": 4}


def drawn(name: str, shape: tuple[int, ...], stage: str = "") -> Tensor:
    """The draws of an autoencoder, for the sample of seed 42."""
    return torch.randn(1, *shape, generator=torch_generator(42, f"{name} {stage}" if stage else name))


def components(autoencoder: Any, release: str) -> Components:
    model = STDiT3Config(**SHAPE, in_channels=autoencoder.channels)
    mesh = meshes.view({})
    return Components(
        model=plain_model(model).float(),
        cfg=model,
        autoencoder=autoencoder,
        text_encoder=FakeText(),
        objective=RectifiedFlowV1Config(version="1.3" if release == "1.3" else "1.2"),
        layout=token_layout(model, SequenceParallel(mesh)),
        mesh=mesh,
        device=torch.device("cpu"),
        prompt_suffix=False,
    )


def made(autoencoder: Any, release: Any, folder: Path, frames: int, length: int) -> tuple[Tensor, list[Tensor]]:
    """(pixels, latents of every clip) of two clips, the first of which begins with a picture."""
    Image.new("RGB", (20, 16), (200, 30, 90)).save(folder / "a.png")
    cfg = SampleConfig(
        weights="w",
        release=release,
        prompts=("a fox",),
        reference_path=(str(folder / "a.png"),),
        mask_strategy=("0",),
        loop=2,
        condition_frame_length=length,
        sampling=SamplingOption(width=16, height=16, num_frames=frames, num_steps=2, guidance=2.0),
    )
    parts, found = components(autoencoder, release), list[Tensor]()
    sampler = build_sampler(parts)

    def listening(*args: Any, **told: Any) -> Any:
        clip = sampler(*args, **told)
        found.append(clip.latents)
        return clip

    return LongClips(parts, cfg, listening, True)(read_jobs(cfg)), found


@pytest.mark.slow  # imports diffusers
@torch.no_grad()
def test_1_1_joins_frames(golden: Path, tmp_path: Path) -> None:
    path = Golden(golden, "vae_spatial_v1_0").write(tmp_path / "sd.safetensors", GROUPS)
    autoencoder: Any = build_autoencoder(SDConfig(path=path, sample="mode"), "cpu", torch.float32)
    pixels, (first, second) = made(autoencoder, "1.1", tmp_path, frames=5, length=2)
    assert torch.equal(second[:, :, :2], autoencoder.encode(autoencoder.decode(first))[:, :, -2:])
    whole = torch.cat((autoencoder.decode(first), autoencoder.decode(second)[:, :, 2:]), dim=2)
    assert pixels.shape[2] == 8 and torch.allclose(pixels, whole, atol=1e-6)


@pytest.mark.slow  # likewise
@torch.no_grad()
def test_1_2_joins_frames_of_whole_pieces(golden: Path, tmp_path: Path) -> None:
    path = Golden(golden, "vae_pipeline_v1_2").write(tmp_path / "vae.safetensors", GROUPS)
    autoencoder: Any = build_autoencoder(OpenSoraV12Config(path=path), "cpu", torch.float32)
    pixels, (first, second) = made(autoencoder, "1.2", tmp_path, frames=34, length=5)
    assert first.shape[2] == 10
    picture = torch.tensor([200.0, 30.0, 90.0]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 16, 16) / 127.5 - 1
    assert torch.equal(first[:, :, :1], autoencoder.encode(picture, draw=partial(drawn, "posterior reference 0")))
    again = autoencoder.encode(autoencoder.decode(first, frames=34), draw=partial(drawn, "posterior clip"))
    assert torch.equal(second[:, :, :5], again[:, :, -5:])
    parts = autoencoder.decode(first, frames=34), autoencoder.decode(second, frames=34)[:, :, 17:]
    assert pixels.shape[2] == 51 and torch.allclose(pixels, torch.cat(parts, dim=2), atol=1e-6)


@torch.no_grad()
def test_1_3_joins_latents(golden: Path, tmp_path: Path) -> None:
    """What is no whole piece of 5 is cut: of 17 latent frames 15 are left, which are 49 frames."""
    length, joined, frames = 3, 15, 49
    g = Golden(golden, "vae_v1_3_weights_encoder")
    g.tensors |= Golden(golden, "vae_v1_3_weights_decoder").tensors
    path = g.write(tmp_path / "vae.safetensors", {})
    cfg = OpenSoraV13Config(path=path, temporal_overlap=True, micro_frame_size=17, micro_batch=1)
    autoencoder: Any = build_autoencoder(cfg, "cpu", torch.float32)
    pixels, (first, second) = made(autoencoder, "1.3", tmp_path, frames=33, length=length)
    assert first.shape[2] == 10 and torch.equal(second[:, :, :length], first[:, :, -length:])
    whole = torch.cat((first, second[:, :, length:]), dim=2)[:, :, :joined]
    assert pixels.shape[2] == frames
    assert torch.allclose(pixels, autoencoder.decode(whole, frames=frames), atol=1e-6)


def sampled(autoencoder: Any, release: str, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Size, Tensor]:
    """(shape of a still of 17x30 pixels, the sizes that the model was told)."""
    told: list[Tensor] = []
    right = pipeline.forward_arguments

    def listening(model: Any, tokens: Any, t: Tensor, conditions: Any) -> Any:
        told.append(conditions.size)
        return right(model, tokens, t, conditions)

    monkeypatch.setattr(pipeline, "forward_arguments", listening)
    option = SamplingOption(width=30, height=17, num_frames=1, num_steps=1, guidance=1.0)
    return pipeline.build_api(components(autoencoder, release))(option, text=["a fox"], neg=[""]).shape, told[0]


@pytest.mark.slow  # imports diffusers
@torch.no_grad()
def test_1_2_cuts_off_what_is_no_whole_latent(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its 480p is 480x854, of which 60x106 latents are made: clips are 848 wide, while the model is told 854."""
    path = Golden(golden, "vae_pipeline_v1_2").write(tmp_path / "vae.safetensors", GROUPS)
    autoencoder: Any = build_autoencoder(OpenSoraV12Config(path=path), "cpu", torch.float32)
    shape, told = sampled(autoencoder, "1.2", monkeypatch)
    assert shape == (1, 3, 1, 16, 24) and torch.equal(told, torch.tensor([[17.0, 30.0]]))


@torch.no_grad()
def test_1_3_halves_a_size_in_turns(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half rounded down, then twice half rounded up: 17 pixels are 2 latents, 30 are 4."""
    g = Golden(golden, "vae_v1_3_weights_encoder")
    g.tensors |= Golden(golden, "vae_v1_3_weights_decoder").tensors
    cfg = OpenSoraV13Config(path=g.write(tmp_path / "vae.safetensors", {}), micro_frame_size=17, micro_batch=1)
    autoencoder: Any = build_autoencoder(cfg, "cpu", torch.float32)
    shape, told = sampled(autoencoder, "1.3", monkeypatch)
    assert shape == (1, 3, 1, 16, 32) and torch.equal(told, torch.tensor([[17.0, 30.0]]))
