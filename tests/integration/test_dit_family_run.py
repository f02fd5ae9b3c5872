"""The real commands on DiT, Latte and PixArt: train on one layout, sample what was saved on others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opensora.cli import sample, train
from opensora.config.load import load_config
from opensora.config.run import RunConfig, SampleConfig
from opensora.inference.find import find_source
from opensora.models.families import build_model, family_of
from opensora.models.weights.patches import PUBLISHED
from opensora.models.weights.writer import convert_shapes, shapes_of
from opensora.utils.metrics_log import read_metrics
from tests.dist.harness import run_distributed

SHAPE = "in_channels: 16, caption_channels: 32, hidden_size: 48, num_heads: 4, depth: 2"
MODELS = {
    "pixart": f"{{kind: pixart, {SHAPE}, model_max_length: 4, pred_sigma: false}}",
    "dit": f"{{kind: dit, {SHAPE}}}",  # with a learned variance
    "latte": f"{{kind: latte, {SHAPE}, learn_sigma: false}}",
}
OBJECTIVES = {"pixart": "rectified_flow_v1", "dit": "iddpm", "latte": "rectified_flow_v1"}
OVERRIDES = [
    "conditioning={dropout: {text: 0.3, pooled: 0.0}}",
    "optim={lr: 3.0e-3, ema_decay: 0.5}",
    "train.checkpoint_every=2",
    "train.log_every=1",
]


def run_train(argv: list[str]) -> int:
    return train.main(argv)


def run_sample(argv: list[str]) -> int:
    return sample.main(argv)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", MODELS)
def test_train_and_sample(kind: str, config: Path, tmp_path: Path) -> None:
    """Two processes and one: the same losses. Run and export give the same samples; the export has the family's names
    and all of its tensors, the null text with them."""
    before, _, rest = config.read_text().partition("model:\n")
    written = config.parent / "written.yaml"
    written.write_text(f"{before}model: {MODELS[kind]}\n{rest[rest.index('vae:') :]}")
    folders: dict[int, Path] = {}
    for world, extra in ((2, []), (1, ["parallel.mesh.ulysses=1"])):
        folder = tmp_path / f"on{world}"
        objective = f"objective={{kind: {OBJECTIVES[kind]}}}"
        argv = [str(written), *OVERRIDES, objective, f"output={folder}", *extra]
        assert run_distributed(run_train, world, argv, timeout=140, init=False) == [0] * world
        folders[world] = folder / "run"
    two, one = ([record["loss"] for record in read_metrics(folders[world] / "metrics.jsonl")[0]] for world in (2, 1))
    assert len(one) == 6 and two == pytest.approx(one, rel=1e-9)

    exported = folders[2] / "exported"
    cfg: Any = load_config(RunConfig, folders[2] / "config.yaml").model
    assert find_source(SampleConfig(weights=str(exported), prompt="a red circle")).model == cfg
    tensors, format = load_file(exported / "model.safetensors"), family_of(cfg).weights
    with torch.device("meta"):
        model = build_model(cfg)
    ours = shapes_of(model.state_dict())
    assert shapes_of(tensors) == convert_shapes(ours, format, source=format.layout(cfg), to=PUBLISHED)
    null = tensors["y_embedder.y_embedding"]
    assert null.any() and torch.equal(
        null, load_file(folders[1] / "exported" / "model.safetensors")["y_embedder.y_embedding"]
    )

    made: dict[Path, dict[str, bytes]] = {}
    for world, weights in ((2, folders[2]), (1, exported)):
        job, out = tmp_path / f"job{world}.yaml", tmp_path / f"samples{world}"
        job.write_text(f"weights: {weights}\nprompt: a red circle\n")
        sampling = "sampling={width: 32, height: 32, num_frames: 9, num_steps: 2, fps: 8, guidance: 3.0}"
        argv = [str(job), f"save_dir={out}", "precision=fp64", sampling, f"parallel.mesh.ulysses={world}"]
        assert run_distributed(run_sample, world, argv, timeout=140, init=False) == [0] * world
        made[weights] = {file.name: file.read_bytes() for file in out.rglob("*") if file.suffix in (".mp4", ".png")}
    assert made[exported] and made[exported] == made[folders[2]]
