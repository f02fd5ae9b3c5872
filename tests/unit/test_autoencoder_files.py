"""Files of autoencoders: published sizes by names and shapes, strictly; which kind they are; what is refused."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from acceleration.diagnostics.memory_usage import Allocations
from opensora.assembly.stored_features import identity_hash
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.models.vae import (
    AUTOENCODER_CONFIGS,
    AUTOENCODERS,
    DCAEConfig,
    HunyuanConfig,
    autoencoder_shape,
    build_autoencoder,
    check_autoencoder,
    latents_depend_on,
)
from opensora.models.vae.flux2d_names import DIFFUSERS
from opensora.utils.errors import UserError
from tests.published_autoencoders import PUBLISHED, small_shapes, write_small, write_zeros

KINDS = ("hunyuan", "flux2d", "dc_ae", "sd", "opensora_v1_2", "opensora_v1_3")
STRIDES = {"hunyuan": (4, 8, 8), "flux2d": (1, 8, 8), "dc_ae": (4, 32, 32)}
STRIDES |= {"sd": (1, 8, 8), "opensora_v1_2": (4, 8, 8), "opensora_v1_3": (4, 8, 8)}
CHANNELS = {"dc_ae": 128, "sd": 4, "opensora_v1_2": 4}


def refusal(cfg: Any) -> str:
    """What both the check before a run and the reader say of the same file: one line."""
    with pytest.raises(UserError) as checked:
        check_autoencoder(cfg)
    with pytest.raises(UserError) as built:
        build_autoencoder(cfg, "cpu", torch.float32)
    assert str(checked.value) == str(built.value) and "\n" not in str(checked.value)
    return str(checked.value)


@pytest.mark.parametrize("kind", KINDS)
def test_published_sizes_fit(kind: str, tmp_path: Path) -> None:
    """Every name and shape of the published file, and no other; a file of zeros, of which headers are read."""
    shapes = PUBLISHED[kind]()
    cfg = AUTOENCODER_CONFIGS[kind](path=str(write_zeros(tmp_path / "published.safetensors", shapes)))
    with Allocations() as seen:
        check_autoencoder(cfg)
    assert seen.peak < 2**20
    shape = autoencoder_shape(cfg)
    assert (shape.channels, shape.stride) == (CHANNELS.get(kind, 16), STRIDES[kind])
    assert shape == autoencoder_shape(AUTOENCODER_CONFIGS[kind]())  # as without the file
    parameters = sum(prod(found) for found in shapes.values())
    assert abs(parameters - AUTOENCODERS[kind].parameters) < 0.01 * parameters
    write_zeros(tmp_path / "published.safetensors", {**shapes, "decoder.more.weight": (2, 2)})
    assert "1 unexpected: decoder.more.weight" in refusal(cfg)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_published_sizes_are_loaded_tensor_by_tensor(kind: str, tmp_path: Path) -> None:
    shapes = PUBLISHED[kind]()
    cfg = AUTOENCODER_CONFIGS[kind](path=str(write_zeros(tmp_path / "published.safetensors", shapes)))
    with Allocations() as seen:
        autoencoder: Any = build_autoencoder(cfg, "cpu", torch.bfloat16)
    own = sum(p.nbytes for p in autoencoder.network.parameters())
    assert own == 2 * sum(prod(found) for found in shapes.values())
    assert seen.peak <= own + 2 * 2 * max(prod(found) for found in shapes.values())  # a tensor, and it as it is stored


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_file_is_loaded_with_one_tensor_beside_it(kind: str, tmp_path: Path) -> None:
    path = write_small(kind, tmp_path / "small.safetensors")
    with Allocations() as seen:
        autoencoder: Any = build_autoencoder(AUTOENCODER_CONFIGS[kind](path=str(path)), "cpu", torch.float32)
    own = sum(p.nbytes for p in autoencoder.network.parameters())
    assert seen.peak <= own + 2 * max(p.nbytes for p in autoencoder.network.parameters())
    stored = load_file(path)
    found = autoencoder.network.state_dict()
    assert sorted(float(value.sum()) for value in stored.values()) == sorted(float(v.sum()) for v in found.values())
    assert not any(p.requires_grad for p in autoencoder.network.parameters()) and not autoencoder.network.training


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wrong_is_told_by_name(kind: str, tmp_path: Path) -> None:
    """Missing, of another shape and unexpected, all in one line."""
    first, second = sorted(name for name in small_shapes(kind) if "conv_out" in name or "project_out" in name)[:2]
    changed = {first: (5,), second: None, "encoder.other.weight": (3,)}
    path = write_small(kind, tmp_path / "small.safetensors", **changed)  # type: ignore[arg-type]
    said = refusal(AUTOENCODER_CONFIGS[kind](path=str(path)))
    own = {name.replace("norm_out", "conv_norm_out") if kind == "flux2d" else name for name in (first, second)}
    assert said.startswith(f"vae.path={path}: ") and all(name in said for name in own), said
    assert "1 missing: " in said and "1 unexpected: encoder.other.weight" in said and " (5,)" in said, said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_files_of_other_kinds_are_named(kind: str, other: str, tmp_path: Path) -> None:
    path = write_small(other, tmp_path / "small.safetensors")
    cfg = AUTOENCODER_CONFIGS[kind](path=str(path))
    if kind == other:
        check_autoencoder(cfg)
    else:
        said = refusal(cfg)
        assert f"set vae.kind={other}" in said and said.startswith(f"vae.path={path}"), said


def test_paths_of_all_sorts(tmp_path: Path) -> None:
    """A file, a folder with one file, with a diffusers file among others, and what is none of these."""
    single = write_small("hunyuan", tmp_path / "hunyuan_vae.safetensors")
    for path in (single, tmp_path):
        check_autoencoder(HunyuanConfig(path=str(path)))
    write_small("hunyuan", tmp_path / "other.safetensors")
    assert "holds 2 files of weights (hunyuan_vae.safetensors, other.safetensors); give one" in refusal(
        HunyuanConfig(path=str(tmp_path))
    )
    save_file(load_file(single), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"norm_num_groups": 4}))
    autoencoder: Any = build_autoencoder(HunyuanConfig(path=str(tmp_path)), "cpu", torch.float32)
    assert autoencoder.network.sizes.groups == 4
    (tmp_path / "config.json").write_text(json.dumps({"norm_num_groups": 3}))
    assert "no such autoencoder (num_channels" in refusal(HunyuanConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"spatial_compression_ratio": 6}))
    assert "spatial_compression_ratio=6; must be a power of 2" in refusal(HunyuanConfig(path=str(tmp_path)))
    (tmp_path / "text.safetensors").write_text("<html>")
    assert "is a web page" in refusal(DCAEConfig(path=str(tmp_path / "text.safetensors")))
    assert "no such file or folder; give F32T4C128_AE" in refusal(DCAEConfig(path=str(tmp_path / "no")))
    published = str(tmp_path / "F32T4C128_AE.safetensors")
    assert refusal(DCAEConfig(path=published)).endswith(f"opensora.cli.download open-sora-v2-dc-ae --to {tmp_path}")


def test_names_of_flux_are_those_of_diffusers() -> None:
    """Every published name becomes one of AutoencoderKL, by its own conversion of such files."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    from opensora.models.vae.flux2d import WEIGHTS

    shapes = PUBLISHED["flux2d"]()
    stored = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        model = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=16,
            layers_per_block=2,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    theirs = convert_ldm_vae_checkpoint(stored, dict(model.config))
    ours = WEIGHTS.targets(shapes, WEIGHTS.original, DIFFUSERS)
    assert {name: target.shape for name, target in ours.items()} == {n: tuple(t.shape) for n, t in theirs.items()}
    for name, target in ours.items():  # and the tensor that each is made of has the same kind of place
        assert target.rows[0].tensor.split(".")[0] == name.split(".")[0]


TILES: dict[str, tuple[dict[str, Any], str]] = {
    "size": ({"tile_size": 200}, "tile_size=200: must be a multiple of {space}"),
    "frames": ({"tile_frames": 20}, "tile_frames=20: must be a multiple of 16"),
    "overlap": ({"tile_overlap": 0.6}, "tile_overlap=0.6: must be a number from 0 to 0.5"),
    "negative overlap": ({"tile_overlap": -0.1}, "tile_overlap=-0.1"),
    "nothing": ({"tile_size": 0}, "tile_size=0: must be"),
    "micro-batch": ({"micro_batch": 0}, "micro_batch=0: must be an integer >= 1"),
}


@pytest.mark.parametrize("kind", ["hunyuan", "dc_ae"])
@pytest.mark.parametrize("case", TILES)
def test_tiles_that_are_no_whole_latents_are_refused(case: str, kind: str) -> None:
    wrong, words = TILES[case]
    with pytest.raises(ValueError, match=words.format(space=32 if kind == "hunyuan" else 128)):
        AUTOENCODER_CONFIGS[kind](**wrong)


def test_earlier_configurations_mean_what_they_meant() -> None:
    """``tiling`` was the only option, and saved configurations state it."""
    cut = ("spatial_tiling", "temporal_tiling", "tile_size", "tile_frames", "tile_overlap")
    found = {tiling: HunyuanConfig(tiling=tiling).now for tiling in (None, False, True)}
    meaning = {tiling: tuple(getattr(cfg, name) for name in cut) for tiling, cfg in found.items()}
    assert meaning[False] == (False, True, 256, 16, 0.25)  # as diffusers cuts time, whether it is asked to or not
    assert meaning[True] == (True, True, 256, 64, 0.25)
    assert meaning[None] == (True, False, 256, 64, 0.25)  # as the published configurations have it
    with pytest.raises(ValueError, match="tiling=true: is of earlier versions, and must be null beside tile_size"):
        HunyuanConfig(tiling=True, tile_size=512)


def test_features_made_before_the_options_came_still_fit() -> None:
    """What they were made for had these keys alone."""
    earlier = {"kind": "hunyuan", "path": "p", "tiling": False}
    assert latents_depend_on(HunyuanConfig(path="p", tiling=False)) == earlier
    flux = AUTOENCODER_CONFIGS["flux2d"](path="p")
    assert latents_depend_on(flux) == {"kind": "flux2d", "path": "p", "micro_batch": 8}
    posterior = replace(flux, sample="posterior")
    assert identity_hash(latents_depend_on(posterior)) != identity_hash(latents_depend_on(flux))
    assert latents_depend_on(HunyuanConfig(path="p")) != earlier


CONFIG = """
name: a
model: {kind: mmdit, size: debug, in_channels: 128, patch_size: 1, context_in_dim: 32, vec_in_dim: 32}
vae: {kind: dc_ae}
text: {kind: bytes, dim: 32}
data: {table: clips.csv, buckets: {256px: {8: [1.0, 1]}}}
train: {steps: 1}
"""


def test_the_model_behind_dc_ae_has_patch_1(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    assert load_config(RunConfig, str(path), []).vae.kind == "dc_ae"
    with pytest.raises(UserError) as caught:
        load_config(RunConfig, str(path), ["model.patch_size=2"])
    said = str(caught.value)
    assert "model.patch_size=2: must be 1 with vae.kind=dc_ae, whose latents span 32x32 pixels" in said
    assert "\n" not in said
    with pytest.raises(UserError, match=r"vae\.scale=0"):
        load_config(RunConfig, str(path), ["vae.scale=0.0"])
    with pytest.raises(UserError, match=r"vae\.sample: unknown key"):
        load_config(RunConfig, str(path), ["vae.sample=posterior"])
    with pytest.raises(UserError, match=r"vae\.sample='mean': "):
        load_config(RunConfig, str(path), ["vae={kind: hunyuan, sample: mean}", "model.in_channels=16"])


def test_names_of_open_sora_1(golden: Path) -> None:
    """What the tests above take for published is what the published classes have."""
    names = json.loads((golden / "v1" / "names_vae.json").read_text())
    for kind, name, prefix in (
        ("sd", "v1.0 VideoAutoencoderKL (SD VAE)", "module."),
        ("opensora_v1_2", "v1.2 OpenSoraVAE_V1_2", ""),
        ("opensora_v1_3", "v1.3 OpenSoraVAE_V1_3", ""),
    ):
        shapes = {f"{prefix}{one}": list(shape) for one, shape in PUBLISHED[kind]().items()}
        assert shapes == names[name]["shapes"]


@pytest.mark.parametrize("kind", ["opensora_v1_2", "opensora_v1_3"])
def test_folders_of_the_hub(kind: str, tmp_path: Path) -> None:
    """model.safetensors beside the arguments of the published class, which the weights speak for."""
    write_small(kind, tmp_path / "model.safetensors")
    stated = {
        "model_type": "VideoAutoencoderPipeline",
        "micro_frame_size": 17,
        "shift": [9.0] * 4,
        "scale": 9.0,
        "vae_2d": {"type": "VideoAutoencoderKL", "subfolder": "vae"},
        "encoder": {"z_channels": 16},
        "norm_num_groups": 2,
        "num_groups": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(stated))
    cfg = AUTOENCODER_CONFIGS[kind](path=str(tmp_path))
    check_autoencoder(cfg)
    autoencoder: Any = build_autoencoder(cfg, "cpu", torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    found = autoencoder.network.state_dict()
    assert set(found) == set(tensors) and all(torch.equal(found[name], x) for name, x in tensors.items())


def test_other_channels_are_not_normalized(tmp_path: Path) -> None:
    changed = {"encoder.conv_out.conv.weight": (16, 32, 3, 3, 3), "encoder.conv_out.conv.bias": (16,)}
    changed["decoder.conv_in.conv.weight"] = (32, 8, 3, 3, 3)
    path = str(write_small("opensora_v1_3", tmp_path / "small.safetensors", **changed))
    said = refusal(AUTOENCODER_CONFIGS["opensora_v1_3"](path=path))
    assert said == f"vae.normalization=video: is of 16 channels, and {path} has 8; must be none"
    check_autoencoder(AUTOENCODER_CONFIGS["opensora_v1_3"](path=path, normalization="none"))


def test_older_names_of_stable_diffusion(tmp_path: Path) -> None:
    """The same weights behind a prefix, in the names of diffusers before 0.16, and in those of the first release."""
    tensors = load_file(write_small("sd", tmp_path / "now.safetensors"))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def of_old(name: str) -> str:
        for new, word in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{word}.")
        return name

    first = compvis(tensors)
    for file, weights in (
        ("prefix", {f"module.{name}": x for name, x in tensors.items()}),
        ("old", {of_old(name): x for name, x in tensors.items()}),
        ("first", first),
    ):
        path = tmp_path / f"{file}.safetensors"
        save_file(weights, path, {"config": json.dumps({"norm_num_groups": 2})})
        autoencoder: Any = build_autoencoder(AUTOENCODER_CONFIGS["sd"](path=str(path)), "cpu", torch.float32)
        found = autoencoder.network.state_dict()
        assert all(torch.equal(found[name], x) for name, x in tensors.items()) and len(found) == len(tensors)


def compvis(tensors: dict[str, Any]) -> dict[str, Any]:
    """By the table of published names and what becomes of them."""
    from opensora.models.vae.flux2d_names import diffusers_name
    from tests.published_autoencoders import ae

    names = {diffusers_name(name, 4): name for name in ae((4, 4, 8, 8), 1, 4)}
    found = {names.get(name, name): x for name, x in tensors.items()}
    matrices = ("attn_1.q.weight", "attn_1.k.weight", "attn_1.v.weight", "attn_1.proj_out.weight")
    return {name: x[..., None, None] if name.endswith(matrices) else x for name, x in found.items()}
