"""As many frames come back as are asked for, whatever the autoencoder; published counts where these are asked for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora.conditioning.references import KINDS, fits
from opensora.inference.lengths import as_published, asked_for, coded
from opensora.models.base import AutoencoderShape, decoded_frames
from opensora.models.vae import DCAEConfig, autoencoder_shape
from opensora.models.vae.tiles import tilings
from opensora.sampling.options import SamplingOption
from opensora.schedulers.timesteps import latent_frames

SHAPES = {
    "causal": AutoencoderShape(4, (4, 8, 8), True),
    "uncausal": AutoencoderShape(4, (4, 8, 8), False),
    "frame by frame": AutoencoderShape(4, (1, 8, 8), True),
    "frames by themselves": AutoencoderShape(4, (1, 8, 8), False),
    "eight": AutoencoderShape(4, (8, 8, 8), False),
    "DC-AE": autoencoder_shape(DCAEConfig()),
    "DC-AE, short tiles": autoencoder_shape(DCAEConfig(tile_frames=16)),
    "DC-AE, half shared": autoencoder_shape(DCAEConfig(tile_frames=8, tile_overlap=0.5)),
    "DC-AE, whole": autoencoder_shape(DCAEConfig(temporal_tiling=False)),
}
ONE = SimpleNamespace(patch=(1, 2, 2))


def decoded(made: int, shape: AutoencoderShape) -> Tensor:
    """A clip whose frames are called as their latent frames."""
    latents = latent_frames(made, shape.stride[0], shape.causal)
    count = decoded_frames(latents, shape)
    if shape.causal:
        names = [0, *(1 + i // shape.stride[0] for i in range(count - 1))]
    else:
        names = [i // shape.stride[0] for i in range(count)]
    return torch.tensor(names)[None, None, :, None, None].expand(1, 3, -1, 2, 2)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("patch", [1, 2])
def test_as_many_frames_as_asked_for(name: str, patch: int) -> None:
    shape, denoising = SHAPES[name], SimpleNamespace(patch=(patch, 2, 2))
    for kind in KINDS:
        for asked in range(1, 61):
            option = SamplingOption(num_frames=asked)
            made = coded(option, denoising, shape, kind)  # type: ignore[arg-type]
            latents = latent_frames(made, shape.stride[0], shape.causal)
            assert asked == 1 or latents % patch == 0
            if not fits(kind, latents, shape):
                continue
            clip = asked_for(decoded(made, shape), kind, asked, shape)
            assert clip.shape[2] == asked, (kind, asked)


def test_repetitions_of_a_known_frame_are_left_out() -> None:
    """Each known end once, as far as groups of four allow; of a clip known at one end exactly once."""
    shape = SHAPES["uncausal"]
    for asked in range(5, 61):
        option = SamplingOption(num_frames=asked)
        for kind in ("i2v_head", "i2v_tail", "i2v_loop"):
            whole = decoded(coded(option, ONE, shape, kind), shape)  # type: ignore[arg-type]
            clip = asked_for(whole, kind, asked, shape)[0, 0, :, 0, 0].tolist()
            first, last = clip.count(0), clip.count(whole.max().item())
            if kind != "i2v_tail":
                assert first == 1, (kind, asked)
            if kind == "i2v_tail":
                assert last == 1, asked
            if kind == "i2v_loop":
                assert 1 <= last <= 4 and clip[-1] == whole.max()


@pytest.mark.parametrize(("kind", "left"), [("t2v", 16), ("i2v_head", 13), ("i2v_tail", 13), ("i2v_loop", 10)])
def test_published_counts(kind: str, left: int) -> None:
    shape, option = SHAPES["uncausal"], SamplingOption(num_frames=16, noise="published")
    made = coded(option, ONE, shape, kind)  # type: ignore[arg-type]
    assert made == 16 and as_published(decoded(made, shape), kind, 16, shape).shape[2] == left


def test_lone_tiles_are_counted_as_they_decode() -> None:
    """By the tiles themselves, of every size and overlap."""
    for frames in (4, 8, 12, 16, 32):
        for overlap in (0.0, 0.25, 0.5):
            try:
                cfg = DCAEConfig(tile_frames=frames, tile_overlap=overlap, tile_size=256)
            except ValueError:
                continue
            shape = autoencoder_shape(cfg)
            options: dict[str, Any] = {"in_space": True, "in_time": True, "lead": 0}
            _, decoding = tilings(cfg, shape.stride, coded=lambda t: 1 if t == 1 else 4 * t, **options)
            for latents in range(1, 40):
                tiles = [decoding.coded(s.stop - s.start, 1, 1)[0] for s in decoding.frames(latents)]
                kept = tiles[0] if len(tiles) == 1 else sum(min(decoding.out_stride[0], one) for one in tiles)
                assert decoded_frames(latents, shape) == kept, (frames, overlap, latents)
    assert [decoded_frames(6 * k + 1, SHAPES["DC-AE"]) for k in (1, 2, 3)] == [28, 49, 73]  # not 28, 52, 76
