"""The autoencoders of Open-Sora 1.x give what the published code gave: every case of the golden files, fp32 to 1e-5."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora.models.vae import (
    OpenSoraV12Config,
    OpenSoraV13Config,
    SDConfig,
    SDTemporalDecoderConfig,
    build_autoencoder,
)
from opensora.models.vae.opensora_1x import normalization
from opensora.models.vae.opensora_1x.clip_coding import CausalPieces, FrameByFrame, PaddedPieces, quarter
from opensora.models.vae.opensora_1x.temporal_network import TemporalSizes, TemporalVAE, decoded_length
from opensora.models.vae.posterior import Posterior
from opensora.models.vae.training.two_stages import code_both_ways
from opensora.utils.errors import UserError
from tests.golden_1x import LIMIT, Golden, noise_of_1_2
from tests.golden_autoencoders import relative

GROUPS = {"norm_num_groups": 4, "num_groups": 4}


def built(cfg: Any) -> Any:
    return build_autoencoder(cfg, "cpu", torch.float32)


@pytest.mark.parametrize("name", ["vae_spatial_v1_0", "vae_spatial_scale_v1_3"])
@pytest.mark.parametrize("micro_batch", [None, 4])
def test_images(name: str, micro_batch: int | None, golden: Path, tmp_path: Path) -> None:
    g = Golden(golden, name)
    scale = g.stated["args"].get("scaling_factor", 0.18215)
    cfg = SDConfig(path=g.write(tmp_path / "sd.safetensors", GROUPS), scale=scale, micro_batch=micro_batch or 99)
    autoencoder, case = built(cfg), "" if micro_batch is None else f".micro_batch_{micro_batch}"
    noise = g[f"noise{case}"].view(2, 5, 4, 2, 3).transpose(1, 2)
    posterior = autoencoder.posterior(g["in.x"])
    for part in ("mean", "logvar"):
        found = getattr(posterior, part).transpose(1, 2).flatten(0, 1)
        assert relative(found, g[f"out.{part}"]) <= LIMIT
    assert relative(autoencoder.encode(g["in.x"], draw=lambda shape, stage="": noise), g[f"out.z{case}"]) <= LIMIT
    assert relative(autoencoder.encode(g["in.x"]), posterior.mean * scale) <= LIMIT
    assert relative(autoencoder.decode(g[f"out.z{case}"], clamp=False), g[f"out.x{case}"]) <= LIMIT


def test_decoder_of_clips_of_images(golden: Path, tmp_path: Path) -> None:
    """The golden file has the decoder alone; files that people have, the encoder as well."""
    from diffusers import AutoencoderKLTemporalDecoder

    g = Golden(golden, "vae_temporal_decoder_v1_0")
    whole = AutoencoderKLTemporalDecoder(**g.stated["diffusers_config"]).state_dict()
    g.tensors = {f"w.module.{name}": x for name, x in whole.items()} | g.tensors
    autoencoder = built(SDTemporalDecoderConfig(path=g.write(tmp_path / "svd.safetensors", {})))
    assert relative(autoencoder.decode(g["in.z"], clamp=False), g["out.x"]) <= LIMIT


@pytest.mark.parametrize("name", ["vae_temporal_v1_2", "vae_temporal_order_v1_2"])
@torch.no_grad()
def test_temporal_network(name: str, golden: Path) -> None:
    g = Golden(golden, name)
    network = temporal_network(g)
    for frames in g.stated["frames"]:
        moments = network.encode(g["in.x"][:, :, :frames])
        assert list(moments.shape[2:]) == [g.stated["latent_sizes"][str(frames)][0], *g["in.x"].shape[3:]]
        assert relative(moments, g[f"out.moments.{frames}"]) <= LIMIT
        found = network.decode(g["in.z"][:, :, : moments.shape[2]], frames)
        assert relative(found, g[f"out.dec.{frames}"]) <= LIMIT
    for case, made in g.stated["mismatch_frames"].items():
        latents, frames = map(int, case[1:].split("_n"))
        assert decoded_length(latents, frames, network.sizes.ratio) == made
        found = network.decode(g["in.z"][:, :, :latents], frames)
        assert relative(found, g[f"out.mismatch.{case}"]) <= LIMIT
    for frames, truth in g.named("out.moments_small.").items():
        assert relative(network.encode(g["in.x"][:, :, : int(frames)] / 128), truth) <= LIMIT


def temporal_network(g: Golden) -> TemporalVAE:
    args = g.stated["args"]
    sizes = TemporalSizes(
        channels=args["in_out_channels"],
        latents=args["embed_dim"],
        hidden=args["latent_embed_dim"],
        filters=args["filters"],
        layers=args["num_res_blocks"],
        multipliers=tuple(args["channel_multipliers"]),
        halves=tuple(args["temporal_downsample"]),
        groups=args["num_groups"],
    )
    network = TemporalVAE(sizes)
    network.load_state_dict(g.weights)
    return network


@pytest.mark.parametrize("name", ["vae_temporal_v1_2", "vae_temporal_order_v1_2"])
def test_temporal_network_trains(name: str, golden: Path) -> None:
    """Loss, and every gradient that is listed."""
    g = Golden(golden, name)
    if "train.loss" not in g.tensors:
        assert name != "vae_temporal_v1_2"
        return
    network = temporal_network(g)
    x = g["in.x"][:, :, : g.stated["train"]["frames"]].clone().requires_grad_()
    posterior = Posterior.of(network.encode(x))
    z = posterior.sample(g["noise.train"])
    made, kl = network.decode(z, x.shape[2]), posterior.kl()
    loss = (made - g["in.train_target"]).square().mean() + 0.01 * kl.mean()
    loss.backward()
    found = {"z": z, "recon": made, "kl": kl, "loss": loss[None], "g_in.x": x.grad}
    found |= {f"g.{key}": parameter.grad for key, parameter in network.named_parameters()}
    truths = g.named("train.")
    assert len(truths) > 60
    for key, truth in truths.items():
        value = found[key]
        assert value is not None and relative(value, truth) <= LIMIT, key


def test_posterior(golden: Path) -> None:
    g = Golden(golden, "vae_posterior_v1_2")
    found, other = Posterior.of(g["in.parameters"]), Posterior.of(g["in.other"])
    values = {
        "mean": found.mean,
        "logvar": found.logvar,
        "std": found.std,
        "sample": found.sample(g["noise"]),
        "kl": found.kl(),
        "kl_other": found.kl(other),
        "nll": found.nll(g["in.sample"]),
    }
    for name, value in values.items():
        assert relative(value, g[f"out.{name}"]) <= LIMIT, name
    whole = Posterior.of(g["in.parameters"][:1, :, :1], deterministic=True)
    assert torch.equal(whole.std[:, :1], g["out.deterministic_std"])
    assert torch.equal(whole.kl(), g["out.deterministic_kl"]) and torch.equal(
        whole.sample(g["noise"][:1, :, :1]), whole.mean
    )
    assert {f"out.{name}" for name in values} == {
        key for key in g.named("") if key.startswith("out.") and "determ" not in key
    }


def test_clips_of_1_2(golden: Path, tmp_path: Path) -> None:
    """In pieces of 17 frames; what is decoded are the golden latents."""
    g = Golden(golden, "vae_pipeline_v1_2")
    path = g.write(tmp_path / "v1_2.safetensors", GROUPS)
    autoencoder = built(OpenSoraV12Config(path=path, micro_batch=g.stated["micro_batch_size"]))
    for case, stated in g.stated["cases"].items():
        clips, frames = stated["batch"], int(case)
        x = g["in.x"][:clips, :, :frames]
        z = autoencoder.encode(x, draw=noise_of_1_2(g, case, clips))
        assert list(z.shape[2:]) == stated["latent"] and relative(z, g[f"out.z.{case}"]) <= LIMIT
        found = autoencoder.decode(g[f"out.z.{case}"], frames=frames, clamp=False)
        assert relative(found, g[f"out.x.{case}"]) <= LIMIT
    with pytest.raises(TypeError):  # two draws that must not be alike
        autoencoder.encode(g["in.x"][:1, :, :1], draw=lambda shape: torch.zeros(1, *shape))


CAL_LOSS = ("cal_whole", "cal_micro")


@torch.no_grad()
def test_more_of_1_2(golden: Path, tmp_path: Path) -> None:
    """One piece, other pieces, numbers of frames that do not fit, and training's way through both networks."""
    g = Golden(golden, "vae_pipeline_more_v1_2")
    path = g.write(tmp_path / "v1_2.safetensors", GROUPS)
    assert {name for name, stated in g.stated["cases"].items() if stated["cal_loss"]} == set(CAL_LOSS)
    for case, stated in g.stated["cases"].items():
        cfg = OpenSoraV12Config(path=path, micro_frame_size=stated["micro_frame_size"])
        autoencoder, x = built(cfg), g["in.x"][:1, :, : stated["frames"]]
        draw, given = noise_of_1_2(g, case, 1), stated["num_frames_given"]
        if case in CAL_LOSS:
            coded = code_both_ways(autoencoder.network, x, draw, PaddedPieces(stated["micro_frame_size"]))
            found = {"z": coded.latents, "x": coded.pixels, "x_z": coded.images, "x_z_rec": coded.images_again}
            found |= {"kl": coded.posterior.kl(), "post_mean": coded.posterior.mean}
        else:
            found = {
                "z": autoencoder.encode(x, draw=draw),
                "x": autoencoder.decode(g[f"out.z.{case}"], frames=given, clamp=False),
            }
            assert found["x"].shape[2] == stated["frames_out"] and found["z"].shape[2] == stated["latent_frames"]
        for name, value in found.items():
            assert relative(value, g[f"out.{name}.{case}"]) <= LIMIT, (case, name)


@pytest.fixture(scope="module")
def v1_3(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Golden, str]:
    g = Golden(golden, "vae_v1_3_cases")
    for side in ("encoder", "decoder"):
        g.tensors |= Golden(golden, f"vae_v1_3_weights_{side}").tensors
    return g, g.write(tmp_path_factory.mktemp("v1_3") / "v1_3.safetensors", {})


def options(stated: dict[str, Any]) -> dict[str, Any]:
    """Of the published class, as ours."""
    return {
        "micro_batch": stated.get("micro_batch_size"),
        "micro_frame_size": stated.get("micro_frame_size"),
        "temporal_overlap": stated.get("temporal_overlap", False),
        "normalization": stated.get("normalization", "none"),
    }


def test_clips_of_1_3(v1_3: tuple[Golden, str]) -> None:
    g, path = v1_3
    assert len(g.stated["cases"]) > 14
    for case, stated in g.stated["cases"].items():
        autoencoder = built(OpenSoraV13Config(path=path, **options(stated)))
        x = g["in.x"][: stated["batch"], :, : stated["frames"]]
        if f"out.moments.{case}" in g.tensors:
            found = autoencoder.posterior(x)
            assert relative(torch.cat([found.mean, found.logvar], 1), g[f"out.moments.{case}"]) <= LIMIT, case
        z = autoencoder.encode(x, draw=lambda shape, stage="", case=case: g[f"noise.{case}"])
        assert z.shape[2] == stated["latent_frames"] and relative(z, g[f"out.z.{case}"]) <= LIMIT, case
        if stated["frames_out"] is not None:
            pixels = autoencoder.decode(g[f"out.z.{case}"], clamp=False)
            assert pixels.shape[2] == stated["frames_out"] and relative(pixels, g[f"out.x.{case}"]) <= LIMIT, case
        stated_size = autoencoder.coding.stated(stated["frames"], 16, 24)
        published = CausalPieces(stated.get("micro_frame_size"), overlap=stated.get("temporal_overlap", False))
        assert list(published.stated(stated["frames"], 16, 24)) == stated["get_latent_size"]
        assert stated_size == published.stated(stated["frames"], 16, 24) or options(stated)["micro_batch"] is None


def test_small_values_of_1_3(v1_3: tuple[Golden, str]) -> None:
    """What norms add to variances matters where these are small."""
    g, path = v1_3
    autoencoder = built(OpenSoraV13Config(path=path, **options({})))
    found = autoencoder.posterior(g["in.x"][:1, :, :5] / 128)
    assert relative(torch.cat([found.mean, found.logvar], 1), g["out.moments.eps"]) <= LIMIT
    for level in (2, 3):
        block = autoencoder.network.decoder.up[level].upsample.conv3d
        for conv in (block.conv1.conv, block.conv2.conv):
            conv.weight /= 128
            conv.bias /= 128
    assert relative(autoencoder.decode(g["in.z.eps"], clamp=False), g["out.x.eps"]) <= LIMIT


def test_statistics_of_1_3(golden: Path) -> None:
    stored = json.loads((golden / "v1" / "vae_stats_v1_3.json").read_text())
    z = torch.randn(2, 16, 10, 2, 3, generator=torch.Generator().manual_seed(0))
    by_channel, by_place = (
        {part: torch.tensor(stored[name][part])[..., None, None] for part in ("mean", "std")}
        for name in ("video", "video_5frames")
    )
    truth = (z - by_channel["mean"][:, None]) / by_channel["std"][:, None]
    assert relative(normalization.normalized(z, "video"), truth) == 0
    twice = {part: x.repeat(1, 2, 1, 1) for part, x in by_place.items()}
    assert relative(normalization.normalized(z, "video_5frames"), (z - twice["mean"]) / twice["std"]) == 0
    for kind in ("none", "video", "video_5frames"):
        again = normalization.denormalized(normalization.normalized(z, kind), kind)  # type: ignore[arg-type]
        assert relative(again, z) < 1e-6
    with pytest.raises(ValueError, match="12 latent frames: with normalization=video_5frames must be a multiple of 5"):
        normalization.normalized(torch.zeros(1, 16, 12, 1, 1), "video_5frames")


def test_sizes_that_are_stated(golden: Path) -> None:
    """``get_latent_size`` of every class and version, and what 1.3's encoder makes."""
    compared = 0
    for version in ("v1_0", "v1_2", "v1_3"):
        listed = json.loads((golden / "v1" / f"vae_sizes_{version}.json").read_text())["latent_size"]
        for name, sizes in listed.items():
            for text, truth in sizes.items():
                size = [None if word == "None" else int(word) for word in text.split(",")]
                if "size of the encoder's output" in name:
                    coding = CausalPieces(None)
                    assert [list(coding.latents(*size)), list(coding.stated(*size))] == truth  # type: ignore[arg-type]
                else:
                    assert stated_size(name, version, size) == truth, (name, text)
                compared += 1
    assert compared > 300


def stated_size(name: str, version: str, size: list[int | None]) -> Any:
    """By the class and arguments that ``name`` has, as in ``OpenSoraVAE_V1_3 micro_frame_size=17 ...``."""
    kind, *words = name.split()
    arguments = dict(word.split("=") for word in words)
    length = arguments.get("micro_frame_size", "None")
    length = None if length == "None" else int(length)
    if kind == "VAE_Temporal":
        return [None if size[0] is None else quarter(size[0]), *size[1:]]
    if kind == "VideoAutoencoderPipeline":
        return list(PaddedPieces(length).stated(*size))
    if kind == "OpenSoraVAE_V1_3":
        return list(CausalPieces(length, overlap=arguments["temporal_overlap"] == "True").stated(*size))
    try:
        return list(FrameByFrame().stated(*size, whole=version == "v1_0"))
    except ValueError:
        return "TypeError" if None in size else "AssertionError"


def test_what_cannot_be_coded(golden: Path, v1_3: tuple[Golden, str]) -> None:
    """Calls that fail in the published code fail here in one line, or do what they say."""
    g, path = v1_3
    autoencoder = built(OpenSoraV13Config(path=path, **options({"normalization": "video_5frames"})))
    with pytest.raises(ValueError, match="40 frames do not fit the autoencoder: they become 12 latent frames"):
        CausalPieces(17, overlap=False, multiple=5).latents(40, 16, 16)
    with pytest.raises(ValueError, match="7x16 pixels do not fit the autoencoder: use 8x8 or more"):
        FrameByFrame().latents(1, 7, 16)
    with pytest.raises(ValueError, match="must become a multiple of 5"):
        autoencoder.encode(g["in.x"][:1, :, :9])
    with pytest.raises(ValueError, match="must be an integer >= 2, or null"):
        OpenSoraV13Config(micro_frame_size=1)
    with pytest.raises(UserError, match=r"set vae\.kind=opensora_v1_3"):
        built(OpenSoraV12Config(path=path))
