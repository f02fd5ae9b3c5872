"""Wan's autoencoders, both versions: latents and pixels are those of diffusers and of its pipelines' arithmetic."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from acceleration.diagnostics.memory_usage import Allocations
from opensora.models.base import decoded_frames, latent_grid
from opensora.models.vae import (
    AUTOENCODER_CONFIGS,
    AUTOENCODERS,
    HunyuanConfig,
    Wan22VAEConfig,
    WanVAEConfig,
    autoencoder_shape,
    build_autoencoder,
    check_autoencoder,
)
from opensora.models.vae.wan_sizes import WAN, WAN22
from opensora.planner.coding_memory import decode_bytes, encode_bytes, encode_flops_of
from opensora.utils.errors import UserError
from opensora.utils.tasks import Task, one_by_one

KINDS = ("wan", "wan22")
STRIDE = {"wan": (4, 8, 8), "wan22": (4, 16, 16)}
CHANNELS = {"wan": 3, "wan22": 5}
SMALL: dict[str, dict[str, Any]] = {
    "wan": {"base_dim": 4, "z_dim": 3, "num_res_blocks": 1},
    "wan22": {
        "base_dim": 4,
        "decoder_base_dim": 8,
        "z_dim": 5,
        "num_res_blocks": 1,
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
    },
}


def clip(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(3), dtype=dtype) * 2 - 1


def statistics(kind: str) -> tuple[list[float], list[float]]:
    """Of every channel, unlike any published ones."""
    count = CHANNELS[kind]
    return [0.3 * i - 0.4 for i in range(count)], [0.7 + 0.25 * i for i in range(count)]


def write(kind: str, folder: Path) -> Path:
    """A small random autoencoder as diffusers writes it."""
    from diffusers import AutoencoderKLWan

    mean, std = statistics(kind)
    torch.manual_seed(0)
    model = AutoencoderKLWan(**SMALL[kind], latents_mean=mean, latents_std=std)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {kind: str(write(kind, tmp_path_factory.mktemp(kind))) for kind in KINDS}


def built(cfg: Any, dtype: torch.dtype = torch.float64) -> Any:
    return build_autoencoder(cfg, "cpu", dtype)


def theirs(path: str, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(path).to(dtype).eval()


def as_in_the_pipelines(vae: Any, latents: Tensor, *, back: bool) -> Tensor:
    """How WanPipeline and WanImageToVideoPipeline make latents of the network's, and these of latents."""
    mean = torch.tensor(vae.config.latents_mean).view(1, vae.config.z_dim, 1, 1, 1).to(latents.dtype)
    std = 1.0 / torch.tensor(vae.config.latents_std).view(1, vae.config.z_dim, 1, 1, 1).to(latents.dtype)
    return latents / std + mean if back else (latents - mean) * std


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
@pytest.mark.parametrize("size", [(9, 32, 48), (1, 16, 32), (5, 48, 16)])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_pixels_are_those_of_diffusers(
    kind: str, size: tuple[int, int, int], dtype: torch.dtype, close: float, folders: dict[str, str]
) -> None:
    """In fp64 to what a pipeline's statistics in fp32 leave."""
    ours, reference = built(AUTOENCODER_CONFIGS[kind](path=folders[kind]), dtype), theirs(folders[kind], dtype)
    reference.enable_slicing()  # sample by sample, as here: random weights amplify how kernels add up
    pixels = clip(2, 3, *size, dtype=dtype)
    latents = ours.encode(pixels)
    with torch.no_grad():
        wanted = as_in_the_pipelines(reference, reference.encode(pixels).latent_dist.mode(), back=False)
    assert latents.dtype == dtype and latents.shape == (2, CHANNELS[kind], *latent_grid(*size, ours))
    assert (latents - wanted).abs().max() <= close * wanted.abs().max()
    assert wanted.flatten(2).std(2).min() > 0  # no channel is the same everywhere
    with torch.no_grad():
        their_pixels = reference.decode(as_in_the_pipelines(reference, wanted, back=True)).sample
    found = ours.decode(wanted)
    assert found.shape == pixels.shape and not found.requires_grad
    assert (found - their_pixels).abs().max() <= close * their_pixels.abs().max()
    assert found.abs().max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_channel_has_a_mean_and_a_deviation_of_its_own(kind: str, folders: dict[str, str]) -> None:
    ours, reference = built(AUTOENCODER_CONFIGS[kind](path=folders[kind])), theirs(folders[kind], torch.float64)
    pixels = clip(1, 3, 5, 32, 32)
    raw = reference.encode(pixels).latent_dist.mode()
    for channel, (mean, std) in enumerate(zip(*statistics(kind), strict=True)):
        assert torch.allclose(ours.encode(pixels)[:, channel], (raw[:, channel] - mean) / std, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_depends_on_no_later_one(kind: str, folders: dict[str, str]) -> None:
    """Encoding is causal, T' = 1 + (T - 1) / 4, and decoding gives as many frames back."""
    ours = built(AUTOENCODER_CONFIGS[kind](path=folders[kind]))
    pixels = clip(1, 3, 9, 32, 32)
    whole = ours.encode(pixels)
    assert whole.shape[2] == 3
    assert torch.allclose(ours.encode(pixels[:, :, :5]), whole[:, :, :2], atol=1e-10)
    assert torch.allclose(ours.encode(pixels[:, :, :1]), whole[:, :, :1], atol=1e-10)
    for latent_frames in (1, 2, 3):
        made = ours.decode(whole[:, :, :latent_frames])
        assert made.shape[2] == 4 * (latent_frames - 1) + 1 == decoded_frames(latent_frames, ours)
    for size in ((8, 32, 32), (9, 32, STRIDE[kind][2] + 8 if kind == "wan22" else 12)):
        with pytest.raises(ValueError, match="do not fit the autoencoder: use"):
            ours.encode(clip(1, 3, *size))


def test_hunyuan_from_the_folder_of_a_pipeline(tmp_path: Path) -> None:
    """HunyuanVideo's, whole in time: as diffusers codes a clip that is no longer than its window."""
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(0)
    reference = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    reference.save_pretrained(tmp_path / "vae")
    ours, pixels = built(HunyuanConfig(path=str(tmp_path))), clip(1, 3, 9, 16, 24)
    with torch.no_grad():
        wanted = reference.double().encode(pixels).latent_dist.mode() * 0.476986
        their_pixels = reference.decode(wanted.float().double() / 0.476986).sample.clamp(-1, 1)
    assert (ours.encode(pixels) - wanted).abs().max() < 1e-6
    assert (ours.decode(wanted) - their_pixels).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_published_shapes_and_parameters(kind: str) -> None:
    published = {"wan": (16, WAN), "wan22": (48, WAN22)}[kind]
    shape = autoencoder_shape(AUTOENCODER_CONFIGS[kind]())
    assert (shape.channels, shape.stride, shape.causal) == (published[0], STRIDE[kind], True)
    assert len(published[1].latents_mean) == len(published[1].latents_std) == published[0]
    model: Any = build_autoencoder(AUTOENCODER_CONFIGS[kind](), "meta", torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.network.parameters())
    assert abs(count - AUTOENCODERS[kind].parameters) < 1e-3 * count
    assert model.network.config.latents_mean == list(published[1].latents_mean)


def test_the_published_statistics_are_those_of_diffusers() -> None:
    """2.1's are the defaults of its class, which knows none of 2.2's."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        config = AutoencoderKLWan().config
    assert (list(WAN.latents_mean), list(WAN.latents_std)) == (config.latents_mean, config.latents_std)
    assert WAN22.latents_mean[::47] == (-0.2289, -0.0667) and WAN22.latents_std[::47] == (0.4765, 0.7744)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_that_no_file_states_are_as_published(kind: str, tmp_path: Path) -> None:
    folder = write(kind, tmp_path)
    stated = json.loads((folder / "config.json").read_text())
    for name in ("latents_mean", "latents_std"):
        stated.pop(name)
    (folder / "config.json").write_text(json.dumps(stated))
    cfg = AUTOENCODER_CONFIGS[kind](path=str(folder))
    with pytest.raises(UserError, match=f"latents_mean=.*; must be {CHANNELS[kind]} numbers, one for each latent"):
        check_autoencoder(cfg)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="missing"):
        check_autoencoder(cfg)  # it is then as published, which these weights are not


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_of_a_pipeline_and_a_file_that_states_itself(
    kind: str, folders: dict[str, str], tmp_path: Path
) -> None:
    whole = tmp_path / "pipeline"
    write(kind, whole / "vae")
    cfg = AUTOENCODER_CONFIGS[kind](path=str(whole))
    check_autoencoder(cfg)
    pixels = clip(1, 3, 5, 32, 32)
    wanted = built(AUTOENCODER_CONFIGS[kind](path=folders[kind])).encode(pixels)
    assert torch.equal(built(cfg).encode(pixels), wanted)
    (file,) = (whole / "vae").glob("*.safetensors")
    single, config = tmp_path / "one.safetensors", (whole / "vae" / "config.json").read_text()
    save_file(load_file(file), single, metadata={"config": config})
    assert torch.equal(built(replace(cfg, path=str(single))).encode(pixels), wanted)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "mean": ({"latents_mean": [0.0]}, "latents_mean=[0.0]; must be 3 numbers"),
    "deviation": ({"latents_std": [1.0, 0.0, 1.0]}, "latents_std=[1.0, 0.0, 1.0]; must be numbers above 0"),
    "text": ({"latents_std": "none"}, "latents_std=none; must be a list, each a number"),
    "times": ({"temperal_downsample": [True, True, True]}, "must be 3 of true and false, two of them true"),
    "no width": ({"base_dim": 0}, "base_dim=0; must be an integer from 1 to 4096"),
    "levels": ({"dim_mult": []}, "dim_mult=[]; must be 1 to 8 whole numbers"),
    "truth": ({"dim_mult": [True, 2, 4, 4]}, "dim_mult=[True, 2, 4, 4]; must be a list, each a number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_config_that_says_nonsense_is_one_line(case: str, tmp_path: Path) -> None:
    change, said = WRONG[case]
    folder = write("wan", tmp_path)
    stated = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(stated))
    for refused in (check_autoencoder, autoencoder_shape, built):
        with pytest.raises(UserError) as caught:
            refused(WanVAEConfig(path=str(folder)))
        assert said in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_the_other_kind_is_named(folders: dict[str, str], tmp_path: Path) -> None:
    for kind, other in (("wan", "wan22"), ("wan22", "wan"), ("sd", "wan22"), ("hunyuan", "wan"), ("flux2d", "wan")):
        cfg = AUTOENCODER_CONFIGS[kind](path=str(next(Path(folders[other]).glob("*.safetensors"))))
        with pytest.raises(UserError, match=f"holds an autoencoder of another kind: set vae.kind={other}"):
            check_autoencoder(cfg)
    stated = load_file(next(Path(folders["wan"]).glob("*.safetensors")))
    stated["encoder.more.weight"] = stated.pop("quant_conv.bias")
    save_file(stated, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((Path(folders["wan"]) / "config.json").read_text())
    with pytest.raises(UserError, match=r"1 missing: quant_conv.bias.*1 unexpected: encoder.more.weight"):
        check_autoencoder(WanVAEConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match=r"vae.path is not set: give the folder vae of a diffusers pipeline of Wan"):
        check_autoencoder(Wan22VAEConfig())


def test_tiles_are_those_of_diffusers(folders: dict[str, str]) -> None:
    """2.1: as ``enable_tiling`` cuts and blends, to rounding, with pieces of work of the shapes that they say."""
    cfg = WanVAEConfig(path=folders["wan"], spatial_tiling=True, tile_size=32)
    ours, reference = built(cfg), theirs(folders["wan"], torch.float64)
    reference.enable_tiling(32, 32, 24, 24)
    for network in (ours.network, reference):
        network.decoder.conv_out.weight.data.mul_(0.2)
    pixels, pieces = clip(2, 3, 5, 56, 40), []

    def run(work: list[Task]) -> list[Tensor]:
        pieces.append(len(work))
        results = one_by_one(work)
        assert all(result.shape == piece.shape for result, piece in zip(results, work, strict=True))
        return results

    with torch.no_grad():
        raw = torch.cat([reference.encode(one).latent_dist.mode() for one in pixels.split(1)])
        latents = ours.encode(pixels, run)
        mean, std = (torch.tensor(x, dtype=torch.float64).view(-1, 1, 1, 1) for x in statistics("wan"))
        assert torch.allclose(latents, (raw - mean) / std, rtol=0, atol=1e-12)
        their_pixels = torch.cat([reference.decode(one * std + mean).sample for one in latents.split(1)])
    assert their_pixels.abs().max() < 1  # tiles are clamped before they are joined, there behind that
    assert torch.allclose(ours.decode(latents, run), their_pixels, rtol=0, atol=1e-6)  # it upsamples in fp32
    assert pieces == [2 * 3 * 2] * 2
    whole = built(replace(cfg, spatial_tiling=False))
    assert not torch.allclose(whole.encode(pixels), latents, atol=1e-3)  # attention sees a tile and no more


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_work_and_half_precision(kind: str, folders: dict[str, str]) -> None:
    """A clip is a piece of work, or as many as ``micro_batch`` says; bf16 stays near."""
    cfg, counts = AUTOENCODER_CONFIGS[kind](path=folders[kind]), []

    def run(work: list[Task]) -> list[Tensor]:
        counts.append([piece.shape for piece in work])
        return one_by_one(work)

    pixels = clip(3, 3, 5, 32, 32)
    wide = built(cfg, torch.float32)
    latents = wide.encode(pixels, run)
    decoded = wide.decode(latents, run)
    together = built(replace(cfg, micro_batch=2), torch.float32)
    assert torch.allclose(together.encode(pixels, run), latents, atol=1e-4)
    assert [len(one) for one in counts] == [3, 3, 2] and counts[2][0][0] == 2
    half = built(cfg, torch.bfloat16)
    for found, truth in ((half.encode(pixels), latents), (half.decode(latents), decoded)):
        assert found.dtype == torch.float32
        assert (found - truth).abs().mean() < 0.05 * truth.abs().mean() + 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_as_forecast(kind: str, dtype: torch.dtype, folders: dict[str, str]) -> None:
    for tiled in (False, True):
        cfg = AUTOENCODER_CONFIGS[kind](path=folders[kind], spatial_tiling=tiled, tile_size=64)
        autoencoder = built(cfg, dtype)
        for batch, *size in ((1, 9, 64, 96), (2, 1, 80, 64)):
            with Allocations() as encoding:
                latents = autoencoder.encode(torch.empty(batch, 3, *size).fill_(0.5))
            with Allocations() as decoding:
                autoencoder.decode(torch.empty(latents.shape).fill_(0.5))
            assert encoding.peak == pytest.approx(encode_bytes(cfg, batch, *size, dtype), rel=0.02), size
            assert decoding.peak == pytest.approx(decode_bytes(cfg, batch, *size, dtype), rel=0.02), size


def test_forecast_of_published_sizes_without_files() -> None:
    """Memory grows by the pixels that a clip has more, and not by what the network makes of them."""
    cfg = WanVAEConfig()
    short, long = (encode_bytes(cfg, 1, frames, 96, 160, torch.bfloat16) for frames in (9, 41))
    pixels = 32 * 3 * 96 * 160
    assert 0 < long - short < 8 * pixels
    assert encode_flops_of(cfg, 1, 9, 64, 64) > 1.5 * encode_flops_of(cfg, 1, 5, 64, 64)
    with pytest.raises(ValueError, match="tile_size=100: must be a multiple of 32"):
        WanVAEConfig(tile_size=100)
    with pytest.raises(ValueError, match="tile_size=32: must be a multiple of 64"):
        Wan22VAEConfig(tile_size=32)
