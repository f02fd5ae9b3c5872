"""The block transform is orthonormal, causal and projects; the real autoencoders load, scale and complain."""

from pathlib import Path

import pytest
import torch

from opensora.models.base import latent_grid
from opensora.models.vae import (
    AUTOENCODERS,
    DCAEConfig,
    DCTConfig,
    Flux2DConfig,
    HunyuanConfig,
    autoencoder_shape,
    build_autoencoder,
)
from opensora.models.vae.dct import DCTAutoencoder, block_basis, first_frame_frequencies, kept_frequencies
from opensora.utils.errors import UserError
from opensora.utils.tasks import Task, one_by_one


def clip(frames: int = 9, height: int = 16, width: int = 24, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand((2, 3, frames, height, width), generator=generator, dtype=dtype) * 1.9 - 0.95


@pytest.mark.parametrize("spatial", [4, 8])
@pytest.mark.parametrize("equalize", [0.0, 1.0])
def test_dct_with_all_channels_is_identity(spatial: int, equalize: float) -> None:
    autoencoder = DCTAutoencoder(DCTConfig(spatial=spatial, channels=12 * spatial**2, equalize=equalize))
    pixels = clip()
    latents = autoencoder.encode(pixels)
    assert latents.shape == (2, 12 * spatial**2, 3, 16 // spatial, 24 // spatial)
    assert (autoencoder.decode(latents) - pixels).abs().max() < 1e-5


@pytest.mark.parametrize(("spatial", "channels"), [(4, 16), (4, 64), (8, 64), (8, 300)])
def test_dct_rows_are_orthonormal(spatial: int, channels: int) -> None:
    basis = block_basis(kept_frequencies(spatial, channels), 4, spatial)
    assert torch.allclose(basis @ basis.T, torch.eye(channels, dtype=torch.float64), atol=1e-12)
    first = block_basis([f for f in first_frame_frequencies(spatial, channels) if f], 1, spatial)
    assert torch.allclose(first @ first.T, torch.eye(len(first), dtype=torch.float64), atol=1e-12)


def test_dct_keeps_energy_up_to_its_scale() -> None:
    autoencoder = DCTAutoencoder(DCTConfig(channels=768, scale=0.5))
    pixels = clip(dtype=torch.float64)
    latents = autoencoder.encode(pixels)
    assert latents.dtype == torch.float64
    assert torch.isclose(latents.square().sum(), 0.25 * pixels.square().sum(), rtol=1e-12)


@pytest.mark.parametrize("equalize", [0.0, 0.5])
def test_dct_projects(equalize: float) -> None:
    autoencoder = DCTAutoencoder(DCTConfig(channels=64, equalize=equalize))
    latents = autoencoder.encode(clip() * 0.3)  # small enough that the clamp of decode does nothing
    assert torch.allclose(autoencoder.encode(autoencoder.decode(latents)), latents, atol=1e-5)


def test_dct_is_causal() -> None:
    autoencoder = DCTAutoencoder(DCTConfig())
    pixels, changed = clip(13), clip(13)
    changed[:, :, 5:] = 0
    before, after = autoencoder.encode(pixels), autoencoder.encode(changed)
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.equal(before[:, :, 2], after[:, :, 2])
    still = autoencoder.encode(pixels[:, :, :1])
    assert torch.equal(still, before[:, :, :1])


def test_dct_channels_mean_the_same_in_first_and_later_frames() -> None:
    later, first = kept_frequencies(8, 64), first_frame_frequencies(8, 64)
    assert later[0] == first[0] == (0, 0, 0, 0)
    assert all(f == g for f, g in zip(later, first, strict=True) if f[1] == 0)
    assert len(set(first)) == 64
    lumas = sum(f[0] == 0 for f in later)
    assert lumas > 64 / 3
    assert kept_frequencies(8, 32) == later[:32]


def test_dct_psnr_of_a_smooth_clip() -> None:
    t, y, x = torch.meshgrid(torch.arange(9), torch.arange(32), torch.arange(32), indexing="ij")
    pixels = torch.stack([torch.sin(0.1 * (x + t)), torch.cos(0.1 * (y - t)), 0.01 * x])[None]
    for channels, least in ((64, 35), (300, 48)):
        autoencoder = DCTAutoencoder(DCTConfig(channels=channels))
        error = (autoencoder.decode(autoencoder.encode(pixels)) - pixels).square().mean()
        assert 10 * torch.log10(4 / error) > least


def test_dct_computes_bf16_sidein_fp32() -> None:
    autoencoder = DCTAutoencoder(DCTConfig())
    pixels = clip().bfloat16()
    assert torch.equal(autoencoder.encode(pixels), autoencoder.encode(pixels.float()))


@pytest.mark.parametrize(("frames", "height"), [(8, 16), (9, 12)])
def test_dct_refuses_sizes_it_cannot_code(frames: int, height: int) -> None:
    with pytest.raises(ValueError, match=r"use 4k\+1 frames"):
        DCTAutoencoder(DCTConfig()).encode(clip(frames, height))


@pytest.mark.parametrize(
    "wrong", [{"spatial": 5}, {"channels": 0}, {"channels": 769}, {"scale": 0.0}, {"equalize": 2.0}]
)
def test_dct_config_refuses(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*must be"):
        DCTConfig(**wrong)


def test_shapes_agree_with_built_autoencoders() -> None:
    opensora_1x = {"sd", "sd_temporal_decoder", "opensora_v1_2", "opensora_v1_3"}
    assert set(AUTOENCODERS) == {"dct", "hunyuan", "flux2d", "dc_ae", "wan", "wan22", *opensora_1x}
    for cfg in (DCTConfig(), DCTConfig(spatial=4, channels=16)):
        built, shape = build_autoencoder(cfg, "cpu", torch.float32), autoencoder_shape(cfg)
        assert (built.channels, built.stride, built.causal) == (shape.channels, shape.stride, shape.causal)
        assert built.encode(clip(9, 16, 24)).shape[2:] == latent_grid(9, 16, 24, shape)
    published = autoencoder_shape(HunyuanConfig())
    assert (published.channels, published.stride, published.causal) == (16, (4, 8, 8), True)
    published = autoencoder_shape(Flux2DConfig())
    assert (published.channels, published.stride, published.causal) == (16, (1, 8, 8), False)
    published = autoencoder_shape(DCAEConfig())
    assert (published.channels, published.stride, published.causal) == (128, (4, 32, 32), False)


@pytest.fixture(scope="module")
def hunyuan_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(0)
    model = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    folder = tmp_path_factory.mktemp("hunyuan")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("flux")
    model.save_pretrained(folder)
    return str(folder)


def test_hunyuan_scales_and_keeps_shapes(hunyuan_folder: str) -> None:
    from diffusers import AutoencoderKLHunyuanVideo

    cfg = HunyuanConfig(path=hunyuan_folder)
    autoencoder, shape = build_autoencoder(cfg, "cpu", torch.float32), autoencoder_shape(cfg)
    assert (autoencoder.channels, autoencoder.stride, autoencoder.causal) == (4, (4, 8, 8), True)
    assert (shape.channels, shape.stride) == (4, (4, 8, 8))
    pixels = clip(5, 16, 16)
    latents = autoencoder.encode(pixels)
    assert latents.shape == (2, 4, *latent_grid(5, 16, 16, autoencoder))
    reference = AutoencoderKLHunyuanVideo.from_pretrained(hunyuan_folder)
    reference.enable_slicing()  # sample by sample, as here
    with torch.no_grad():
        assert torch.equal(latents, reference.encode(pixels).latent_dist.mode() * 0.476986)
        assert torch.equal(autoencoder.decode(latents), reference.decode(latents / 0.476986).sample.clamp(-1, 1))
    assert not latents.requires_grad
    tiled = build_autoencoder(HunyuanConfig(path=hunyuan_folder, tiling=True), "cpu", torch.float32)
    assert torch.allclose(tiled.encode(pixels), latents, atol=1e-5)


# (pixels and frames of a window, overlap), the size of the clip; no window: as diffusers comes, 16 frames, time only.
TILES: dict[str, tuple[tuple[int, int, float] | None, tuple[int, int, int]]] = {
    "time": (None, (29, 16, 16)),
    "time, a last window of context alone": (None, (25, 16, 16)),
    "time and space": ((32, 16, 0.25), (21, 40, 40)),
    "space, one side shorter than a window": ((32, 64, 0.5), (5, 24, 40)),
    "still": ((16, 64, 0.5), (1, 40, 24)),
}


@pytest.mark.parametrize("case", TILES)
def test_hunyuan_tiles_are_those_of_diffusers(case: str, hunyuan_folder: str) -> None:
    """Bit for bit, both ways, for clips that windows do not divide."""
    from diffusers import AutoencoderKLHunyuanVideo

    window, size = TILES[case]
    reference = AutoencoderKLHunyuanVideo.from_pretrained(hunyuan_folder)
    cfg = HunyuanConfig(path=hunyuan_folder, tiling=False)
    if window:
        pixels, frames, overlap = window
        steps = int(pixels * (1 - overlap)), int(frames * (1 - overlap))
        reference.enable_tiling(pixels, pixels, frames, steps[0], steps[0], steps[1])
        cfg = HunyuanConfig(
            path=hunyuan_folder, temporal_tiling=True, tile_size=pixels, tile_frames=frames, tile_overlap=overlap
        )
    reference.enable_slicing()
    autoencoder = build_autoencoder(cfg, "cpu", torch.float64)  # random weights amplify what fp32 rounds
    with torch.no_grad():
        theirs = reference.double().encode(clip(*size).double()).latent_dist.mode() * 0.476986
        given = theirs.float()  # as latents are, whatever the network computes in
        their_pixels = reference.decode((given / 0.476986).double()).sample.clamp(-1, 1)
    assert (autoencoder.encode(clip(*size)) - theirs).abs().max() < 1e-6
    assert (autoencoder.decode(given) - their_pixels).abs().max() < 1e-6
    autoencoder = build_autoencoder(cfg, "cpu", torch.float32)
    # Its loop over tiles bit for bit, over the same network: it adds up attention in another order.
    network = autoencoder.network
    reference.encoder, reference.decoder = network.encoder, network.decoder
    reference.quant_conv, reference.post_quant_conv = network.quant_conv, network.post_quant_conv
    clips, pieces = clip(*size), []

    def run(work: list[Task]) -> list[torch.Tensor]:
        pieces.append(len(work))
        results = one_by_one(work)
        assert all(result.shape == piece.shape for result, piece in zip(results, work, strict=True))
        return results

    latents = autoencoder.encode(clips, run)
    decoded = autoencoder.decode(latents, run)
    with torch.no_grad():
        assert torch.equal(latents, reference.encode(clips).latent_dist.mode() * 0.476986)
        assert torch.equal(decoded, reference.decode(latents / 0.476986).sample.clamp(-1, 1))
    assert decoded.shape == clips.shape and all(count > 2 for count in pieces)  # more than one for each sample


def test_flux2d_codes_frames_as_images(flux_folder: str) -> None:
    from diffusers import AutoencoderKL

    autoencoder = build_autoencoder(Flux2DConfig(path=flux_folder, micro_batch=2), "cpu", torch.float32)
    pixels = clip(3, 16, 16)
    latents = autoencoder.encode(pixels)
    assert latents.shape == (2, 16, *latent_grid(3, 16, 16, autoencoder))
    reference = AutoencoderKL.from_pretrained(flux_folder)
    with torch.no_grad():
        mode = reference.encode(pixels[:, :, 1]).latent_dist.mode()
    assert torch.allclose(latents[:, :, 1], (mode - 0.1159) * 0.3611, atol=1e-5)
    decoded = autoencoder.decode(latents)
    assert decoded.shape == pixels.shape
    with torch.no_grad():
        assert torch.allclose(decoded[:, :, 1], reference.decode(mode).sample.clamp(-1, 1), atol=1e-4)


@pytest.mark.parametrize("config", [HunyuanConfig, Flux2DConfig, DCAEConfig])
def test_missing_weights_are_one_line(config: type, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vae.path is not set") as caught:
        build_autoencoder(config(), "cpu", torch.float32)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"no config.json there"):
        build_autoencoder(config(path=str(tmp_path)), "cpu", torch.float32)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot be loaded") as caught:
        build_autoencoder(config(path=str(tmp_path)), "cpu", torch.float32)
    assert "\n" not in str(caught.value)
