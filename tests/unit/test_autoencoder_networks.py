"""What autoencoders compute: attention as the dense mask has it, draws by their keys, memory as forecast."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from acceleration.diagnostics.memory_usage import Allocations
from opensora.assembly.encoders import Encoders
from opensora.models.base import latent_grid
from opensora.models.vae import AUTOENCODER_CONFIGS, AutoencoderConfig, DCTConfig, build_autoencoder, hunyuan_network
from opensora.models.vae.dc_ae_network import DCAESizes, VideoDCAE
from opensora.models.vae.hunyuan_network import CausalAttention, CausalConv3d
from opensora.models.vae.posterior import Posterior
from opensora.planner.coding_memory import decode_bytes, encode_bytes
from opensora.utils.rng import torch_generator
from opensora.utils.tasks import Task, one_by_one
from tests.dist.problem import FakeText
from tests.published_autoencoders import write_small

CPU = torch.device("cpu")
KINDS = ("hunyuan", "flux2d", "dc_ae")
OPTIONS: dict[str, dict[str, Any]] = {
    "hunyuan": {"tile_size": 32, "tile_frames": 16},
    "flux2d": {"micro_batch": 3},
    "dc_ae": {"tile_size": 128, "tile_frames": 16},
}


def clips(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(3), dtype=dtype) * 2 - 1


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AutoencoderConfig]:
    folder = tmp_path_factory.mktemp("autoencoders")
    return {
        kind: AUTOENCODER_CONFIGS[kind](path=str(write_small(kind, folder / f"{kind}.safetensors")), **OPTIONS[kind])
        for kind in KINDS
    }


def dense(layer: CausalAttention, x: Tensor) -> Tensor:
    """The formula with its whole mask: token i sees token j where j is of no later frame."""
    width, frames, height, columns = x.shape[1:]
    normed = F.group_norm(x, layer.group_norm.num_groups, layer.group_norm.weight, layer.group_norm.bias, 1e-6)
    tokens = normed.flatten(2).transpose(1, 2)  # (B, THW, C)
    q, k, v = layer.to_q(tokens), layer.to_k(tokens), layer.to_v(tokens)
    frame = torch.arange(frames).repeat_interleave(height * columns)
    scores = (q @ k.transpose(1, 2) / width**0.5).masked_fill(frame[:, None] < frame[None, :], -torch.inf)
    out = layer.to_out[0](scores.softmax(-1) @ v)
    return x + out.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("scores", [2**26, 64])
@pytest.mark.parametrize("size", [(2, 8, 1, 3, 2), (1, 8, 4, 2, 3), (2, 8, 5, 1, 1), (1, 8, 3, 4, 4)])
def test_attention_is_that_of_the_dense_mask(
    size: tuple[int, ...], scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few scores are held at a time; gradients as well."""
    monkeypatch.setattr(hunyuan_network, "SCORES", scores)
    torch.manual_seed(0)
    layer, x = CausalAttention(8, 2).double(), clips(*size, dtype=torch.float64)
    found, truth = (x.clone().requires_grad_() for _ in range(2))
    assert torch.allclose(layer(found), dense(layer, truth), atol=1e-12, rtol=0)
    weight = torch.randn(size, dtype=torch.float64)
    (layer(found) * weight).sum().backward()
    (dense(layer, truth) * weight).sum().backward()
    assert found.grad is not None and truth.grad is not None
    assert torch.allclose(found.grad, truth.grad, atol=1e-10, rtol=0)


def test_attention_needs_no_memory_of_tokens_squared() -> None:
    """Twice the frames take twice the memory, which is far below one mask of a byte per pair."""
    layer, peaks = CausalAttention(8, 2), {}
    for frames in (16, 32):
        x = torch.zeros(1, 8, frames, 12, 12)
        with Allocations() as seen, torch.no_grad():
            layer(x)
        peaks[frames] = seen.peak
    assert peaks[32] <= 2 * peaks[16] and peaks[32] < (32 * 144) ** 2 / 10


@pytest.mark.parametrize("values", [1, 300, 5000])
@pytest.mark.parametrize(("frames", "stride"), [(1, (1, 1, 1)), (7, (1, 1, 1)), (9, (2, 2, 2)), (5, (1, 2, 2))])
def test_convolutions_in_parts_are_the_same(
    frames: int, stride: tuple[int, int, int], values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few frames at a time; the reference pads the whole clip. Kernel 1 is not padded."""
    torch.manual_seed(0)
    x = clips(2, 3, frames, 6, 8, dtype=torch.float64)
    for kernel in (3, 1) if stride == (1, 1, 1) else (3,):
        layer = CausalConv3d(3, 4, kernel, stride).double()
        edges = (kernel // 2,) * 4
        truth = layer.conv(F.pad(x, (*edges, kernel - 1, 0), mode="replicate"))
        monkeypatch.setattr(hunyuan_network, "CONV_VALUES", values)
        assert torch.allclose(layer(x), truth, atol=1e-13, rtol=0)


def test_dc_ae_of_a_still_is_that_of_diffusers() -> None:
    """With the middle slice in time of every kernel, as a 2-D autoencoder with the same names of another kind."""
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    widths, depths = (8, 8, 16, 32, 32, 32), (1,) * 6
    ours = VideoDCAE(DCAESizes(widths=widths, encoder_depths=depths, decoder_depths=depths, channels=8)).double()
    kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    theirs = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=32,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=depths,
        decoder_layers_per_block=depths,
        encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    ).double()
    for parameter in ours.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.2 + (0.5 if parameter.dim() == 1 else 0))
    _give(ours, theirs)
    x = clips(1, 3, 1, 64, 32, dtype=torch.float64)
    with torch.no_grad():
        z = ours.encoder(x)  # the other takes the squares of its norms in fp32
        assert torch.allclose(z[:, :, 0], theirs.encoder(x[:, :, 0]), atol=1e-6)
        assert torch.allclose(ours.decoder(z)[:, :, 0], theirs.decoder(z[:, :, 0]), atol=1e-6)


def _give(ours: VideoDCAE, theirs: Any) -> None:
    """Weights in the order of the modules; the other has queries, keys and values apart."""
    for mine, other, blocks in (
        (ours.encoder, theirs.encoder, theirs.encoder.down_blocks),
        (ours.decoder, theirs.decoder, theirs.decoder.up_blocks),
    ):
        last = [other.norm_out, other.conv_out] if hasattr(other, "norm_out") else [other.conv_out]
        targets = [p for module in (other.conv_in, blocks, *last) for p in module.parameters()]
        sources: list[Tensor] = []
        for module in (mine.project_in, mine.stages, mine.project_out):
            for name, parameter in module.named_parameters():
                middle = parameter.data[:, :, parameter.shape[2] // 2] if parameter.dim() == 5 else parameter.data
                sources += middle.chunk(3) if name.endswith("qkv.conv.weight") else [middle]
        for source, target in zip(sources, targets, strict=True):
            target.data.copy_(source.reshape(target.shape))


@pytest.mark.parametrize("kind", ["hunyuan", "flux2d"])
def test_draws_are_functions_of_their_keys(kind: str, configs: dict[str, Any]) -> None:
    """Whatever samples are coded together; another epoch, seed, sample or purpose draws otherwise."""
    autoencoder: Any = build_autoencoder(replace(configs[kind], sample="posterior"), CPU, torch.float32)
    encoders = Encoders(autoencoder=autoencoder, text_encoder=FakeText(), device=CPU, seed=7)
    pixels, ids = clips(3, 3, 5, 16, 24), (4, 9, 2)
    together = encoders.latents(pixels, 1, ids)
    posterior = autoencoder.posterior(pixels)
    scale, shift = (0.476986, 0.0) if kind == "hunyuan" else (0.3611, 0.1159)
    for row, sample in enumerate(ids):
        noise = torch.randn(posterior.mean.shape[1:], generator=torch_generator(7, 1, sample, "posterior"))
        drawn = posterior.mean[row] + torch.exp(posterior.logvar[row] / 2) * noise
        assert torch.allclose(together[row], (drawn - shift) * scale, atol=1e-6)
        alone = encoders.latents(pixels[row : row + 1], 1, (sample,))
        assert torch.allclose(alone[0], together[row], atol=1e-5)
    others = [
        encoders.latents(pixels, 2, ids),
        encoders.latents(pixels, 1, (4, 9, 3)),
        encoders.latents(pixels, 1, ids, "reference"),
        replace(encoders, seed=8).latents(pixels, 1, ids),
    ]
    assert all(not torch.allclose(other[2], together[2], atol=1e-2) for other in others)
    mode = build_autoencoder(configs[kind], CPU, torch.float32)
    assert torch.equal(replace(encoders, autoencoder=mode).latents(pixels, 1, ids), mode.encode(pixels))
    assert torch.allclose(autoencoder.encode(pixels), mode.encode(pixels), atol=1e-6)  # nobody draws: the mode


def test_divergence_of_a_normal() -> None:
    """By torch's own formula, and clamped where a variance would overflow."""
    moments = torch.randn(2, 6, 3, 2, 2, dtype=torch.float64)
    posterior = Posterior.of(moments)
    mean, logvar = moments.chunk(2, 1)
    terms = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    assert torch.allclose(posterior.kl(), terms.sum((1, 2, 3, 4)))
    frames = Posterior.of(moments, per_frame=True).kl()
    assert frames.shape == (6,) and torch.allclose(frames, terms.sum((1, 3, 4)).flatten())  # (b t)
    wild = Posterior.of(torch.tensor([0.0, 1e4, 0.0, -1e4]).view(2, 2, 1, 1, 1))
    assert wild.logvar.flatten().tolist() == [20.0, -30.0]


SIZES: dict[str, list[tuple[int, ...]]] = {
    "hunyuan": [(1, 9, 16, 24), (2, 21, 40, 24), (2, 1, 16, 16)],
    "flux2d": [(2, 3, 16, 24), (1, 8, 32, 32)],
    "dc_ae": [(1, 8, 64, 32), (1, 20, 32, 160), (2, 1, 64, 64)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_as_forecast(kind: str, dtype: torch.dtype, configs: dict[str, Any]) -> None:
    """Every byte that the allocator is asked for on the CPU, to two percent, without running there."""
    cfg = configs[kind]
    autoencoder = build_autoencoder(cfg, CPU, dtype)
    for batch, *size in SIZES[kind]:
        with Allocations() as encoding:
            latents = autoencoder.encode(torch.empty(batch, 3, *size).fill_(0.5))
        with Allocations() as decoding:
            autoencoder.decode(torch.empty(latents.shape).fill_(0.5))
        assert encoding.peak == pytest.approx(encode_bytes(cfg, batch, *size, dtype), rel=0.02), size
        assert decoding.peak == pytest.approx(decode_bytes(cfg, batch, *size, dtype), rel=0.02), size


def test_forecast_of_published_sizes_without_files() -> None:
    """129 frames of 256px whole in time, in bf16, are within a card of 24 GB beside the 0.5 GB of weights."""
    cfg: Any = AUTOENCODER_CONFIGS["hunyuan"]()
    whole = encode_bytes(cfg, 1, 129, 192, 336, torch.bfloat16)
    assert 4 * 2**30 < whole < 16 * 2**30
    in_time = replace(cfg, temporal_tiling=True)
    assert encode_bytes(in_time, 1, 129, 192, 336, torch.bfloat16) < 0.7 * whole
    assert decode_bytes(cfg, 1, 129, 192, 336, torch.bfloat16) < 20 * 2**30
    assert encode_bytes(DCTConfig(), 1, 5, 16, 16, torch.float32) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_and_micro_batches(kind: str, configs: dict[str, Any]) -> None:
    """Half precision stays near; several clips at a time are each as by themselves, and fewer pieces of work."""
    size = (3, 3, 8, 64, 32) if kind == "dc_ae" else (3, 3, 5, 16, 24)
    pixels, counts = clips(*size), []

    def run(work: list[Task]) -> list[Tensor]:
        counts.append(len(work))
        return one_by_one(work)

    wide = build_autoencoder(configs[kind], CPU, torch.float32)
    latents = wide.encode(pixels, run)
    decoded = wide.decode(latents, run)
    assert latents.shape[2:] == latent_grid(*pixels.shape[2:], wide) and decoded.shape == pixels.shape
    half = build_autoencoder(configs[kind], CPU, torch.bfloat16)
    for found, truth in ((half.encode(pixels), latents), (half.decode(latents), decoded)):
        assert found.dtype == torch.float32 and found.shape == truth.shape
        assert (found - truth).abs().mean() < 0.05 * truth.abs().mean() + 0.02
    more: Any = replace(configs[kind], micro_batch=30 if kind == "flux2d" else 2)
    batched = build_autoencoder(more, CPU, torch.float32)
    assert torch.allclose(batched.encode(pixels, run), latents, atol=1e-4)
    assert counts[2] < counts[0]


@pytest.mark.parametrize(("kind", "size"), [("hunyuan", (6, 16, 16)), ("dc_ae", (6, 64, 32)), ("dc_ae", (8, 48, 32))])
def test_sizes_that_cannot_be_coded_are_refused(kind: str, size: tuple[int, ...], configs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="do not fit the autoencoder: use"):
        build_autoencoder(configs[kind], CPU, torch.float32).encode(clips(1, 3, *size))


def test_frames_that_dc_ae_decodes_to(configs: dict[str, Any]) -> None:
    """Four of a latent frame, but one of one that is alone, in a clip or as the last tile."""
    cut: Any = build_autoencoder(configs["dc_ae"], CPU, torch.float32)
    whole: Any = build_autoencoder(replace(configs["dc_ae"], temporal_tiling=False), CPU, torch.float32)
    for frames in range(1, 11):
        latents = torch.zeros(1, 8, frames, 1, 1)
        for autoencoder in (cut, whole):
            assert autoencoder.decode(latents).shape[2] == autoencoder.decoded_frames(frames)
        assert whole.decoded_frames(frames) == (1 if frames == 1 else 4 * frames)
    assert [cut.decoded_frames(frames) for frames in (4, 5, 7, 8)] == [16, 20, 25, 32]


def test_scale_of_dc_ae(configs: dict[str, Any]) -> None:
    """Encoding divides by it, decoding multiplies."""
    one, half = (build_autoencoder(replace(configs["dc_ae"], scale=scale), CPU, torch.float32) for scale in (1.0, 0.5))
    pixels = clips(1, 3, 4, 32, 32)
    latents = one.encode(pixels)
    assert torch.equal(half.encode(pixels), 2 * latents)
    assert torch.equal(half.decode(2 * latents), one.decode(latents))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind: str, configs: dict[str, Any]) -> None:
    cfg = replace(configs[kind], compile=True)
    size = (1, 3, 8, 64, 32) if kind == "dc_ae" else (1, 3, 5, 16, 24)
    plain, compiled = (build_autoencoder(one, CPU, torch.float32) for one in (configs[kind], cfg))
    latents = plain.encode(clips(*size))
    assert torch.allclose(compiled.encode(clips(*size)), latents, atol=1e-4)
    assert torch.allclose(compiled.decode(latents), plain.decode(latents), atol=1e-3)
