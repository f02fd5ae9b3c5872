"""Two experts of a sampling job, found on disk: what must be alike, and which of them is which."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from safetensors.torch import save_file

from opensora.config.load import load_config, save
from opensora.config.other_models import LowNoiseConfig
from opensora.config.run import SAVED_NAME, RunConfig, SampleConfig
from opensora.inference import load
from opensora.inference.find import _difference, find_source
from opensora.models.families import build_model, count_parameters, family_of
from opensora.models.text.t5 import T5Config
from opensora.models.text.umt5 import UMT5Config
from opensora.models.vae.hunyuan import HunyuanConfig
from opensora.sampling.options import SamplingOption
from opensora.utils.errors import UserError
from tests.integration.conftest import CONFIG

MODEL = "model: {kind: wan, size: debug, in_channels: 16, text_dim: 32, patch_size: [1, 1, 1]}"


def expert(folder: Path, t_min: float, t_max: float, **keys: Any) -> str:
    """An export of a run at these times."""
    folder.mkdir()
    text = CONFIG.format(output=folder, table=folder / "none.csv")
    (folder / "run.yaml").write_text(re.sub(r"model:\n(  .*\n)+", f"{MODEL}\n", text))
    cfg = load_config(RunConfig, folder / "run.yaml")
    cfg = replace(cfg, objective=replace(cfg.objective, t_min=t_min, t_max=t_max))  # type: ignore[type-var]
    for section, changes in keys.items():
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **changes)})
    save(cfg, folder / SAVED_NAME)
    format = family_of(cfg.model).weights
    save_file(build_model(cfg.model).state_dict(), folder / "model.safetensors", format.layout(cfg.model).metadata())
    return str(folder)


def boundary(high: str, low: str, given: float | None) -> float:
    cfg = SampleConfig(weights=high, low_noise=LowNoiseConfig(weights=low, boundary=given))
    found = find_source(cfg).low_noise
    assert found is not None
    return found.boundary


@pytest.mark.parametrize("given", [None, 0.875, 0.9, 0.7])
def test_a_given_boundary_wins(given: float | None, tmp_path: Path) -> None:
    high, low = expert(tmp_path / "high", 0.875, 1.0), expert(tmp_path / "low", 0.0, 0.875)
    assert boundary(high, low, given) == (given or 0.875)


@pytest.mark.parametrize("given", [None, 0.875, 0.5])
def test_experts_that_are_swapped_are_refused(given: float | None, tmp_path: Path) -> None:
    high, low = expert(tmp_path / "high", 0.875, 1.0), expert(tmp_path / "low", 0.0, 0.875)
    said = ""
    try:
        boundary(low, high, given)
    except UserError as error:
        said = str(error)
    if given in (None, 0.875):
        assert said.startswith(
            f"weights={low}: was trained at times from 0 to 0.875 alone, and would make the steps from"
        )
    else:  # the first could make some of its steps
        assert said.startswith(f"low_noise.weights={high}: was trained at times from 0.875 to 1 alone")
    assert said.endswith("swap the two, or give another")


def test_an_expert_may_be_trained_at_all_times(tmp_path: Path) -> None:
    everywhere, low = expert(tmp_path / "all", 0.0, 1.0), expert(tmp_path / "low", 0.0, 0.875)
    assert boundary(everywhere, low, 0.875) == boundary(everywhere, everywhere, 0.875) == 0.875


def test_experts_may_have_been_trained_on_other_machines(tmp_path: Path) -> None:
    """Where an encoder lay, and in which pieces it worked, is no difference; what it gives is."""
    here, there = UMT5Config(umt5_path="a", shard=True), UMT5Config(umt5_path="b", cache_mib=3)
    assert _difference(here, there) == _difference(HunyuanConfig(path="a"), HunyuanConfig(tile_size=512)) == ""
    assert _difference(here, replace(there, max_tokens=77)) == "max_tokens=512, weights have 77"
    assert _difference(here, T5Config()) == "kind=umt5, weights have t5"
    high = expert(tmp_path / "high", 0.875, 1.0)
    with pytest.raises(UserError, match=r"has vae\.scale=2\.0, weights have null; experts must be of one shape"):
        boundary(high, expert(tmp_path / "other", 0.0, 0.875, vae={"scale": 2.0}), None)


@pytest.mark.parametrize(("zero", "turns"), [(0, True), (1, True), (2, True), (3, False)])
def test_experts_take_turns_where_a_process_has_no_room_for_both(
    zero: int, turns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On four processes, each with room for one expert and a half: below ZeRO 3 none of them is cut."""
    high, low = expert(tmp_path / "high", 0.875, 1.0), expert(tmp_path / "low", 0.0, 0.875)
    option = SamplingOption(width=32, height=32, num_frames=1, num_steps=2)
    cfg = SampleConfig(weights=high, low_noise=LowNoiseConfig(weights=low), sampling=option, precision="fp32")
    cfg = replace(cfg, parallel=replace(cfg.parallel, zero=zero))
    source, mesh = find_source(cfg), Mock(world_size=4)
    one = count_parameters(source.model) * 4
    monkeypatch.setattr(load, "device_bytes", lambda: int(1.5 * one / load.ROOM))
    assert load.takes_turns(cfg, source, mesh) is turns
