"""Autoencoders and text encoders on the simulated device give what they give on the CPU."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora.assembly.sharded_text import text_encoder_of
from opensora.models.text import build_text_encoder
from opensora.models.text.bytes import ByteTextConfig
from opensora.models.text.t5_clip import T5ClipConfig
from opensora.models.vae import DCTConfig, Flux2DConfig, HunyuanConfig, build_autoencoder
from tests.device.simulated import CUDA, Ledger, simulated_cuda
from tests.dist.harness import run_distributed

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"block_out_channels": (4, 4, 4, 4), "latent_channels": 4, "norm_num_groups": 2}
VENDORS = [
    ("diffusers", "AutoencoderKL"),
    ("diffusers", "AutoencoderKLHunyuanVideo"),
    ("transformers", "CLIPTextModel"),
    ("transformers", "T5EncoderModel"),
]
PROMPTS = ["a red circle moves left", "", "blue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of other packages."""
    from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo
    from transformers import ByT5Tokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    AutoencoderKLHunyuanVideo(layers_per_block=1, **SIZES).save_pretrained(folder / "hunyuan")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **SIZES
    ).save_pretrained(folder / "flux2d")
    T5EncoderModel(T5Config(vocab_size=384, d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=2)).save_pretrained(
        folder / "t5"
    )
    ByT5Tokenizer().save_pretrained(folder / "t5")
    words = {word: index for index, word in enumerate(["<|startoftext|>", "<|endoftext|>", "a</w>", "red</w>"])}
    CLIPTokenizer(vocab=words, merges=[]).save_pretrained(folder / "clip")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
        )
    ).save_pretrained(folder / "clip")
    return folder


def coded(kinds: list[Any], device: torch.device, ledger: Ledger | None = None) -> dict[str, Tensor]:
    """Latents and pixels of every autoencoder, features of every text encoder, on the CPU."""
    found: dict[str, Tensor] = {}
    pixels = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for cfg in kinds:
        if hasattr(cfg, "max_words") or hasattr(cfg, "max_tokens"):
            encoder = build_text_encoder(cfg, device, torch.float32)
            text = encoder.encode(PROMPTS)
            found |= {f"{cfg.kind} txt": text.txt.cpu(), f"{cfg.kind} y_vec": text.y_vec.cpu()}
            continue
        autoencoder = build_autoencoder(cfg, device, torch.float32)
        moved = pixels.to(device)
        if ledger:
            ledger.enter("code")
        latents = autoencoder.encode(moved)
        back = autoencoder.decode(latents)
        if ledger:
            ledger.enter("end")
        found |= {f"{cfg.kind} latents": latents.cpu(), f"{cfg.kind} pixels": back.cpu()}
    return found


def on_both(kinds: list[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    # What asks torch for CUDA when it is imported must not be told that there is some.
    for package, name in VENDORS:
        getattr(import_module(package), name)
    with simulated_cuda() as ledger:
        found = coded(kinds, CUDA, ledger)
    return found, coded(kinds, CPU), [str(wait) for wait in ledger.waits if wait.phase == "code"]


def test_encoders_on_the_device(folder: Path) -> None:
    """And the autoencoders wait for nothing."""
    kinds = [
        DCTConfig(channels=16),
        HunyuanConfig(path=str(folder / "hunyuan")),
        HunyuanConfig(path=str(folder / "hunyuan"), tiling=True),
        Flux2DConfig(path=str(folder / "flux2d")),
        ByteTextConfig(dim=64, mask=True),
        T5ClipConfig(t5_path=str(folder / "t5"), clip_path=str(folder / "clip"), max_tokens=12),
    ]
    ((found, truth, waits),) = run_distributed(on_both, 1, kinds, timeout=110)
    assert waits == []
    assert found.keys() == truth.keys() and len(truth) == 10
    for name, value in truth.items():
        assert (found[name].double() - value.double()).abs().max() <= 1e-4 * max(1.0, value.abs().max().item()), name


def where(p: Tensor) -> str:
    """The device whose memory a tensor takes."""
    return p.device.type if p.untyped_storage().nbytes() else "none"


def moved(cfg: T5ClipConfig) -> tuple[list[str], list[str], list[Tensor], list[Tensor]]:
    """Where T5's weights are while prompts are encoded and between, and the features there and on the CPU."""
    for package, name in VENDORS:
        getattr(import_module(package), name)
    at_work: set[str] = set()
    with simulated_cuda():
        encoder: Any = text_encoder_of(cfg, None, CUDA, torch.float32)
        block = encoder._modules[0].get_submodule("block.0")
        block.register_forward_pre_hook(lambda *_: at_work.update(map(where, block.parameters())))
        features = encoder.encode(PROMPTS)
        assert features.txt.device.type == "cuda"
        between = {where(p) for part in encoder._modules for p in part.parameters()}
        found = [features.txt.cpu(), features.y_vec.cpu()]
    alone = build_text_encoder(replace(cfg, device="auto", offload=False), CPU, torch.float32).encode(PROMPTS)
    return sorted(at_work), sorted(between), found, [alone.txt, alone.y_vec]


@pytest.mark.parametrize("way", ["offload", "cpu"])
def test_text_encoders_that_are_not_on_the_device(way: str, folder: Path) -> None:
    cfg = T5ClipConfig(t5_path=str(folder / "t5"), clip_path=str(folder / "clip"), max_tokens=12)
    cfg = replace(cfg, offload=True) if way == "offload" else replace(cfg, device="cpu")
    ((at_work, between, found, truth),) = run_distributed(moved, 1, cfg, timeout=60)
    assert (at_work, between) == ((["cuda"], ["none"]) if way == "offload" else (["cpu"], ["cpu"]))
    for one, other in zip(found, truth, strict=True):
        assert (one.double() - other.double()).abs().max() <= 1e-4 * max(1.0, other.abs().max().item())
