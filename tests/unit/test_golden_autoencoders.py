"""Autoencoders give what their families' published code gave: every case of the golden files, in fp32 to 1e-5."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora.models.vae import Flux2DConfig, build_autoencoder
from opensora.models.vae.flux2d_names import diffusers_name
from tests.golden_autoencoders import FILES, LIMIT, differences, single_file


@pytest.mark.parametrize("name", FILES)
def test_published_file(name: str, golden: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.safetensors"
    found = dict(differences(golden, name, str(path), single_file(golden, name, path)))
    print("".join(f"\n{name} {result}: {difference:.1e}" for result, difference in found.items()))
    assert len(found) > 5 and all(difference <= LIMIT for difference in found.values()), found


def test_hunyuan_from_a_diffusers_folder(golden: Path, tmp_path: Path) -> None:
    """The same names, with the number of groups in config.json."""
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    stated = single_file(golden, "hunyuan_vae", file)
    save_file(load_file(file), file)  # without what the single file states
    (tmp_path / "config.json").write_text(json.dumps({"norm_num_groups": stated["norm_num_groups"]}))
    found = dict(differences(golden, "hunyuan_vae", str(tmp_path), stated))
    assert all(difference <= LIMIT for difference in found.values()), found


def test_flux_from_a_diffusers_folder(golden: Path, tmp_path: Path) -> None:
    """diffusers reads the folder that the published names become, and gives the same."""
    from diffusers import AutoencoderKL

    single = tmp_path / "ae.safetensors"
    stated = single_file(golden, "flux_ae", single)
    levels = len(stated["ch_mult"])
    sizes: dict[str, Any] = {
        "block_out_channels": tuple(stated["ch"] * factor for factor in stated["ch_mult"]),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": stated["num_res_blocks"],
        "latent_channels": stated["z_channels"],
    }
    model = AutoencoderKL(use_quant_conv=False, use_post_quant_conv=False, **sizes)
    own = model.state_dict()
    renamed = {diffusers_name(name, levels): value.float() for name, value in load_file(single).items()}
    model.load_state_dict({name: value.reshape(own[name].shape) for name, value in renamed.items()})
    model.save_pretrained(tmp_path / "folder")
    found = dict(differences(golden, "flux_ae", str(tmp_path / "folder"), stated))
    assert all(difference <= LIMIT for difference in found.values()), found


def test_clamped_unless_told_otherwise(golden: Path, tmp_path: Path) -> None:
    single_file(golden, "flux_ae", tmp_path / "ae.safetensors")
    autoencoder: Any = build_autoencoder(Flux2DConfig(path=str(tmp_path / "ae.safetensors")), "cpu", torch.float32)
    latents = load_file(golden / "flux_ae.safetensors")["in.decode.latents"] * 4
    free = autoencoder.decode(latents, clamp=False)
    assert free.abs().max() > 1 and torch.equal(autoencoder.decode(latents), free.clamp(-1, 1))
