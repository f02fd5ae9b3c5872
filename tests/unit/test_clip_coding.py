"""Clips of any length and size through the autoencoders of Open-Sora 1.x: sizes as planned, as many frames as asked
for, draws of their own for every sample, and the memory and work that the planner reckons with."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opensora.assembly.encoders import Encoders
from opensora.inference.lengths import asked_for, coded, frames_of, latents_made
from opensora.models.base import ClipMeasure, decode_clip, decoded_frames, latent_grid
from opensora.models.vae import AUTOENCODER_CONFIGS, autoencoder_shape, build_autoencoder
from opensora.models.vae.opensora_1x.causal_network import causal_attention
from opensora.models.vae.opensora_1x.clip_coding import CausalPieces, PaddedPieces
from opensora.planner import coding_memory
from opensora.sampling.options import SamplingOption
from tests import factored_family
from tests.published_autoencoders import write_small

CPU = torch.device("cpu")
KINDS = ("sd", "opensora_v1_2", "opensora_v1_3")
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "sd": [{}],
    "opensora_v1_2": [{}, {"micro_frame_size": None}, {"micro_frame_size": 6}],
    "opensora_v1_3": [
        {},
        {"temporal_overlap": False},
        {"micro_frame_size": None},
        {"micro_batch": None},
        {"micro_frame_size": 6, "normalization": "none"},
        {"temporal_overlap": False, "normalization": "video_5frames"},
    ],
}
CASES = [(kind, options) for kind in KINDS for options in OPTIONS[kind]]
FEW = [("opensora_v1_3", {})]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    return {kind: str(write_small(kind, folder / f"{kind}.safetensors")) for kind in KINDS}


def configured(files: dict[str, str], kind: str, options: dict[str, Any]) -> Any:
    return AUTOENCODER_CONFIGS[kind](path=files[kind], **options)


@pytest.mark.parametrize(("kind", "options"), FEW)
def test_sizes_are_those_of_the_network(kind: str, options: dict[str, Any], files: dict[str, str]) -> None:
    """Any length and size, by runs on the meta device; what cannot be coded is refused by the same rule."""
    compare_sizes(kind, options, files, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_any_size_is_that_of_the_network(kind: str, options: dict[str, Any], files: dict[str, str]) -> None:
    compare_sizes(kind, options, files, 30)


def compare_sizes(kind: str, options: dict[str, Any], files: dict[str, str], count: int) -> None:
    cfg, draw = configured(files, kind, options), np.random.default_rng(1)
    shape, autoencoder = autoencoder_shape(cfg), build_autoencoder(cfg, "meta", torch.float32)
    for frames in (1, *draw.integers(2, 45, count).tolist()):
        height, width = draw.integers(8, 60, 2).tolist()
        pixels = torch.empty(2, 3, frames, height, width, device="meta")
        try:
            grid = latent_grid(frames, height, width, shape)
        except ValueError as error:
            assert options.get("normalization") == "video_5frames" and "latent frames" in str(error)
            continue
        z: Any = autoencoder.encode(pixels)
        assert tuple(z.shape) == (2, shape.channels, *grid)
        assert autoencoder.decode(z).shape == (2, 3, decoded_frames(grid[0], shape), *(8 * side for side in grid[1:]))
    least = 2 if kind == "opensora_v1_3" else 8
    with pytest.raises(ValueError, match=f"do not fit the autoencoder: use {least}x{least} or more"):
        latent_grid(1, least - 1, 16, shape)
    assert latent_grid(1, least, least, shape) == (1, 1, 1)


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize("patch", [1, 2])
def test_as_many_frames_as_asked_for(kind: str, options: dict[str, Any], patch: int, files: dict[str, str]) -> None:
    """With the rules alone for every length, and by the network for one; never more than is needed."""
    shape = autoencoder_shape(configured(files, kind, options))
    denoising: Any = SimpleNamespace(patch=(patch, 2, 2))
    assert shape.coding is not None
    for frames in range(1, 130):
        made = coded(SamplingOption(num_frames=frames), denoising, shape)
        latents = latents_made(made, shape)
        assert made >= frames and decoded_frames(latents, shape) >= frames
        assert frames == 1 or latents % patch == 0
        assert frames_of(latents, made, shape) == made
        if made > frames and patch == 1:
            assert all(_too_few(fewer, frames, shape) for fewer in range(frames, made))


def _too_few(made: int, frames: int, shape: Any) -> bool:
    """Whether of so many frames that are made not as many come back, or none can be made."""
    try:
        return decoded_frames(latents_made(made, shape), shape) < frames
    except ValueError:
        return True


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_of_any_length(kind: str, files: dict[str, str]) -> None:
    """What sampling does with latents of a clip that was asked for."""
    autoencoder: Any = build_autoencoder(configured(files, kind, {}), CPU, torch.float32)
    denoising: Any = SimpleNamespace(patch=(1, 2, 2))
    for frames in (1, 3, 16, 18, 22):
        made = coded(SamplingOption(num_frames=frames), denoising, autoencoder)
        grid = latent_grid(made, 16, 24, autoencoder)
        z = torch.randn(1, autoencoder.channels, *grid, generator=torch.Generator().manual_seed(0))
        pixels = asked_for(decode_clip(autoencoder, z, made), "t2v", frames, autoencoder)
        assert pixels.shape == (1, 3, frames, 16, 24) and pixels.abs().max() <= 1


def test_zero_frames_in_front_are_those_that_are_cut(files: dict[str, str]) -> None:
    """Of 1.2's clips of 15 frames the first of 16 that are decoded is cut, not the last."""
    autoencoder: Any = build_autoencoder(configured(files, "opensora_v1_2", {}), CPU, torch.float32)
    z = torch.randn(1, 4, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    whole, cut = autoencoder.decode(z), decode_clip(autoencoder, z, 15)
    assert whole.shape[2] == 16 and torch.equal(cut, whole[:, :, 1:])


def test_with_the_familys_own_lengths() -> None:
    """``noise=published``: whole pieces alone where the published sizes say so, and nothing where these say 0."""
    denoising: Any = SimpleNamespace(patch=(1, 2, 2))
    for coding, frames, latents, decoded in (
        (CausalPieces(17, overlap=True), 40, 10, 33),
        (CausalPieces(17, overlap=False), 40, 10, 34),
        (CausalPieces(None), 40, 10, 37),
        (PaddedPieces(17), 40, 12, 40 + 2),
        (PaddedPieces(17), 16, 4, 16),
    ):
        shape: Any = SimpleNamespace(channels=4, stride=(4, 8, 8), causal=True, coding=coding)
        made = coded(SamplingOption(num_frames=frames, noise="published"), denoising, shape)
        assert (latents_made(made, shape), decoded_frames(latents, shape)) == (latents, decoded)
    with pytest.raises(ValueError, match="makes no latent frames with noise=published"):
        shape = SimpleNamespace(channels=4, stride=(4, 8, 8), causal=True, coding=CausalPieces(17))
        coded(SamplingOption(num_frames=16, noise="published"), denoising, shape)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_belong_to_samples(kind: str, files: dict[str, str]) -> None:
    """A sample's latents are the same alone and beside others; two draws of one autoencoder are not alike."""
    autoencoder: Any = build_autoencoder(configured(files, kind, {"micro_batch": 2}), CPU, torch.float32)
    encoders = Encoders(autoencoder=autoencoder, text_encoder=None, device=CPU, seed=7)  # type: ignore[arg-type]
    pixels = torch.rand(3, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = encoders.latents(pixels, 2, (4, 5, 6))
    for row, sample in enumerate((4, 5, 6)):
        alone = encoders.latents(pixels[row : row + 1], 2, (sample,))
        assert torch.allclose(alone[0], together[row], atol=1e-5)
    assert not torch.allclose(encoders.latents(pixels, 3, (4, 5, 6)), together, atol=1e-2)
    seen: dict[str, Tensor] = {}

    def draw(shape: tuple[int, ...], stage: str = "") -> Tensor:
        seen[stage] = torch.zeros(3, *shape)
        return seen[stage]

    mode = autoencoder.encode(pixels, draw=draw)
    assert torch.allclose(mode, autoencoder.encode(pixels), atol=1e-6)
    assert set(seen) == ({"spatial", "temporal"} if kind == "opensora_v1_2" else {""})


@pytest.mark.parametrize("most", [1, 7, 60, 10_000])
def test_causal_attention_in_runs(most: int) -> None:
    """Against a mask over all pairs, written out."""
    q, k, v = (
        torch.randn(2, 1, 23, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)
    )
    scores = (q @ k.transpose(-1, -2)) * 8**-0.5
    scores = scores.masked_fill(torch.ones(23, 23, dtype=torch.bool).triu(1), float("-inf"))
    assert torch.allclose(causal_attention(q, k, v, most), scores.softmax(-1) @ v, atol=1e-12)


@pytest.mark.parametrize(
    "kind", ["opensora_v1_2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[::2])]
)
def test_the_planner_knows_them(kind: str, files: dict[str, str]) -> None:
    """Memory and work of coding grow with clips, and pieces keep that of a long clip below its length."""
    cfg = configured(files, kind, {})
    for of in (coding_memory.encode_bytes, coding_memory.decode_bytes):
        short, long = (of(cfg, 1, frames, 32, 32, torch.float32) for frames in (17, 85))
        pixels = 3 * 32 * 32 * 4
        assert 17 * pixels < short < long < 5 * short
        assert of(cfg, 1, 17, 64, 64, torch.float32) > 3 * short - 17 * pixels
    flops = [coding_memory.decode_flops(cfg, 1, frames, 32, 32) for frames in (17, 33)]
    assert 1.8 * flops[0] < flops[1] < 2.1 * flops[0]
    shape = autoencoder_shape(cfg)
    measure = ClipMeasure(shape, factored_family.describe(factored_family.ToyConfig(channels=shape.channels)))
    grid = latent_grid(34, 32, 32, shape)
    assert measure(34, 32, 32)[0] == grid[0] * 4


def test_pieces_bound_the_memory_of_a_published_one() -> None:
    """1.3 as published: four pieces take hardly more than one beside their pixels; the whole clip takes far more."""
    cfg = AUTOENCODER_CONFIGS["opensora_v1_3"]()
    whole = AUTOENCODER_CONFIGS["opensora_v1_3"](micro_frame_size=None)
    pixels = 3 * 128 * 128 * 4
    one, four, at_once = (
        coding_memory.encode_bytes(c, 1, frames, 128, 128, torch.bfloat16)
        for c, frames in ((cfg, 17), (cfg, 65), (whole, 65))
    )
    assert four < one + 2 * 65 * pixels and at_once > 2.5 * four
