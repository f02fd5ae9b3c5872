"""A run whose text encoder is cut over processes gives the bits of one that holds it whole, and the same samples."""

from pathlib import Path

import pytest
import torch

from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.models.mmdit.convert import WEIGHTS
from opensora.models.weights.reader import read_state_dict
from opensora.train.loop import train
from opensora.train.setup import start_run
from tests.dist.harness import run_distributed
from tests.text_models import write_text_models


def run(config: Path, overrides: list[str]) -> bool:
    with start_run(load_config(RunConfig, config, overrides)) as started:
        return train(started)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ulysses", [1, 2])
def test_weights_and_clips(ulysses: int, config: Path, tmp_path: Path) -> None:
    """Where processes have other prompts each, and where they share those of a clip; with samples while training."""
    write_text_models(tmp_path)
    sizes = ["resolution=32px", "aspect_ratio=1:1", "num_frames=5", "num_steps=2"]
    common = [
        f"text={{kind: t5_clip, t5_path: {tmp_path}/t5, clip_path: {tmp_path}/clip, max_tokens: 12}}",
        "model.context_in_dim=16",
        "model.vec_in_dim=16",
        f"parallel.mesh.ulysses={ulysses}",
        "validate.every=3",
        "validate.prompts=[a red circle, a]",
        *(f"validate.sampling.{size}" for size in sizes),
    ]
    weights: dict[str, dict[str, torch.Tensor]] = {}
    clips: dict[str, list[bytes]] = {}
    for shard in ("false", "true"):
        overrides = [*common, f"output={tmp_path / shard}", f"text.shard={shard}"]
        assert run_distributed(run, 2, config, overrides, timeout=280, init=False) == [True, True]
        weights[shard] = read_state_dict(tmp_path / shard / "run" / "exported", WEIGHTS)[0]
        samples = tmp_path / shard / "run" / "samples"
        clips[shard] = [path.read_bytes() for path in sorted(samples.rglob("*.mp4"))]
        assert len(clips[shard]) == 4
    assert all(torch.equal(tensor, weights["false"][name]) for name, tensor in weights["true"].items())
    assert clips["true"] == clips["false"]
