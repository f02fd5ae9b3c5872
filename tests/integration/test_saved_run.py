"""A saved run says what it is, and sampling takes objective, conditioning, model, autoencoder and encoder from it."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from opensora.config.load import load_config
from opensora.config.run import RunConfig, SampleConfig
from opensora.config.strict_yaml import read_yaml
from opensora.inference import check, steps
from opensora.inference.find import find_source
from opensora.inference.job import sample
from opensora.models.dit import DiTConfig
from opensora.models.families import FAMILIES, build_model
from opensora.schedulers.timesteps import get_schedule
from opensora.utils.errors import UserError
from tests.dist.harness import run_distributed
from tests.integration.test_train_and_sample import LAYOUT_B, train_on

TRAINED = [
    *LAYOUT_B,
    "objective.flow_shift=4.5",
    "objective.sigma_min=0.25",
    "conditioning.dropout.text=0.0",
    "optim.warmup_steps=0",
    "train.steps=1",
]
SECTIONS = ("objective", "conditioning", "model", "vae", "text")


@pytest.fixture
def run(config: Path, tmp_path: Path) -> Path:
    assert train_on(1, config, TRAINED)[0]
    return tmp_path / "runs" / "run"


def sampled(job: dict[str, Any]) -> tuple[list[list[float]], list[str]]:
    """(times of every solver that was made, what was said) of a sampling job."""
    asked: list[list[float]] = []
    said: list[str] = []
    right = steps.build_solver

    def noting(kind: str, *rest: Any) -> Any:
        solver = right(kind, *rest)
        asked.append(list(solver.times))
        return solver

    with mock.patch.object(steps, "build_solver", noting), mock.patch.object(check, "announce", said.append):
        assert sample(load_config(SampleConfig, job))
    return asked, said


def test_sampling_takes_everything_from_the_run_and_from_its_export(config: Path, run: Path, tmp_path: Path) -> None:
    trained = load_config(RunConfig, config, TRAINED)
    for place in (run, run / "exported"):
        saved = read_yaml(place / "config.yaml")[0]
        assert all("kind" in saved[name] for name in SECTIONS if name != "conditioning")
        source = find_source(SampleConfig(weights=str(place), prompt="a"))
        assert [getattr(source, name) for name in SECTIONS] == [getattr(trained, name) for name in SECTIONS]

    option = {"width": 32, "height": 32, "num_frames": 1, "num_steps": 3, "fps": 8.0}
    base = {"weights": str(run / "exported"), "prompt": "a", "precision": "fp64", "save_dir": str(tmp_path / "samples")}
    changes: list[tuple[float, dict[str, Any]]] = [
        (4.5, {"sampling": option}),
        (2.0, {"sampling": {**option, "flow_shift": 2.0}}),
        (7.0, {"sampling": option, "objective": {"kind": "rectified_flow", "flow_shift": 7.0}}),
    ]
    for alpha, change in changes:
        ((asked, said),) = run_distributed(sampled, 1, {**base, **change}, timeout=60, init=False)
        assert asked == [get_schedule(3, 16, 1, alpha=alpha)]
        assert sum("conditioning.dropout.text=0" in line for line in said) == 1


def test_weights_that_say_nothing_are_taken_for_the_familys_published_ones(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare" / "model.safetensors"
    bare.parent.mkdir()
    bare.write_bytes((run / "exported" / "model.safetensors").read_bytes())
    saved = find_source(SampleConfig(weights=str(run), prompt="a"))
    cfg = SampleConfig(weights=str(bare), prompt="a", model=saved.model, vae=saved.vae, text=saved.text)
    found = find_source(cfg)
    assert found.objective == replace(saved.objective, flow_shift=None, sigma_min=1e-5)
    assert found.conditioning is None


def test_the_model_of_a_job_is_that_of_the_run(run: Path) -> None:
    """Also what no shape tells, as the number of heads; of a run's checkpoint nobody would miss a block."""
    trained = find_source(SampleConfig(weights=str(run), prompt="a")).model
    wrong: list[dict[str, Any]] = [
        *({"depth": 1 + trained.depth}, {"depth_single_blocks": 0}, {"mlp_ratio": 3.0}, {"theta": 100}),
        {"num_heads": 1, "axes_dim": (16, trained.hidden_size // 2 - 8, trained.hidden_size // 2 - 8)},
    ]
    for place in (run, run / "exported"):
        for change in wrong:
            (key, value), *_ = change.items()
            said = refusal(place, replace(trained, **change))
            assert said.startswith(f"model.{key}={value}: {place} was trained with {getattr(trained, key)}; set"), said
        said = refusal(place, DiTConfig())
        assert said.startswith(f"model.kind='dit': {place} was trained with 'mmdit'; set"), said
        assert refusal(place, trained) == "taken"


def refusal(weights: Path, model: Any) -> str:
    """Why a job with this section ``model`` is refused."""
    try:
        find_source(SampleConfig(weights=str(weights), prompt="a", model=model))
    except UserError as error:
        return str(error)
    return "taken"


OTHERWISE: dict[str, Any] = {
    **{"space_scale": 0.5, "time_scale": 0.5, "input_size": (1, 4, 4), "base_size": 8, "input_sq_size": 256},
    **{"no_temporal_pos_emb": True, "freeze": "text", "freeze_y_embedder": True, "only_train_temporal": True},
}


@pytest.mark.parametrize(
    "kind", ["mmdit", "dit", "latte", "pixart", "pixart_ms", "pixart_sigma", "stdit", "stdit2", "stdit3"]
)
def test_what_a_job_may_set_otherwise_changes_no_weight(kind: str) -> None:
    family = FAMILIES[kind]
    cfg = family.sizes["debug"] if "debug" in family.sizes else family.config()

    def shapes(made: Any) -> dict[str, Any]:
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in build_model(made).state_dict().items()}

    for key in family.per_job:
        assert shapes(replace(cfg, **{key: OTHERWISE[key]})) == shapes(cfg), key
    assert family.fitted <= {field.name for field in fields(cfg)}
