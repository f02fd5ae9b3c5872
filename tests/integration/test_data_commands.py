"""``opensora.cli.buckets`` and ``opensora.cli.calibrate`` as a user runs them."""

import json
from pathlib import Path

import pytest
from PIL import Image

from opensora.cli import buckets, calibrate
from opensora.config import run
from opensora.config.load import load_config, save
from opensora.config.run import RunConfig
from opensora.train.step_data import open_data
from opensora.utils.errors import UserError


def test_buckets_shows_where_every_row_goes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        buckets.main([str(config), "data.buckets={32px: {5: [1.0, 2], 9: [0.5, auto]}}", "data.tokens_per_batch=64"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "samples in" in shown and "left out" in shown and "no row of 1 frame" in shown and "#" in shown
    assert "dropped by the probabilities" in shown and "idle on 3 data-parallel processes" in shown
    picture = Path(shown.strip().splitlines()[-1])
    with Image.open(picture) as image:
        assert image.width > 300 and picture.name == "buckets.png"


def test_buckets_shows_all_rows_before_it_refuses_those_without_a_clip(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "data.buckets={32px: {5: [1.0, 2], 801: [1.0, 2], 901: [1.0, 2]}}"
    with pytest.raises(UserError, match=r"32px\.901 and 1 more row get no sample: take them out"):
        buckets.main([str(config), rows])
    shown = capsys.readouterr().out
    assert "samples in" in shown and "rows without a sample: 32px x 901, 32px x 801" in shown
    assert Path(shown.strip().splitlines()[-1]).is_file()
    with pytest.raises(UserError, match=r"32px\.901 gets no sample: take it out"):
        buckets.main([str(config), "data.buckets={32px: {5: [1.0, 2], 901: [1.0, 2]}}"])
    assert buckets.main([str(config), rows, "data.unused_rows=report"]) == 0


def test_calibrate_prints_a_section_that_a_configuration_takes(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = load_config(RunConfig, config)
    save(cfg, cfg.folder / run.SAVED_NAME)
    _, plan = open_data(cfg)
    with (cfg.folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 30):
            seconds = float(plan.cost_features(step - 1) @ [0.2, 0.0, 1e-3, 1e-6])
            file.write(json.dumps({"step": step, "loss": 1.0, "time/step_s": seconds, "data/wait_s": 0.0}) + "\n")
    assert calibrate.main([str(cfg.folder)]) == 0
    shown = capsys.readouterr().out
    assert "0.0 % on average" in shown
    path = tmp_path / "cost.yaml"
    path.write_text(shown)
    config.write_text(f"include: {path}\n" + config.read_text())
    assert load_config(RunConfig, config).data.cost.per_batch == pytest.approx(0.2, rel=1e-3)
    with pytest.raises(UserError, match="no such file; give the folder of a run"):
        calibrate.main([str(tmp_path / "nothing")])
