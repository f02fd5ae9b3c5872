"""Autoencoders and text encoders of other packages: whole, or refused by the name of the tensor."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.models.pretrained import load_pretrained, not_finite
from opensora.models.text.t5_clip import check_folder
from opensora.models.vae import HunyuanConfig, build_autoencoder
from opensora.models.vae.folder import load_frozen
from opensora.utils.errors import UserError

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each kind."""
    from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pretrained")
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    models = {
        "t5": T5EncoderModel(T5Config(vocab_size=32, d_model=16, d_kv=4, num_heads=2, d_ff=32, num_layers=2)),
        "clip": CLIPTextModel(CLIPTextConfig(vocab_size=32, num_attention_heads=2, **sizes)),
        "flux2d": AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        "hunyuan": AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}


def load(kind: str, folder: Path) -> Any:
    import diffusers
    import transformers

    if kind in ("t5", "clip"):
        loader = transformers.T5EncoderModel if kind == "t5" else transformers.CLIPTextModel
        key = f"{kind}_path"
        return load_pretrained(f"text.{key}", check_folder(key, str(folder)), loader, dtype=torch.float32)
    if kind == "hunyuan":
        return build_autoencoder(HunyuanConfig(path=str(folder)), "cpu", torch.float32).network
    return load_frozen(diffusers.AutoencoderKL, str(folder), "cpu", torch.float32)


def changed(source: Path, target: Path, change: Callable[[Tensors, str], Tensors]) -> str:
    """A copy of a folder with other tensors; returns the name of the one that was changed."""
    shutil.copytree(source, target)
    (file,) = target.glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(one for one in tensors if tensors[one].dim() == 2)[0]
    save_file({one: tensor.contiguous() for one, tensor in change(tensors, name).items()}, file, {"format": "pt"})
    return name


def without(tensors: Tensors, name: str) -> Tensors:
    return {one: tensor for one, tensor in tensors.items() if one != name}


DAMAGES: dict[str, tuple[Callable[[Tensors, str], Tensors], str]] = {
    "missing": (without, "{name} is missing in its weights"),
    "behind a prefix": (lambda t, name: {f"first_stage_model.{one}": v for one, v in t.items()}, "more are missing in"),
    "a block too many": (
        lambda t, name: {**t, f"{name.partition('.')[0]}.more.weight": torch.ones(2)},
        "{name.top}.more.weight is not in the model that config.json describes",
    ),
    "NaN": (lambda t, name: {**t, name: t[name] * math.nan}, "{name} holds NaN"),
    "infinity": (lambda t, name: {**t, name: t[name].abs().clamp(min=1) / 0}, "{name} holds NaN or infinite values"),
    "fp8": (
        lambda t, name: {**t, name: t[name].to(torch.float8_e4m3fn), "scaled_fp8": torch.ones(2)},
        "{name} is F8_E4M3 (scaled fp8, with scaled_fp8): must be one of F64, F32, F16, BF16; give the bf16",
    ),
    "integers": (lambda t, name: {**t, name: t[name].int()}, "{name}"),  # diffusers says it first, in its own words
    "another shape": (lambda t, name: {**t, name: torch.ones(3, 5)}, "cannot be loaded from this folder"),
}


# What our own reader says of the same.
OWN_WORDS = {
    "missing": "1 missing: {name}",
    "behind a prefix": "missing: encoder.conv_in.conv.weight",
    "a block too many": "1 unexpected: {name.top}.more.weight",
    "integers": "{name} is I32: must be one of F64",
    "fp8": "{name} is F8_E4M3 without a scale, where scaled_fp8 tells of scaled fp8",
    "another shape": "1 of another shape (file, model): {name} (3, 5)",
}


@pytest.mark.parametrize("kind", ["t5", "clip", "flux2d", "hunyuan"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_are_not_whole_are_refused_by_name(
    damage: str, kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    change, words = DAMAGES[damage]
    words = OWN_WORDS.get(damage, words) if kind == "hunyuan" else words
    name = changed(folders[kind], tmp_path / "folder", change)
    with pytest.raises(UserError) as caught:
        load(kind, tmp_path / "folder")
    said = words.replace("{name.top}", name.partition(".")[0]).replace("{name}", name)
    key = f"text.{kind}_path" if kind in ("t5", "clip") else "vae.path"
    assert said in str(caught.value) and str(caught.value).startswith(f"{key}={tmp_path}"), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["t5", "clip", "flux2d", "hunyuan"])
def test_whole_weights_are_loaded_as_they_are(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Also in half precision, and beside a variant that is not read."""
    changed(folders[kind], tmp_path / "folder", lambda t, name: {one: v.half() for one, v in t.items()})
    save_file({"x": torch.ones(2, dtype=torch.int32)}, tmp_path / "folder" / "model.int.safetensors")
    model = load(kind, tmp_path / "folder")
    (file,) = folders[kind].glob("*.safetensors")
    stored, own = load_file(file), model.state_dict()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    shared = [name for name in stored if name in own]
    assert len(shared) > 10 and all(torch.equal(own[name], stored[name].half().float()) for name in shared)


def test_parts_of_larger_models_are_left_out(tmp_path: Path) -> None:
    """The published folders hold all of T5, and all of CLIP with the positions that older releases wrote."""
    from transformers import CLIPConfig, CLIPModel, T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=4, num_heads=2, d_ff=32, num_layers=2, tie_word_embeddings=False)
    ).save_pretrained(tmp_path / "t5")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPModel(
        CLIPConfig(text_config={**small, "vocab_size": 32}, vision_config={**small, "image_size": 32, "patch_size": 16})
    ).save_pretrained(tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file({**load_file(file), **positions}, file, {"format": "pt"})
    for kind in ("t5", "clip"):
        assert not_finite(load(kind, tmp_path / kind).state_dict().items()) is None


def test_the_first_tensor_that_is_not_finite() -> None:
    good = {"a": torch.ones(3), "empty": torch.ones(0), "whole": torch.tensor([2**62])}
    assert not_finite(good.items()) is None
    assert not_finite({**good, "b": torch.tensor([1.0, -math.inf]), "c": torch.tensor(math.nan)}.items()) == "b"
