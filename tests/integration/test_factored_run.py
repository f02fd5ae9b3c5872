"""The real commands on a family that is registered from outside: train, sample what was saved, and take everything that
sampling must know from there."""

from pathlib import Path

import pytest

from opensora.cli import sample, train
from opensora.config.load import load_config
from opensora.config.run import RunConfig, SampleConfig
from opensora.inference.find import find_source
from opensora.utils.metrics_log import read_metrics
from tests import factored_family
from tests.dist.harness import run_distributed

MODEL = "model={kind: toy_factored, channels: 16, text_dim: 32, width: 32, heads: 4, depth: 2}"
OVERRIDES = [
    "objective={kind: toy_gaussian_flow, sigma_min: 0.001}",
    "conditioning={dropout: {text: 0.3}, masks: {random: 0.4, image_head: 0.2}}",
    "optim.lr=3.0e-3",
    "train.checkpoint_every=2",
]


@pytest.fixture
def factored(config: Path) -> Path:
    """The configuration with the factored model in place of the MMDiT."""
    before, _, rest = config.read_text().partition("model:\n")
    path = config.parent / "factored.yaml"
    path.write_text(before + MODEL.replace("=", ": ") + "\n" + rest[rest.index("vae:") :])
    return path


def run_train(argv: list[str]) -> int:
    """In every process, as under torchrun; the imports above have registered the family."""
    return train.main(argv)


def run_sample(argv: list[str]) -> int:
    return sample.main(argv)


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")[0]]


@pytest.mark.timeout(300)
def test_train_and_sample(factored: Path, tmp_path: Path) -> None:
    """Two processes and one: the same losses. Run and export give the same samples, by what they say themselves."""
    folders = {}
    for world, extra in ((2, []), (1, ["parallel.mesh.ulysses=1"])):
        folder = tmp_path / f"on{world}"
        argv = [str(factored), *OVERRIDES, f"output={folder}", "train.log_every=1", *extra]
        assert run_distributed(run_train, world, argv, timeout=140, init=False) == [0] * world
        folders[world] = folder / "run"
    two, one = (losses(folders[world]) for world in (2, 1))
    assert len(one) == 6 and two == pytest.approx(one, rel=1e-9)
    saved = load_config(RunConfig, folders[2] / "config.yaml")
    assert (saved.model.kind, saved.objective.kind) == (factored_family.KIND, factored_family.OBJECTIVE)
    assert saved.conditioning.masks == {"random": 0.4, "image_head": 0.2}

    exported = folders[2] / "exported"
    source = find_source(SampleConfig(weights=str(exported), prompt="a red circle"))
    assert (source.model, source.objective) == (saved.model, saved.objective)
    made: dict[Path, dict[str, bytes]] = {}
    for world, weights in ((2, folders[2]), (1, exported)):
        job, out = tmp_path / f"job{world}.yaml", tmp_path / f"samples{world}"
        job.write_text(f"weights: {weights}\nprompt: a red circle\n")
        sampling = "sampling={width: 32, height: 32, num_frames: 9, num_steps: 2, fps: 8, guidance: 3.0}"
        argv = [str(job), f"save_dir={out}", "precision=fp64", sampling, f"parallel.mesh.ulysses={world}"]
        assert run_distributed(run_sample, world, argv, timeout=140, init=False) == [0] * world
        made[weights] = {file.name: file.read_bytes() for file in out.rglob("*") if file.suffix in (".mp4", ".png")}
    assert made[exported] and made[exported] == made[folders[2]]
