"""What files of LoRA hold beside two matrices of a layer: differences of weights, biases and norms.

The truth is the weight reader's: a file of weights that are zero but for the differences, read for our model.
"""

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.assembly.adapter_files import convert_adapters, fitted_adapters
from opensora.assembly.initial_weights import parameter_shapes
from opensora.models.base import ModelConfig
from opensora.models.families import family_of
from opensora.models.weights.reader import WeightFile
from opensora.models.weights.writer import convert_shapes
from opensora.utils.errors import UserError
from opensora.utils.rng import torch_generator
from tests.adapter_families import CASES

TYPES = (torch.float32, torch.float16, torch.bfloat16)
Q, NORM = "diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.norm3"
WAN, I2V = CASES["wan"].model, CASES["wan_i2v"].model


def drawn(shapes: Mapping[str, tuple[int, ...]], draw: random.Random) -> dict[str, Tensor]:
    """Differences of some tensors of a file of weights, in one type."""
    chosen, dtype = draw.sample(sorted(shapes), draw.choice([1, 4, 12])), draw.choice(TYPES)
    return {name: torch.randn(shapes[name], generator=torch_generator("d", name)).to(dtype) for name in chosen}


def in_file(differences: Mapping[str, Tensor], draw: random.Random) -> dict[str, Tensor]:
    """As tools call them."""
    flat, prefix = draw.random() < 0.3, draw.choice(["diffusion_model.", "transformer.", ""])
    weight, bias = draw.choice([("diff", "diff_b"), ("w_norm", "b_norm")])
    found = {}
    for name, tensor in differences.items():
        layer = name.removesuffix(".weight").removesuffix(".bias")
        layer = f"lora_unet_{layer.replace('.', '_')}" if flat else prefix + layer
        found[f"{layer}.{bias if name.endswith('.bias') else weight}"] = tensor
    return found


def read_as_weights(family: str, layout: str, given: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The same in our model, by a file of weights."""
    model, format = CASES[family].model, family_of(CASES[family].model).weights
    shapes = convert_shapes(parameter_shapes(model), format, source=format.layout(model), to=getattr(format, layout))
    whole = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(whole | {name: tensor.float() for name, tensor in given.items()}, folder / "weights.safetensors")
    file = WeightFile(folder / "weights.safetensors", format, format.layout(model))
    return {name: tensor for name, tensor in file.items() if tensor.abs().max() > 0}


def check(family: str, seed: int, folder: Path) -> None:
    model, draw = CASES[family].model, random.Random(f"{family} {seed}")
    format, layout = family_of(model).weights, draw.choice(["original", "diffusers"])
    shapes = convert_shapes(parameter_shapes(model), format, source=format.layout(model), to=getattr(format, layout))
    given = drawn(shapes, draw)
    wanted = read_as_weights(family, layout, given, folder)
    save_file(in_file(given, draw), folder / "lora.safetensors")
    found = fitted_adapters(folder / "lora.safetensors", model, "lora").differences
    assert found.keys() == wanted.keys(), f"{family} {seed}"
    assert all(torch.equal(found[name], wanted[name]) for name in wanted), f"{family} {seed}"


@pytest.mark.parametrize("family", ["wan", "wan_i2v", "hunyuan_video"])
def test_drawn_differences_are_read(family: str, tmp_path: Path) -> None:
    for seed in range(12):
        check(family, seed, tmp_path)


def plain(layer: str, rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{layer}.lora_A.weight": torch.randn(rank, 64, generator=torch_generator("a", layer)),
        f"{layer}.lora_B.weight": torch.randn(64, rank, generator=torch_generator("b", layer)),
    }


def extracted() -> dict[str, Tensor]:
    """As ComfyUI extracts LoRA: two matrices of a layer, what is added to its bias, and to norms."""
    more = {f"{Q}.diff_b": torch.full((64,), 0.5), f"{NORM}.diff": torch.full((64,), 2.0)}
    return plain(Q) | more | {f"{NORM}.diff_b": torch.full((64,), 3.0)}


def test_extracted_files_have_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(extracted(), tmp_path / "a.safetensors")
    fitted = fitted_adapters(tmp_path / "a.safetensors", WAN, "lora")
    assert list(fitted.pieces) == ["blocks.0.self_attn.q"]
    found = {name: float(value[7]) for name, value in fitted.differences.items()}
    assert found == {"blocks.0.self_attn.q.bias": 0.5, "blocks.0.norm3.weight": 2.0, "blocks.0.norm3.bias": 3.0}
    assert "differences of 3 tensors, which are added as they are" in capsys.readouterr().err


def test_a_bias_of_b_is_scaled_as_its_product(tmp_path: Path) -> None:
    file = plain(Q) | {f"{Q}.alpha": torch.tensor(0.5), f"{Q}.lora_B.bias": torch.full((64,), 8.0)}
    save_file(file, tmp_path / "a.safetensors")
    fitted = fitted_adapters(tmp_path / "a.safetensors", WAN, "lora")
    assert fitted.differences["blocks.0.self_attn.q.bias"].tolist() == [2.0] * 64  # alpha/rank is 1/4


def test_comfyui_alone_has_names_for_them(tmp_path: Path) -> None:
    save_file(extracted(), tmp_path / "a.safetensors")
    written = convert_adapters(WAN, tmp_path / "a.safetensors", tmp_path / "b.safetensors", "comfyui")
    found = load_file(written)
    assert found.keys() == extracted().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in extracted().items())
    for form in ("diffusers", "kohya", "peft"):
        with pytest.raises(
            UserError, match=f"--form {form}: has no name for the difference of the .*; use comfyui"
        ) as caught:
            convert_adapters(WAN, tmp_path / "a.safetensors", tmp_path / "other", form)
        assert "\n" not in str(caught.value) and not (tmp_path / "other").exists()


WRONG = {
    "a layer that is not there": ({"diffusion_model.blocks.9.norm3.diff": torch.ones(64)}, "no such layer"),
    "a bias that is not there": ({"diffusion_model.blocks.0.self_attn.norm_q.diff_b": torch.ones(64)}, "no bias there"),
    "another size": ({f"{NORM}.diff": torch.ones(63)}, r"is \(63,\), and would be \(64,\)"),
    "two models": (plain(Q) | {"other.blocks.0.norm3.diff": torch.ones(64)}, "two models in one file"),
    "a place under two names": (
        {"x.blocks.0.norm3.diff": torch.ones(64), "x.blocks.0.norm2.diff": torch.ones(64)},
        "two adapters for the same place",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_differences_that_do_not_fit(case: str, tmp_path: Path) -> None:
    tensors, expected = WRONG[case]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=expected) as caught:
        fitted_adapters(tmp_path / "a.safetensors", WAN, "lora")
    assert "\n" not in str(caught.value) and "belong to another model" in str(caught.value)


@pytest.mark.parametrize("form", ["release", "diffusers", "kohya"])
def test_adapters_of_a_picture_are_left_out_where_none_is_read(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ComfyUI does it: LoRA of I2V of Wan 2.1 on models of 2.2, which read no picture."""
    own, of_picture, norm = {
        "release": (Q, "diffusion_model.blocks.0.cross_attn.k_img", "diffusion_model.blocks.0.cross_attn.norm_k_img"),
        "diffusers": ("x.blocks.0.attn1.to_q", "x.blocks.0.attn2.add_k_proj", "x.blocks.0.attn2.norm_added_k"),
        "kohya": (
            *("lora_unet_blocks_0_self_attn_q", "lora_unet_blocks_0_cross_attn_k_img"),
            "lora_unet_blocks_0_cross_attn_norm_k_img",
        ),
    }[form]
    save_file(plain(own) | plain(of_picture) | {f"{norm}.diff": torch.ones(64)}, tmp_path / "a.safetensors")
    with_picture = fitted_adapters(tmp_path / "a.safetensors", I2V, "lora")
    assert {*with_picture.pieces} == {"blocks.0.self_attn.q", "blocks.0.cross_attn.k_img"}
    assert {*with_picture.differences} == {"blocks.0.cross_attn.norm_k_img.weight"}
    without = fitted_adapters(tmp_path / "a.safetensors", WAN, "lora")
    assert {*without.pieces} == {"blocks.0.self_attn.q"} and not without.differences
    assert (
        "2 layers that this size of the model lacks, or has with other inputs, are left out" in capsys.readouterr().err
    )
    save_file(plain(of_picture), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="the model has none of its layers"):
        fitted_adapters(tmp_path / "a.safetensors", WAN, "lora")


@pytest.mark.parametrize("kind", ["difference", "adapter"])
@pytest.mark.parametrize(("model", "channels", "others"), [(WAN, 4, 12), (I2V, 12, 4)])
def test_patches_of_another_width_are_left_out(
    model: ModelConfig, channels: int, others: int, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ComfyUI does it: of text to video for image to video, which reads a mask and a clip beside the noise."""

    def file(width: int, outputs: int = 64) -> Path:
        layer = "diffusion_model.patch_embedding"
        made = {f"{layer}.diff": torch.ones(outputs, width, 1, 2, 2)}
        if kind == "adapter":
            made = {f"{layer}.lora_A.weight": torch.ones(2, width, 1, 2, 2)}
            made[f"{layer}.lora_B.weight"] = torch.ones(outputs, 2, 1, 1, 1)
        save_file(plain(Q) | made, tmp_path / "a.safetensors")
        return tmp_path / "a.safetensors"

    whole = fitted_adapters(file(channels), model, "lora")
    assert "patch_embedding" in {**whole.pieces} or "patch_embedding.weight" in whole.differences
    assert "left out" not in capsys.readouterr().err
    cut = fitted_adapters(file(others), model, "lora")
    assert {*cut.pieces} == {"blocks.0.self_attn.q"} and not cut.differences
    assert (
        "1 layers that this size of the model lacks, or has with other inputs, are left out" in capsys.readouterr().err
    )
    said = ""
    try:
        fitted_adapters(file(others, outputs=32), model, "lora")
    except UserError as error:
        said = str(error)
    assert "patch_embedding" in said and "would be" in said
