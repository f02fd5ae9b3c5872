"""Patches that are not square, or span several latent frames: what does not divide is refused before a start."""

from dataclasses import replace

import pytest

from opensora.assembly import stored_features
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.inference.check import fit_option
from opensora.models import mmdit
from opensora.models.base import latent_grid
from opensora.models.families import FAMILIES, describe
from opensora.models.vae import autoencoder_shape
from opensora.planner import forecast
from opensora.sampling.options import SamplingOption
from opensora.train.step_data import check_buckets
from opensora.utils.errors import UserError
from tests.unit.test_extending import RUN

BUCKETS = "data.buckets={250px: {9: [1.0, 1]}}"  # 3 latent frames


def patched(patch: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    changed = replace(mmdit.FAMILY, describe=lambda cfg: replace(mmdit.FAMILY.describe(cfg), patch=patch))
    monkeypatch.setitem(FAMILIES, "mmdit", changed)
    return load_config(RunConfig, RUN, [BUCKETS])


@pytest.mark.parametrize("patch", [(1, 2, 1), (1, 1, 2), (1, 2, 3), (3, 1, 4), (1, 2, 2)])
def test_sizes_are_whole_tokens(patch: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = patched(patch, monkeypatch)
    shape, denoising = autoencoder_shape(cfg.vae), describe(cfg.model)
    check_buckets(cfg.data, shape, denoising)
    option = fit_option("sampling", SamplingOption(width=41, height=57, num_frames=9), cfg.model, shape)
    assert option.height is not None and option.width is not None
    latents = latent_grid(9, option.height, option.width, shape)
    assert not any(size % each for size, each in zip(latents, patch, strict=True))
    (row,) = forecast.shapes(cfg)
    assert row.batch.img > 0 and row.batch.img % (latents[0] // patch[0]) == 0
    table = type("Table", (), {"content": "0"})()
    sides = stored_features.identity(cfg, table)["model"]["patch_size"]  # type: ignore[arg-type]
    assert sides % patch[1] == sides % patch[2] == 0


def test_latent_frames_that_are_no_whole_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = patched((2, 2, 2), monkeypatch)
    shape = autoencoder_shape(cfg.vae)
    with pytest.raises(UserError, match=r"^data\.buckets\.250px\.9: makes 3 latent frames; must make a multiple of 2"):
        check_buckets(cfg.data, shape, describe(cfg.model))
    with pytest.raises(UserError, match=r"^sampling\.num_frames=1: makes 1 latent frames; must make a multiple of 2"):
        fit_option("sampling", SamplingOption(width=32, height=32, num_frames=1), cfg.model, shape)
    fit_option("sampling", SamplingOption(width=32, height=32, num_frames=5), cfg.model, shape)
