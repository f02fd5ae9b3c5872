"""The commands on Wan and HunyuanVideo: train, adapt, export in each form, and the same clip of all of them."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opensora.cli import convert
from opensora.models.weights.adapter_names import WEIGHTS
from tests.integration.conftest import CONFIG
from tests.integration.test_lora import FP32, sample
from tests.integration.test_train_and_sample import LAYOUT_B, train_on

MODELS = {
    "wan": "model: {kind: wan, size: debug, in_channels: 16, text_dim: 32, patch_size: [1, 1, 1]}",
    "hunyuan_video": (
        "model: {kind: hunyuan_video, size: debug, in_channels: 16, context_in_dim: 32, vec_in_dim: 32, "
        "patch_size: [1, 1, 1], guidance_embed: false}"
    ),
}
ONE_LAYER = {  # of each, as every form calls it
    "wan": {
        "comfyui": "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
        "diffusers": "transformer.blocks.0.attn1.to_q.lora_A.weight",
        "kohya": "lora_unet_blocks_0_self_attn_q.alpha",
        "peft": "base_model.model.blocks.0.self_attn.q.lora_A.weight",
    },
    "hunyuan_video": {
        "comfyui": "diffusion_model.single_blocks.0.linear1.lora_A.weight",
        "diffusers": "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight",
        "kohya": "lora_unet_single_blocks_0_linear1.alpha",
        "peft": "base_model.model.single_blocks.0.linear1.lora_A.weight",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_every_form_of_an_export_samples_the_same_clip(kind: str, shapes: Path, tmp_path: Path) -> None:
    """The run writes the release's names unless told otherwise; not one bit of a pixel is another in another form."""
    for name in ("base", "adapted"):
        text = CONFIG.format(output=tmp_path / name, table=shapes / "train.csv")
        (tmp_path / f"{name}.yaml").write_text(re.sub(r"model:\n(  .*\n)+", f"{MODELS[kind]}\n", text))
    base, run = tmp_path / "base/run/exported", tmp_path / "adapted/run/exported"
    assert train_on(1, tmp_path / "base.yaml", [*LAYOUT_B, *FP32, "optim.lr=0.02", "train.steps=4"])[0]
    more = ["lora.rank=3", "lora.alpha=6", "train.steps=3", "optim.lr=0.05", "optim.warmup_steps=0"]
    assert train_on(1, tmp_path / "adapted.yaml", [*LAYOUT_B, *FP32, *more, f"train.init_from={base}"])[0]
    wanted = sample(tmp_path, run)
    assert (sample(tmp_path, base) - wanted).abs().max() > 0.02
    for form, layer in ONE_LAYER[kind].items():
        place = tmp_path / (form if form == "peft" else f"{form}.safetensors")
        assert convert.main([str(run), "--to", str(place), "--lora", "--form", form]) == 0
        assert layer in load_file(place / WEIGHTS if form == "peft" else place)
        assert torch.equal(sample(tmp_path, base, lora=place), wanted), form
    assert load_file(run / WEIGHTS).keys() == load_file(tmp_path / "comfyui.safetensors").keys()
