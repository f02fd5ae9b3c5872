"""A model without text tokens: what is counted beside its image tokens is none, whatever the text encoder gives."""

from dataclasses import replace

import pytest

from acceleration.distributed.mesh import view
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.inference.check import least_bytes
from opensora.models import mmdit
from opensora.models.families import FAMILIES
from opensora.models.vae import autoencoder_shape
from opensora.planner import forecast
from opensora.sampling.options import SamplingOption
from opensora.train.step_data import sharing
from tests.unit.test_extending import RUN

OVERRIDES = ["parallel.mesh.dynamic=true", "parallel.mesh.ulysses=2"]


@pytest.mark.parametrize("text", ["joint", "none"])
def test_text_tokens_count_where_the_model_reads_them(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = replace(mmdit.FAMILY, describe=lambda cfg: replace(mmdit.FAMILY.describe(cfg), text=text))
    monkeypatch.setitem(FAMILIES, "mmdit", changed)
    cfg = load_config(RunConfig, RUN, OVERRIDES)
    shares = sharing(cfg, view({"ulysses": 2}))
    assert shares is not None and bool(shares.text_tokens) == (text == "joint")
    assert bool(forecast.shapes(cfg)[0].batch.txt) == (text == "joint")
    option, shape = SamplingOption(width=32, height=32, num_frames=1), autoencoder_shape(cfg.vae)
    few, many = (
        least_bytes(option, cfg.model, shape, samples=1, txt=txt, itemsize=4, parallel=cfg.parallel, world_size=2)
        for txt in (0, 100_000)
    )
    assert (many > few) == (text == "joint")
