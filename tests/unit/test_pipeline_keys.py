"""Keys of stages: a run's own config.yaml, which tasks of a cluster and a second command read, must give the same."""

import inspect
from pathlib import Path

import pytest

from data_pipeline.config import PipelineConfig
from data_pipeline.pipeline import Pipeline
from data_pipeline.plan import Plan
from opensora.config.load import load_config, save
from tests.conftest import ROOT


def keys(cfg: PipelineConfig) -> dict[str, str]:
    pipeline = Pipeline(cfg, Plan((), ()))
    return {stage: pipeline.stage_key(stage) for stage in pipeline.stages}


@pytest.mark.parametrize("begin", ["nothing", "default.yaml"])
def test_a_saved_configuration_has_the_same_keys(tmp_path: Path, begin: str) -> None:
    (tmp_path / "nothing.yaml").write_text("{}\n")
    first = tmp_path / "nothing.yaml" if begin == "nothing" else ROOT / "configs/pipeline/default.yaml"
    cfg = load_config(PipelineConfig, first, ["source=here", "out=there"])
    save(cfg, tmp_path / "saved.yaml")
    assert keys(load_config(PipelineConfig, tmp_path / "saved.yaml")) == keys(cfg)


def test_the_configuration_that_users_begin_with_states_what_is_built_in(tmp_path: Path) -> None:
    stated = load_config(PipelineConfig, ROOT / "configs/pipeline/default.yaml", ["source=here", "out=there"])
    assert keys(stated) == keys(PipelineConfig(source="here", out="there"))


IDENTITY = {("probe", "sha256"), ("shots", "clip_id"), ("cut", "sha256")}


def test_whoever_opens_a_file_has_its_content_in_the_key() -> None:
    """Or two files of equal times and sizes would be one unit, and one would get what was seen in the other."""
    cfg = load_config(PipelineConfig, ROOT / "configs/pipeline/default.yaml", ["source=here", "out=there"])
    opened = []
    for name, stage in Pipeline(cfg, Plan((), ())).stages.items():
        if "unit.file" in inspect.getsource(type(stage)) and name != "probe":  # which finds out what they are
            opened.append(name)
            assert {(of, column) for of, columns in stage.reads.items() for column in columns} & IDENTITY, name
    assert opened == ["frames", "text", "cut"]
