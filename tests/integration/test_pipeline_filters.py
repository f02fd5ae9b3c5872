"""Another threshold changes verdicts and nothing that was measured; the report is there at the end and says so."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as papq
import pytest

from data_pipeline.config import PipelineConfig
from data_pipeline.outputs import outputs_of, read_output
from data_pipeline.run import run
from opensora.config.load import load_config
from opensora.utils.errors import UserError
from opensora.utils.files.video_writer import write_video
from tests.conftest import ROOT
from tests.planted_text import laid_over

pytestmark = pytest.mark.timeout(300)
ALWAYS = ("probe", "frames", "shots", "measure")  # of every clip, whatever filters say
MEASURED = (*ALWAYS, "prints", "duplicates", "text")
DEFAULT = ROOT / "configs/pipeline/default.yaml"


def moving_noise(path: Path, level: int, seed: int, *, overlay: str = "clean", crf: int = 23) -> None:
    """36 frames in which a texture of this mean moves: no filter but those of luma would reject it; or that of what is
    laid over."""
    rng = np.random.default_rng(seed)
    wide = rng.integers(-30, 30, (30, 60)).repeat(10, 0).repeat(10, 1)
    frames = [np.clip(level + wide[:256, 4 * step : 4 * step + 320], 0, 255).astype(np.uint8) for step in range(36)]
    write_video(path, laid_over(np.stack(frames)[..., None].repeat(3, -1), overlay), 12, crf=crf)


def files(out: Path, stages: tuple[str, ...]) -> dict[str, tuple[int, bytes]]:
    """Every output: when it was written, and what."""
    paths = [path for stage in stages for path in sorted((out / stage).glob("*.parquet"))]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def worked(out: Path) -> Counter[tuple[str, str]]:
    """(stage, source) of all work that was done, in all runs."""
    lines = [line for path in (out / "log").glob("*.jsonl") for line in path.read_text().splitlines()]
    return Counter((entry["stage"], entry["source"]) for entry in map(json.loads, lines))


def reasons(out: Path) -> dict[str, str]:
    table = papq.read_table(out / "clips.parquet", columns=["source", "reason"])
    return {row["source"]: row["reason"] for row in table.to_pylist()}


def test_another_threshold_measures_nothing_again(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for name, level in {"dim": 60, "middle": 120, "light": 180}.items():
        moving_noise(tmp_path / "raw" / f"{name}.mp4", level, level)
    out = tmp_path / "out"

    def go(*overrides: str) -> None:
        words = [f"source={tmp_path / 'raw'}", f"out={out}", "engine.workers=1", "cut.preset=ultrafast"]
        assert run(load_config(PipelineConfig, DEFAULT, [*words, "filters.blurred=null", *overrides])) == 0

    go()
    assert set(reasons(out).values()) == {""}
    before, done, report = files(out, MEASURED), worked(out), (out / "report.md").read_text()
    assert {stage for stage, _ in done} >= {"probe", "frames", "screen", "text", "filter", "cut"}

    go("filters.text.max=0.5")  # asked when all is measured
    assert files(out, MEASURED) == before
    assert {stage for stage, _ in worked(out) - done} == {"filter"}

    done = worked(out)
    go("filters.dark.min=90")  # asked before text is read
    assert reasons(out)["middle.mp4"] == reasons(out)["light.mp4"] == ""
    assert reasons(out)["dim.mp4"].startswith("dark: luma=") and reasons(out)["dim.mp4"].endswith(", must be >= 90")
    assert files(out, ALWAYS) == {name: was for name, was in before.items() if Path(name).parent.name in ALWAYS}
    again = worked(out) - done
    assert not {stage for stage, _ in again} & {*ALWAYS}
    assert {source for stage, source in again if stage == "text"} <= {"dim.mp4"}  # which it passes over now
    assert "| dark: luma >= 90 | 2 |" in (out / "report.md").read_text()

    done, page = worked(out), (out / "report.html").stat().st_mtime_ns
    go("filters.dark.min=90")
    assert (out / "report.html").stat().st_mtime_ns == page  # it is of this table yet
    go()
    assert set(reasons(out).values()) == {""}
    assert worked(out) == done  # verdicts of before are there yet
    assert (out / "report.md").read_text().split("## Time")[0] == report.split("## Time")[0]


def test_planted_text_marks_and_copies_are_told_by_the_whole_pipeline(tmp_path: Path) -> None:
    """All clips are as long as each other, have no bars, and are of one camera's motion."""
    (tmp_path / "raw").mkdir()
    moving_noise(tmp_path / "raw/clean.mp4", 120, 0, crf=14)
    moving_noise(tmp_path / "raw/copy.mp4", 120, 0, crf=34)
    moving_noise(tmp_path / "raw/titled.mp4", 60, 2, overlay="title")
    moving_noise(tmp_path / "raw/marked.mp4", 120, 3, overlay="mark")
    out = tmp_path / "out"
    words = [f"source={tmp_path / 'raw'}", f"out={out}", "engine.workers=1", "cut.preset=ultrafast"]
    words += ["filters.blurred=null", "filters.marked={column: logo_share, max: 0.001}"]
    assert run(load_config(PipelineConfig, DEFAULT, words)) == 0
    found = reasons(out)
    assert found["clean.mp4"] == ""
    assert found["copy.mp4"].startswith("duplicates: duplicate of ")
    assert found["titled.mp4"].startswith("text: text_share=")
    assert found["marked.mp4"].startswith("marked: logo_share=")
    (path,) = outputs_of(out / "text", "000000")
    output = read_output(path)
    assert output is not None
    read = {done.source: rows.to_pylist()[0] for done, rows in output.by_source()}
    assert "ROAD" in read["titled.mp4"]["text"] and read["marked.mp4"]["text"] == ""
    assert read["copy.mp4"]["text_share"] is None


def test_a_filter_on_a_score_that_there_is_not_ends_the_command_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    moving_noise(tmp_path / "raw/a.mp4", 60, 0)
    words = [f"source={tmp_path / 'raw'}", f"out={tmp_path / 'out'}", "filters.ugly={column: aesthetic, min: 4}"]
    with pytest.raises(UserError, match=r"filters\.ugly\.column=aesthetic: no stage of this run writes it") as caught:
        run(load_config(PipelineConfig, DEFAULT, words))
    assert "\n" not in str(caught.value) and not os.path.exists(tmp_path / "out")


def test_a_training_configuration_that_is_not_there_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    moving_noise(tmp_path / "raw/a.mp4", 60, 0)
    (tmp_path / "twice.yaml").write_text("a: 1\na: 2\n")
    (tmp_path / "half.py").write_text("model = dict(\n")
    (tmp_path / "unknown.yaml").write_text("naem: a\n")
    for name, said in [
        ("gone.yaml", "cannot be read"), ("twice.yaml", "a: given twice"), ("half.py", "no Python"), ("raw", "folder"),
        ("unknown.yaml", "naem: unknown key; did you mean name"),
    ]:  # fmt: skip
        words = [f"source={tmp_path / 'raw'}", f"out={tmp_path / 'out'}", f"report.training={tmp_path / name}"]
        with pytest.raises(UserError, match=rf"^report\.training=\S+{name}: .*{said}"):
            run(load_config(PipelineConfig, DEFAULT, words))
    assert not os.path.exists(tmp_path / "out")


def test_a_training_configuration_is_looked_at_without_the_models() -> None:
    """Which take seconds to load, before anything is done."""
    code = (
        "import sys; from data_pipeline.run import check_training\n"
        "for name in sys.argv[1:]: check_training(name)\n"
        "sys.exit('torch' in sys.modules)"
    )
    files = [str(path) for path in sorted((ROOT / "configs/train").glob("*.yaml"))]
    assert files and subprocess.run([sys.executable, "-c", code, *files], cwd=ROOT, check=False).returncode == 0


def test_what_the_screen_rejects_is_not_rejected_again_for_what_nobody_looked_for(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    moving_noise(tmp_path / "raw/a.mp4", 60, 0)
    out = tmp_path / "out"
    words = [f"source={tmp_path / 'raw'}", f"out={out}", "engine.workers=1", "filters.dark.min=100"]
    text = "filters.text={column: text_share, max: 0.05, missing: reject}"
    assert run(load_config(PipelineConfig, DEFAULT, [*words, text])) == 0
    (path,) = outputs_of(out / "filter", "000000")
    output = read_output(path)
    assert output is not None and output.table["rejected_by"].to_pylist() == [["dark"]]
